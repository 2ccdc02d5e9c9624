"""The published donors from an in-memory hub: what is fetched, what is verified, what is kept."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.sources import HubDonor, HubVocabulary
from vpmoe_assets.donors.download import fetch_qwen3, fetch_vocabulary
from vpmoe_assets.errors import DonorError
from vpmoe_assets.hub import HubError, HubFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Weights by sha256, everything else by git id, as a commit names them."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.read_paths = files, []

    def list_files(self, repo: str, repo_type: str, revision: str) -> list[HubFile]:
        assert (repo_type, revision) == ("model", COMMIT)
        return [
            HubFile(path, len(content), sha(content))
            if path.endswith(".safetensors")
            else HubFile(
                path, len(content), None, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            )
            for path, content in self.files.items()
        ]

    def read(self, repo: str, repo_type: str, revision: str, file: HubFile, offset: int) -> Iterator[bytes]:
        self.read_paths.append(file.path)
        yield self.files[file.path][offset:]


def donor(files: dict[str, str], revision: str = COMMIT) -> HubDonor:
    return HubDonor(
        kind="hub",
        repo="Qwen/Qwen3-0.6B",
        revision=revision,
        files=files,
        tokenizer="qwen3",
        model_type="qwen3",
        num_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=12,
        vocab_size=300,
        tie_word_embeddings=True,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )


def vocabulary(files: dict[str, str]) -> HubVocabulary:
    return HubVocabulary(
        kind="hub", repo="openai/gpt-oss-20b", revision=COMMIT, files=files, hidden_size=8, vocab_size=50
    )


@pytest.fixture
def qwen() -> FakeHub:
    return FakeHub(
        {
            "config.json": b"{}",
            "tokenizer.json": b"[]",
            "tokenizer_config.json": b'{"eos_token": "x"}',
            "model.safetensors": save({"a": torch.ones(3)}),
            "LICENSE": b"not taken",
            "original/model.safetensors": b"not taken either",
        }
    )


@pytest.fixture
def gpt_oss() -> FakeHub:
    tensors = {name: torch.randn(50, 8).bfloat16() for name in (EMBEDDING, HEAD)}
    names = [f"model-0000{number}-of-00002.safetensors" for number in range(3)]
    weight_map = {EMBEDDING: names[0], "model.layers.0.x": names[1], HEAD: names[2]}
    return FakeHub(
        {
            "config.json": b'{"model_type": "gpt_oss"}',
            "tokenizer.json": b"[]",
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            names[0]: save({EMBEDDING: tensors[EMBEDDING], "model.layers.1.y": torch.ones(1000)}),
            names[1]: save({"model.layers.0.x": torch.ones(5)}),
            names[2]: save({HEAD: tensors[HEAD]}),
        }
    )


def test_the_donor_comes_with_its_small_files_and_nothing_else(qwen: FakeHub, tmp_path: Path):
    pins = {"model.safetensors": sha(qwen.files["model.safetensors"]), "config.json": sha(b"{}")}
    manifest = fetch_qwen3(donor(pins), tmp_path, client=qwen)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    listed = {shard["path"]: shard["sha256"] for shard in manifest["storage"]["shards"]}
    assert listed == {name: sha(qwen.files[name]) for name in names}
    assert (manifest["repo"], manifest["revision"]) == ("Qwen/Qwen3-0.6B", COMMIT)


def test_weights_with_another_sha256_are_refused_before_anything_is_fetched(qwen: FakeHub, tmp_path: Path):
    with pytest.raises(HubError, match=rf"model.safetensors: pinned sha256 {'0' * 64}, but the commit names"):
        fetch_qwen3(donor({"model.safetensors": "0" * 64}), tmp_path, client=qwen)
    assert qwen.read_paths == []


def test_a_small_file_with_another_sha256_is_refused_and_removed(qwen: FakeHub, tmp_path: Path):
    with pytest.raises(HubError, match=rf"config.json: received 2 bytes with sha256 {sha(b'{}')}, expected"):
        fetch_qwen3(donor({"config.json": "0" * 64}), tmp_path, client=qwen)
    assert list(tmp_path.iterdir()) == []


def test_an_unpinned_small_file_must_be_the_one_of_the_commit(qwen: FakeHub, tmp_path: Path):
    served = qwen.read
    qwen.read = lambda *place: (
        iter([b"tampered with, sir"[:18]]) if "_config" in place[3].path else served(*place)
    )
    with pytest.raises(HubError, match=r"tokenizer_config\.json: received 18 bytes with git id"):
        fetch_qwen3(donor({}), tmp_path, client=qwen)


def test_a_missing_file_of_the_donor_is_named(qwen: FakeHub, tmp_path: Path):
    del qwen.files["tokenizer.json"]
    with pytest.raises(HubError, match=r"has no tokenizer\.json"):
        fetch_qwen3(donor({}), tmp_path, client=qwen)
    del qwen.files["model.safetensors"]
    with pytest.raises(HubError, match=r"has no \*\.safetensors"):
        fetch_qwen3(donor({}), tmp_path, client=qwen)


def test_an_unpinned_revision_is_refused(qwen: FakeHub, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"sources.qwen3_0_6b.revision: not pinned"):
        fetch_qwen3(donor({}, revision=""), tmp_path, client=qwen)


def test_of_the_vocabulary_donor_only_two_tensors_are_kept(gpt_oss: FakeHub, tmp_path: Path):
    manifest = fetch_vocabulary(vocabulary({}), tmp_path / "payload", tmp_path / "downloads", client=gpt_oss)
    payload = tmp_path / "payload"
    assert sorted(path.name for path in payload.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    kept = load_file(payload / "model.safetensors")
    assert sorted(kept) == [HEAD, EMBEDDING]
    first = load_file(tmp_path / "downloads" / "model-00000-of-00002.safetensors")
    assert torch.equal(kept[EMBEDDING], first[EMBEDDING])
    assert "model-00001-of-00002.safetensors" not in gpt_oss.read_paths
    assert [file["path"] for file in manifest["read"]] == [
        "model-00000-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_checkpoint_without_a_head_is_refused(gpt_oss: FakeHub, tmp_path: Path):
    index = {"weight_map": {EMBEDDING: "model-00000-of-00002.safetensors"}}
    gpt_oss.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(DonorError, match=r"names no lm_head\.weight"):
        fetch_vocabulary(vocabulary({}), tmp_path / "payload", tmp_path / "downloads", client=gpt_oss)


def test_a_finished_download_is_not_read_again(gpt_oss: FakeHub, tmp_path: Path):
    for _ in range(2):
        fetch_vocabulary(vocabulary({}), tmp_path / "payload", tmp_path / "downloads", client=gpt_oss)
    assert len(gpt_oss.read_paths) == len(set(gpt_oss.read_paths)) == 5
