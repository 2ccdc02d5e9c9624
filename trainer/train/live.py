"""Opens the sources of samples that a run makes while it trains, `trainer.data.live`."""

from importlib import import_module

from trainer.contract.kinds import ROLLOUTS
from trainer.contract.mix import mix_of
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.data.live import LiveSource
from trainer.job.distributed import Layout
from trainer.job.workdir import WorkDir

ON_POLICY = "trainer.train.on_policy"
"""Imported by name where a recipe asks for it: a run on stored samples neither loads nor consists of it."""


def open_live(
    job: Job, recipe: TrainRecipe, layout: Layout, work: WorkDir, *, keeps: bool = True
) -> dict[str, LiveSource]:
    """Open the sources of the kinds of samples that a recipe mixes and no data set holds.

    Args:
        job: The job, for its inputs and seed.
        recipe: Its recipe.
        layout: Where this process stands.
        work: The job's work directory.
        keeps: Whether what is made is kept there; the resume check, which only repeats, keeps nothing.

    Returns:
        The sources by kind; empty where data sets hold all samples.

    Raises:
        ConfigError: An input is missing, or does not fit the recipe.
    """
    if ROLLOUTS not in mix_of(recipe).kinds:
        return {}
    source: LiveSource = import_module(ON_POLICY).open_rollouts(job, recipe, layout, work, keeps=keeps)
    return {ROLLOUTS: source}
