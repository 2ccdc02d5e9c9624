"""The code location: one experiment's graph. `VPMOE_EXPERIMENT` selects the experiment (default smoke)."""

import dagster as dg

from trainer.contract.log_records import install as keep_logs_clean
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.assets.data import data_assets
from vpmoe_assets.assets.distill import distill_assets
from vpmoe_assets.assets.donors import donor_assets
from vpmoe_assets.assets.evals import evals_assets
from vpmoe_assets.assets.jobs import experiment_jobs
from vpmoe_assets.assets.lineage import lineage_assets
from vpmoe_assets.assets.perf import perf_assets
from vpmoe_assets.assets.rungs import rung_assets
from vpmoe_assets.assets.sources import sources_assets
from vpmoe_assets.assets.teacher import teacher_assets
from vpmoe_assets.console import install as readable_console
from vpmoe_assets.project import experiment_name
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.shards import ShardsResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource
from vpmoe_assets.selection_guard import install as guard_selections

guard_selections()
keep_logs_clean()
readable_console()
experiment = load_experiment(experiment_name())

made = [
    *sources_assets(experiment),
    *donor_assets(experiment),
    *data_assets(experiment),
    *rung_assets(experiment),
    *teacher_assets(experiment),
    *distill_assets(experiment),
]
names = {step.asset for produced in made for step in produced.steps}
made += evals_assets(experiment, [name for name in experiment.ladder() if name in names])
made += perf_assets(experiment)
steps = {step.asset: step for produced in made for step in produced.steps}
"""What makes each asset, by its bare name: for whoever asks what present code would make."""

groups = {spec.group_name for produced in made for spec in produced.definition.specs if spec.group_name}
defs = dg.Definitions(
    assets=[*(produced.definition for produced in made), *lineage_assets(experiment)],
    jobs=experiment_jobs(groups),
    resources={
        "store": StoreResource(),
        "index": IndexResource(),
        "trainer": TrainerResource(),
        "shards": ShardsResource(),
    },
    # Steps are few and heavy: a process for each would cost more than the small ones take.
    executor=dg.in_process_executor,
)
