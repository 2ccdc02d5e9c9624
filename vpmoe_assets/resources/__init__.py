"""What assets are given to work with: the store, the index, the trainer.

Nothing is imported here: the agent of a multi-process job (`torchrun.py`) lives in this package and must not
pay for Dagster.
"""
