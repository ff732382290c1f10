"""Redriving dead letters: `letters.py` reads them, `plan.py` judges each, `answers.py` looks for replies that were
given meanwhile, `perform.py` writes records back. The command line is in `cli/redrive.py`.
"""
