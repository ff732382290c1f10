"""`klatch up`: everything on one machine, in one terminal, ended with it.

`everything.py` is the order of things, `children.py` keeps processes running, `keys.py` makes and keeps keys,
`showcase.py` sends one chat event through the pipeline before the user's eyes.
"""
