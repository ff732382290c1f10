"""`python -m klatch_workers` is `klatch`."""

from klatch_workers.cli import main

main()
