"""From rows and text to training shards."""

import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import data as checks
from vpmoe_assets.errors import DataError
from vpmoe_assets.resources.shard_progress import ShardProgress


def data_assets(experiment: Experiment) -> list[Produced]:
    """Return the `data` group of an experiment."""
    return [_synth_harmony(experiment), _synth_kd_v1(experiment), _healing_text_v1(experiment)]


def _synth_harmony(experiment: Experiment) -> Produced:
    harmony = experiment.data.synth_harmony

    @produced_asset(
        experiment,
        group="data",
        kinds={"parquet", "openai"},
        sharded=True,
        recipe=plain(harmony),
        roots=["vpmoe_assets.harmony.synth_harmony"],
        checks=[checks.harmony_manifest],
        metadata=_harmony_metadata,
    )
    def synth_harmony(build: Build, synth: Published, o200k_tokenizer: Published) -> Built:
        """SYNTH rows as five-message Harmony conversations in parquet shards.

        Rows without a question, reasoning or answer are skipped and counted in the manifest.
        """
        from trainer.contract.files import replace_json
        from trainer.contract.scaffold import Scaffold
        from vpmoe_assets.harmony.synth_harmony import build_synth_harmony

        manifest = build_synth_harmony(
            sorted(synth.payload.rglob("*.parquet")),
            build.payload,
            build.work.scratch,
            scaffold=Scaffold.of(harmony),
            num_shards=harmony.num_shards,
            row_group_rows=harmony.row_group_rows,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            processes=_processes(),
            engine=build.shards.open(build.work.scratch, build.context.log.warning),
            progress=partial(ShardProgress, work=build.work.path, engine=build.shards.engine),
        )
        replace_json(build.work.manifest, manifest)
        return Built(
            metrics={
                "rows": manifest["storage"]["total_rows"],
                "skipped_rows": manifest["conversion"]["skipped_rows"],
            },
            execution=_execution(build),
        )

    return synth_harmony


def _synth_kd_v1(experiment: Experiment) -> Produced:
    kd = experiment.data.synth_kd_v1

    @produced_asset(
        experiment,
        group="data",
        kinds={"dataset", "openai"},
        sharded=True,
        recipe=plain(kd),
        roots=["vpmoe_assets.harmony.build"],
        checks=[
            checks.kd_manifest,
            checks.kd_aligned,
            checks.golden_conversation,
            checks.kd_sample(experiment.seed),
            checks.kd_split,
            checks.kd_truncation,
        ],
        metadata=_kd_metadata,
    )
    def synth_kd_v1(build: Build, synth_harmony: Published, o200k_tokenizer: Published) -> Built:
        """Training shards: token ids, loss mask and span of every conversation, in Megatron's indexed format.

        Spans are 1 for reasoning and 2 for the final answer. Conversations over the sequence length lose the
        start of their reasoning, then of the question, never a message; a malformed row fails the build.
        """
        from trainer.contract.files import replace_json
        from vpmoe_assets.harmony.build import build_kd_from_harmony
        from vpmoe_assets.harmony.kd_config import KdConfig

        built = build_kd_from_harmony(
            synth_harmony.directory / "manifest.json",
            synth_harmony.payload,
            build.payload,
            build.work.scratch,
            config=KdConfig(kd.seq_len, kd.valid_fraction, kd.max_rows, kd.pack.block, kd.on_invalid),
            tokenizer_dir=o200k_tokenizer.payload,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            processes=_processes(),
            engine=build.shards.open(build.work.scratch, build.context.log.warning),
            progress=partial(ShardProgress, work=build.work.path, engine=build.shards.engine),
        )
        if built.reused_shards:
            build.context.log.info(f"{built.reused_shards} shards were finished by an interrupted build")
        replace_json(build.work.manifest, built.manifest)
        splits = built.manifest["splits"]
        return Built(
            metrics={
                "rows": sum(split["rows"] for split in splits.values()),
                "tokens": sum(split["tokens"] for split in splits.values()),
                **{f"{name}_rows": split["rows"] for name, split in splits.items()},
                **{f"{name}_tokens": split["tokens"] for name, split in splits.items()},
            },
            details={"config_hash": built.manifest["config_hash"]},
            execution=_execution(build),
        )

    return synth_kd_v1


def _healing_text_v1(experiment: Experiment) -> Produced:
    healing = experiment.data.healing_text_v1

    @produced_asset(
        experiment,
        group="data",
        kinds={"dataset"},
        recipe=plain(healing),
        roots=["vpmoe_assets.text.healing"],
        checks=[checks.healing_aligned, checks.healing_budget(healing.max_tokens)],
        metadata=_healing_metadata,
    )
    def healing_text_v1(build: Build, healing_corpus: Published, o200k_tokenizer: Published) -> Built:
        """The healing corpus as tokens, one document one sequence, each ended by one EOD."""
        from trainer.contract.files import replace_json
        from vpmoe_assets.text.healing import build_healing_text

        shutil.rmtree(build.payload)
        manifest = build_healing_text(
            healing_corpus.payload,
            healing_corpus.manifest,
            build.payload,
            tokenizer_dir=o200k_tokenizer.payload,
            valid_fraction=healing.valid_fraction,
            max_tokens=healing.max_tokens,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
        )
        replace_json(build.work.manifest, manifest)
        splits = manifest["splits"]
        return Built(
            metrics={
                "rows": sum(split["rows"] for split in splits.values()),
                "tokens": sum(split["tokens"] for split in splits.values()),
            },
            details={"config_hash": manifest["config_hash"]},
        )

    return healing_text_v1


def _processes() -> int:
    """Worker processes of a build: `$VPMOE_WORKERS`, or one for each core this process may use."""
    given = os.environ.get("VPMOE_WORKERS")
    if not given:
        return len(os.sched_getaffinity(0))
    if not (given.isascii() and given.isdecimal() and int(given)):
        raise DataError(f"VPMOE_WORKERS = {given!r}: give a number of processes, 1 or more")
    return int(given)


def _execution(build: Build) -> dict[str, Any]:
    """Say what ran the shards, for the record; what a cluster gave is not the step's to know."""
    if build.shards.engine != "processes":
        return {"device": "cpu", "engine": build.shards.engine}
    return {"device": "cpu", "processes": _processes()}


def _harmony_metadata(item: Published) -> Mapping[str, Any]:
    keys = ("path", "rows", "bytes", "row_groups", "skipped", "sha256")
    shards = item.manifest["storage"]["shards"]
    return {
        "dagster/row_count": item.record.metrics["rows"],
        "shards": table([{key: shard[key] for key in keys if key in shard} for shard in shards]),
    }


def _kd_metadata(item: Published) -> Mapping[str, Any]:
    splits = item.manifest["splits"]
    return {
        "dagster/row_count": item.record.metrics["rows"],
        "config_hash": item.manifest["config_hash"],
        "truncation": table([{"split": name, **split["counts"]} for name, split in splits.items()]),
        "shards": table(
            [
                {key: shard[key] for key in ("name", "rows", "tokens")} | {"split": name}
                for name, split in splits.items()
                for shard in split["shards"]
            ]
        ),
    }


def _healing_metadata(item: Published) -> Mapping[str, Any]:
    splits = item.manifest["splits"]
    rows = [
        {"split": name, "documents": split["rows"], "tokens": split["tokens"]}
        for name, split in splits.items()
    ]
    return {"dagster/row_count": item.record.metrics["rows"], "splits": table(rows)}
