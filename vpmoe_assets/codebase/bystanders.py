"""Modules that run beside a step and decide no byte of it, each with its reason.

An import closure ends at them: neither they nor what only they import is part of a step's code. Whatever
computes something that ends in a payload must not be here; where such a thing lies in one of these, it moves
out into a library.
"""

from collections.abc import Mapping

BYSTANDERS: Mapping[str, str] = {
    "trainer.__main__": "reads the command line and starts the step",
    "trainer.contract.credentials": "takes secrets out of logs and records, and of nothing in a payload",
    "trainer.contract.log_records": "what a process logs",
    "trainer.contract.schema": "its outcome stands in the recipe, resolved to the last default",
    "trainer.contract.status": "names of the files by which the two processes talk; none is in a payload",
    "trainer.job.deliverable": "renames a finished payload and writes the summary beside it",
    "trainer.job.lifecycle": "log, heartbeat, STATUS and exit code of a job",
    "trainer.job.metrics": "writes the curve, beside the payload",
    "trainer.job.signals": "asks a job to stop; what it then does is the step's own code",
    "trainer.job.workdir": "log, heartbeat and paths of the work directory",
    "trainer.train.drift": "repeats the last steps after the weights are written, and only compares",
    "trainer.train.room": "refuses a run that does not fit; one that fits is left as it is",
    "trainer.train.tracking": "shows the curve in Weights & Biases",
    "vpmoe_assets.assets": "gathers inputs, calls a step and publishes; what it decides stands in the recipe",
    "vpmoe_assets.build": "what an asset's function is given and returns",
    "vpmoe_assets.checks": "judge what is published; a check has a version of its own",
    "vpmoe_assets.codebase": "finds out what the code of a step is",
    "vpmoe_assets.definitions": "assembles the graph",
    "vpmoe_assets.harmony.pool": "says where shards are worked on, and hands on what their workers return",
    "vpmoe_assets.lineage.errors": "end a step, so that nothing is published; no step catches one",
    "vpmoe_assets.resources": "starts jobs, watches them and tells Dagster",
    "vpmoe_assets.rungs": "how a rung is shown and checked",
}
"""Modules, or packages with all that is in them."""


def bystander(module: str) -> str | None:
    """Return the entry that a module falls under; None where it is none."""
    while module:
        if module in BYSTANDERS:
            return module
        module = module.rpartition(".")[0]
    return None
