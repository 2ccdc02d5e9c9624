"""The two donors of the ladder, as Hugging Face directories."""

import shutil
from collections.abc import Mapping
from typing import Any

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.sources import HubDonor, HubVocabulary, SeededDonor, SeededVocabulary
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import data as data_checks
from vpmoe_assets.checks import donors as checks

_SEEDED = ("vpmoe_assets.donors.checkpoints", "vpmoe_assets.donors.manifest")
_HUB = ("vpmoe_assets.donors.download",)


def donor_assets(experiment: Experiment) -> list[Produced]:
    """Return the donors of an experiment; one that starts from a seeded student has none."""
    donor, vocabulary = experiment.sources.qwen3_0_6b, experiment.sources.gpt_oss_20b
    if donor is None or vocabulary is None:
        return []
    return [_qwen3_0_6b(experiment, donor), _gpt_oss_20b(experiment, vocabulary)]


def _qwen3_0_6b(experiment: Experiment, donor: SeededDonor | HubDonor) -> Produced:
    @produced_asset(
        experiment,
        group="sources",
        kinds={"huggingface", "safetensors"},
        recipe=plain(donor),
        roots=_SEEDED if donor.kind == "seeded" else _HUB,
        checks=[data_checks.source_files, checks.pinned_files(donor), checks.donor_architecture(donor)],
        metadata=_donor_metadata,
        seed=experiment.seed if donor.kind == "seeded" else None,
    )
    def qwen3_0_6b(build: Build) -> Built:
        """The dense donor, Qwen3-0.6B: every layer of the ladder's first rung comes from it.

        `hub` takes the published checkpoint at a pinned commit and verifies every file; `seeded` writes a
        small checkpoint of the same architecture with weights from the experiment's seed. The tokenizer is
        the real one either way.
        """
        if donor.kind == "hub":
            from vpmoe_assets.donors.download import fetch_qwen3

            manifest = fetch_qwen3(donor, build.payload)
        else:
            from vpmoe_assets.donors.checkpoints import write_seeded_qwen3
            from vpmoe_assets.donors.manifest import donor_manifest

            shutil.rmtree(build.payload)  # of an attempt that was killed
            write_seeded_qwen3(donor, experiment.seed, build.payload)
            manifest = donor_manifest(
                f"Qwen3 architecture with weights from seed {experiment.seed}, the real Qwen3 tokenizer.",
                build.payload,
            )
        numbers = {"num_layers": donor.num_layers, "hidden_size": donor.hidden_size}
        return _built(build, manifest, **numbers)

    return qwen3_0_6b


def _gpt_oss_20b(experiment: Experiment, vocabulary: SeededVocabulary | HubVocabulary) -> Produced:
    @produced_asset(
        experiment,
        group="sources",
        kinds={"huggingface", "safetensors"},
        recipe=plain(vocabulary),
        roots=[*_SEEDED, "vpmoe_assets.harmony.tokenizer"] if vocabulary.kind == "seeded" else _HUB,
        checks=[
            data_checks.source_files,
            checks.pinned_files(vocabulary),
            checks.vocabulary_matrices(vocabulary),
        ],
        metadata=_donor_metadata,
        seed=experiment.seed if vocabulary.kind == "seeded" else None,
    )
    def gpt_oss_20b(build: Build, o200k_tokenizer: Published) -> Built:
        """The vocabulary donor, gpt-oss-20b: its tokenizer, embedding and output head, nothing else of it.

        `hub` takes them from the published checkpoint at a pinned commit, out of shards that are verified
        whole; `seeded` draws both matrices from the experiment's seed. The tokenizer is the real one either
        way.
        """
        if vocabulary.kind == "hub":
            from vpmoe_assets.donors.download import fetch_vocabulary

            manifest = fetch_vocabulary(vocabulary, build.payload, build.work.scratch / "downloads")
        else:
            from vpmoe_assets.donors.checkpoints import write_seeded_gpt_oss
            from vpmoe_assets.donors.manifest import donor_manifest
            from vpmoe_assets.harmony.tokenizer import load_ranks

            shutil.rmtree(build.payload)
            ranks = load_ranks(o200k_tokenizer.payload)
            write_seeded_gpt_oss(vocabulary, experiment.seed, ranks, build.payload)
            manifest = donor_manifest(
                f"GPT-OSS vocabulary with matrices from seed {experiment.seed}, the real o200k tokenizer.",
                build.payload,
            )
        return _built(build, manifest, hidden_size=vocabulary.hidden_size, vocab_size=vocabulary.vocab_size)

    return gpt_oss_20b


def _built(build: Build, manifest: dict[str, Any], **numbers: int) -> Built:
    from trainer.contract.files import replace_json
    from vpmoe_assets.donors.checkpoints import checkpoint_shapes

    replace_json(build.work.manifest, manifest)
    shapes = checkpoint_shapes(build.payload)
    parameters = 0
    for shape in shapes.values():
        count = 1
        for size in shape:
            count *= size
        parameters += count
    return Built(metrics={"parameters": parameters, "tensors": len(shapes), **numbers})


def _donor_metadata(item: Published) -> Mapping[str, Any]:
    shards = item.manifest["storage"]["shards"]
    shown: dict[str, Any] = {"files": table([dict(shard) for shard in shards])}
    shown["source"] = item.manifest["description"]
    if "revision" in item.manifest:
        shown["revision"] = item.manifest["revision"]
    return shown
