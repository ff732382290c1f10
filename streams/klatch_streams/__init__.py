"""What is decided: pure deciders, and the runner that feeds them from the log.

Import from the modules; nothing happens here. Nothing in this package calls a model, or can: see the import rule.
"""
