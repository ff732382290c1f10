"""What is said: the contract of klatch, enough by itself for a producer or a consumer in Python.

Import from the modules (`klatch_schemas.events`, `.topics`, `.codec`, `.assembly`, `.client`); nothing happens here.
"""
