"""Calls to models, behind one small port (`port.py`), with typed errors (`errors.py`)."""
