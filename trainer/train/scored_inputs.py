"""Opens scored conversations: a subset of the conversations, each token with the teacher's record of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.topk.store import TopKStore
from trainer.data.indexed import SpanDocuments, manifest_value, read_manifest
from trainer.data.scored import ScoredDataset, ScoredDocuments
from trainer.train.inputs import KD_INPUT, TEACHER_INPUT, TOPK_INPUT, DataPart, input_root


def open_scored(
    job: Job, recipe: TrainRecipe, share: float, cache_dir: Path
) -> tuple[DataPart, Mapping[str, Any]]:
    """Open the scored part of a run's samples.

    Args:
        job: Needs the inputs that `open_store` needs.
        recipe: With the table `scored`.
        share: Of the run's samples that are scored.
        cache_dir: Where packings are stored; may be shared by ranks.

    Returns:
        The part, and the manifest of its store.

    Raises:
        ConfigError: An input is missing.
        DataError: The data are damaged.
        StoreError: See `open_store`.
    """
    assert recipe.scored is not None
    store = open_store(job, recipe)
    root, fraction = input_root(job, recipe, KD_INPUT), recipe.scored.subset_fraction

    def split(name: str) -> tuple[ScoredDataset, Mapping[str, Any]]:
        documents = SpanDocuments(root, name)
        scored = ScoredDocuments(documents, store, name, fraction)
        packed = ScoredDataset(
            scored, seq_len=recipe.seq_len, block=recipe.pack_block, seed=job.seed, cache_dir=cache_dir
        )
        return packed, documents.manifest

    train, manifest = split("train")
    return DataPart(train, split("valid")[0], share, manifest), store.manifest


def open_store(job: Job, recipe: TrainRecipe) -> TopKStore:
    """Open the top-K store among a job's inputs, and check that it is what the recipe asks for.

    Args:
        job: Needs the inputs `synth_kd_v1` and `teacher_topk`; where it has `teacher`, that one must have
            made the store.
        recipe: With the table `scored`.

    Raises:
        ConfigError: An input is missing.
        StoreError: The store is damaged, or of another data set, tokenizer or teacher, or has other terms.
    """
    assert recipe.scored is not None
    root, data = input_root(job, recipe, TOPK_INPUT), input_root(job, recipe, KD_INPUT)
    manifest = read_manifest(data, SpanDocuments.SCHEMA)
    expect: dict[str, Any] = {
        "dataset_digest": job.inputs[KD_INPUT].digest,
        "tokenizer_sha256": manifest_value(manifest, "tokenizer", "model_sha256"),
        "topk": recipe.scored.topk,
        "tail_draws": recipe.scored.tail_draws,
        "subset_fraction": recipe.scored.subset_fraction,
    }
    store = TopKStore(root, expect)
    if TEACHER_INPUT in job.inputs and "digest" in store.manifest["teacher"]:
        store.require(teacher={"digest": job.inputs[TEACHER_INPUT].digest})
    return store
