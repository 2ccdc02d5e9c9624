"""Checks of plain text, as pure functions; the asset graph runs them as asset checks."""

from pathlib import Path
from typing import Any

import numpy as np

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.indexed import map_elements, read_index
from vpmoe_assets.verdict import Verdict


def text_aligned(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Every document of plain text ends with its only EOD, and documents and tokens are the manifest's."""
    faults: list[str] = []
    documents = tokens = 0
    shards = ((split, shard) for split, content in manifest["splits"].items() for shard in content["shards"])
    for split, shard in shards:
        path = payload_dir / shard["paths"]["tokens.idx"]
        index = read_index(path)
        ids = map_elements(path.with_suffix(""), index)
        last = np.cumsum(index.lengths, dtype=np.int64) - 1
        where = f"{split}/{shard['name']}"
        if (index.lengths.size, index.elements) != (shard["rows"], shard["tokens"]):
            faults.append(
                f"{where}: {index.lengths.size} documents of {index.elements} tokens, not as stated"
            )
        elif not (ids[last] == tokenizer.EOD).all() or np.count_nonzero(ids == tokenizer.EOD) != last.size:
            faults.append(f"{where}: a document does not end with its only EOD")
        elif int(ids.min()) < 0 or int(ids.max()) >= tokenizer.VOCAB_SIZE:
            faults.append(f"{where}: a token id lies outside the vocabulary")
        documents, tokens = documents + index.lengths.size, tokens + index.elements
    metadata = {"documents": documents, "tokens": tokens}
    return Verdict.of(faults, f"{documents} documents, each ended by its only EOD", metadata)


def tokens_within_budget(payload_dir: Path, most: int) -> Verdict:
    """Check that the shards hold no more tokens than a budget, counted in the files and not in the manifest.

    Args:
        payload_dir: The payload.
        most: The budget; below 0 there is none.
    """
    indexes = sorted(payload_dir.rglob("*.idx"))
    if not indexes:
        return Verdict(False, f"{payload_dir} holds no shard", {"tokens": 0})
    tokens = 0
    for path in indexes:
        try:
            tokens += map_elements(path.with_suffix(""), read_index(path)).size
        except DataError as error:
            return Verdict(False, str(error), {"tokens": tokens})
    budget = "none" if most < 0 else most
    return Verdict(most < 0 or tokens <= most, f"{tokens} tokens, budget {budget}", {"tokens": tokens})
