"""`klatch bench`: what klatch costs, against baselines of the same run, on the machine it runs on.

`rig.py` starts one Kafka, a fast scripted model server, klatch's stages as `klatch up` starts them, and the bare
relays of `relay.py`; `run.py` measures them in turns with the one client of `client.py`; `report.py` is what comes out.
Figures are ratios between neighbours of one run: absolute ones change with the machine and with who else uses it.
"""
