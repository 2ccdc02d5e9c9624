"""Imported by a fork server before it forks: the trainer, as a job loads it."""

import gc

from trainer.job.startup import load_megatron

load_megatron()

import trainer.train.run  # noqa: E402, F401

gc.freeze()
