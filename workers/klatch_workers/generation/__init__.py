"""Generation: joins admission and trust, calls the model, and writes the stream.

`stage.py` restores and owns partitions, `table.py` folds what the log says of each request, `request.py` carries
out the policy of `klatch_streams.generation` for one request, `speak.py` streams one attempt, `prepare.py` makes the
model call, `conclude.py` settles and remembers, `turns.py` reads a conversation's past from the log.
"""
