import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.contract.topk.distributions import ADAPTIVE, IDENTITY, records
from trainer.contract.topk import learning, writer
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.writer import TopKShardWriter

PAGE = Path(__file__).resolve().parents[4] / "docs" / "topk_store.md"


@pytest.mark.parametrize("identity", [IDENTITY, ADAPTIVE], ids=["fixed", "adaptive"])
def test_the_reader_on_the_page_reads_what_the_store_does(tmp_path, monkeypatch, identity):
    monkeypatch.setattr(writer, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(learning, "MADE_AT", (0, 150))
    rng = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    shard = TopKShardWriter(tmp_path / "train" / "shard_00.topk", identity, split="train", shard=0)
    for sequence in range(2, 40, 2):
        shard.add(sequence, records(rng, int(rng.integers(0, 40)), identity))
    write_manifest(tmp_path, identity, {"train": [shard.close()]}, {})
    store = TopKStore(tmp_path)

    namespace: dict = {"__name__": "page"}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    exec(compile(code, str(PAGE), "exec"), namespace)
    manifest = json.loads((tmp_path / "store.json").read_text())
    blocks = list(namespace["read"](tmp_path / "train" / "shard_00.topk", manifest))
    assert len(blocks) > 2
    found = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    expected = [store.read("train", 0, sequence) for sequence in store.sequences("train", 0).tolist()]
    numbers = np.repeat(store.sequences("train", 0), [len(some) for some in expected])
    np.testing.assert_array_equal(found[0], numbers)
    names = ("label_logprob", "ids", "logprobs", "tail_mass", "draws")
    for name, column in zip(names, found[1:], strict=True):
        whole = np.concatenate([getattr(some, name) for some in expected])
        np.testing.assert_allclose(column, whole, rtol=1e-6, atol=1e-6)
