"""The teacher: a run of our own trained longer, a published checkpoint, or who answers at an address."""

import shutil
from collections.abc import Mapping
from typing import Any

from trainer.contract.assets import TEACHER
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.sources import ArtifactTeacher, HubTeacher, ServerTeacher
from vpmoe_assets.assets.curves import training_metadata
from vpmoe_assets.assets.distill import train
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import data as data_checks
from vpmoe_assets.checks import rungs as rung_checks
from vpmoe_assets.checks import teacher as checks
from vpmoe_assets.codebase.words import job_roots

_TRAINED = """
Smoke's stand-in for a teacher: our own `{asset}`, trained {steps} steps longer.

Its log-probabilities are what the student learns from in the stages after. It is no better model than such a
run can be; `full` takes a published one.
"""


def teacher_assets(experiment: Experiment) -> list[Produced]:
    """Return the teacher of an experiment; one without distillation has none."""
    source = experiment.sources.teacher
    if source is None:
        return []
    if isinstance(source, ArtifactTeacher):
        return [_trained(experiment, source)]
    if isinstance(source, HubTeacher):
        return [_published(experiment, source)]
    return [_served(experiment, source)]


def _trained(experiment: Experiment, source: ArtifactTeacher) -> Produced:
    recipe = experiment.train_recipe(TEACHER)

    @produced_asset(
        experiment,
        group="sources",
        kinds={"pytorch", "wandb"},
        recipe=plain(recipe),
        roots=job_roots("train", plain(recipe)),
        checks=[
            rung_checks.weights_complete(recipe.architecture, recipe.training.dtype),
            rung_checks.loss_not_diverged,
            checks.trained_token_ids(experiment.sources.tokenizer),
        ],
        metadata=_trained_metadata(source),
        seed=experiment.seed,
        trains=True,
        name=TEACHER,
        description=_TRAINED.format(asset=source.asset, steps=source.extra_steps).strip(),
        inputs=[source.asset, "synth_kd_v1"],
    )
    def teacher(build: Build, **inputs: Published) -> Built:
        return train(build, inputs, verify_resume=False)

    return teacher


def _trained_metadata(source: ArtifactTeacher) -> Any:
    def shown(item: Published) -> Mapping[str, Any]:
        what = f"a stand-in: our own {source.asset}, trained {source.extra_steps} steps longer"
        return {**training_metadata(item), "teacher": what, "reasoning_mode": source.reasoning_mode}

    return shown


def _published(experiment: Experiment, source: HubTeacher) -> Produced:
    @produced_asset(
        experiment,
        group="sources",
        kinds={"huggingface", "safetensors"},
        recipe=plain(source),
        roots=["vpmoe_assets.donors.download"],
        checks=[
            data_checks.source_files,
            checks.fetched_revision(source),
            checks.published_token_ids(experiment.sources.tokenizer),
        ],
        metadata=_published_metadata,
    )
    def teacher(build: Build, o200k_tokenizer: Published) -> Built:
        """The published teacher at a pinned commit: configuration, tokenizer and weights, all verified.

        Its log-probabilities are what the student learns from in the stages after.
        """
        from trainer.contract.files import replace_json
        from vpmoe_assets.donors.download import fetch_teacher

        manifest = fetch_teacher(source, build.payload)
        replace_json(build.work.manifest, manifest)
        return Built(
            metrics={"bytes": manifest["storage"]["total_bytes"]},
            details={
                "repo": source.repo,
                "revision": source.revision,
                "reasoning_mode": source.reasoning_mode,
            },
        )

    return teacher


def _published_metadata(item: Published) -> Mapping[str, Any]:
    return {
        "teacher": item.manifest["description"],
        "revision": item.manifest["revision"],
        "reasoning_mode": item.record.details["reasoning_mode"],
        "files": table([dict(shard) for shard in item.manifest["storage"]["shards"]]),
    }


def _served(experiment: Experiment, source: ServerTeacher) -> Produced:
    tokenizer = experiment.sources.tokenizer
    recipe = {key: value for key, value in plain(source).items() if key != "url_env"}

    @produced_asset(
        experiment,
        group="sources",
        kinds={"openai", "json"},
        recipe={**recipe, "tokenizer_sha256": tokenizer.sha256},
        roots=["vpmoe_assets.donors.teacher"],
        checks=[checks.served_token_ids(source, tokenizer), checks.answers(source)],
        metadata=_served_metadata,
    )
    def teacher(build: Build) -> Built:
        """What stands for a served teacher: model, commit, reasoning mode and tokenizer; never an address.

        Where its replicas are, an environment variable says when scores are made.
        """
        from vpmoe_assets.donors.teacher import write_descriptor

        source.require_pins("sources.teacher")
        shutil.rmtree(build.payload)  # of an attempt that was killed
        return Built(details=write_descriptor(source, tokenizer.sha256, build.payload))

    return teacher


def _served_metadata(item: Published) -> Mapping[str, Any]:
    details = item.record.details
    return {
        "teacher": f"{details['model']} at {details['revision']}, served",
        "revision": details["revision"],
        "reasoning_mode": details["reasoning_mode"],
    }
