"""The store of a teacher's scores: log-probs at the supervised tokens of a subset of the conversations."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import orjson

from trainer.contract.assets import TEACHER, TEACHER_TOPK
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.status import LOG_NAME
from trainer.contract.topk.manifest import MANIFEST_NAME
from vpmoe_assets.assets.plots import bars, drawn_once
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import topk as checks
from vpmoe_assets.codebase.words import job_roots

_DRAWN_TOKENS = 50_000


def teacher_topk(experiment: Experiment) -> Produced:
    """Return the asset that holds a teacher's scores."""
    settings, source = experiment.stages.teacher_topk, experiment.sources.teacher
    assert settings is not None  # who asks has looked
    assert source is not None  # or the experiment would have been refused
    recipe = plain(experiment.score_recipe())
    renders = recipe["reasoning_mode"] != recipe["stored_mode"]

    @produced_asset(
        experiment,
        group="distill",
        kinds={"pytorch", "dataset"},
        recipe=recipe,
        roots=job_roots("score", recipe),
        checks=[
            checks.shards_verify,
            checks.bound_to_inputs(source),
            checks.one_record_per_token,
            checks.mass_at_most_one,
            checks.coverage(settings.subset_fraction),
        ],
        metadata=_metadata,
        seed=experiment.seed,
        trains=True,
        sharded=True,
        name=TEACHER_TOPK,
        inputs=[TEACHER, "synth_kd_v1", *(["o200k_tokenizer"] if renders else [])],
    )
    def topk(build: Build, **inputs: Published) -> Built:
        """What the teacher says of the supervised tokens of a subset of the conversations.

        For each token the log-prob of what stands there, its most likely ids with theirs, and the mass of
        all others. A record's address is split, shard and sequence of `synth_kd_v1`; docs/topk_store.md has
        the format. Several workers share the shards where `score_workers` of the trainer says so.
        """
        from vpmoe_assets.donors.teacher import where

        result = build.run_job("score", inputs, alone=True, execution=where(source))
        store = orjson.loads((build.payload / MANIFEST_NAME).read_bytes())
        splits = store["splits"]
        tokens = sum(split["tokens"] for split in splits.values())
        size = sum(shard["bytes"] for split in splits.values() for shard in split["shards"])
        return Built(
            metrics={
                "tokens": tokens,
                "tokens_train": splits["train"]["tokens"],
                "conversations": sum(split["sequences"] for split in splits.values()),
                "bytes": size,
                "bytes_per_token": size / max(tokens, 1),
                **{f"mean_logprob_{span}": mean for span, mean in store["span_means"].items()},
            },
            details={key: store[key] for key in ("teacher", "topk", "mass", "tail_draws", "logprob_error")},
            execution={
                **result.execution,
                "score_workers": build.trainer.score_workers,
                "gpus": list(result.devices),
            },
            attempts=result.attempts,
        )

    return topk


def _metadata(item: Published) -> Mapping[str, Any]:
    details = item.record.details
    shown: dict[str, Any] = {
        "log": dg.MetadataValue.path(item.run / LOG_NAME),
        "teacher": dg.MetadataValue.json(details["teacher"]),
        "reasoning_mode": details["teacher"]["reasoning_mode"],
    }
    if (plot := drawn_once(item, "mass", lambda: _mass(item))) is not None:
        shown["kept_mass"] = dg.MetadataValue.md(plot)
    return shown


def _mass(item: Published) -> str | None:
    from vpmoe_assets.harmony.topk_audit import kept_mass

    shares = kept_mass(item.payload, _DRAWN_TOKENS)
    return bars(shares, "mass of the kept ids", "share of tokens", "mass of the kept ids")
