"""What is wrong with a set-up, and how to mend it: one finding a check, each with its fix.

`examine` asks the machine, Kafka, and klatch's own processes, in that order; what cannot be asked because something
before it failed is left out. Nothing is changed and nothing is written, but for a few tokens asked of model servers.
"""
