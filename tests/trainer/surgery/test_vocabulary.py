"""The vocabulary step: mergekit's tokensurgeon really runs, and is held to NumPy and to the tokenizers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from tests.forks import Forks
from tests.trainer.surgery.vocabulary_cases import (
    HIDDEN,
    RESULT_ROWS,
    TOKENS,
    K,
    vocabulary_job,
    vocabulary_recipe,
    write_donor,
    write_vocabulary,
)
from trainer.contract.schema.base import ConfigError
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.surgery.convert import convert

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@dataclass
class Pair:
    donor: Path
    vocabulary: Path
    old: Tokenizer
    new: Tokenizer


@dataclass
class Converted:
    pair: Pair
    payload: Path
    summary: dict[str, Any]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]

    def shared(self) -> dict[str, tuple[int, int]]:
        """Old and new id of every ordinary token of both, as the tokenizer library has them."""
        old, new = self.pair.old.get_vocab(), self.pair.new.get_vocab()
        return {text: (old[text], new[text]) for text in sorted(new) if text in old and "<|" not in text}

    def fresh(self) -> list[str]:
        """Ordinary tokens of the new vocabulary that the old one lacks."""
        return sorted(set(self.pair.new.get_vocab()) - set(self.pair.old.get_vocab()) - {"<|return|>"})


def run(root: Path, pair: Pair, recipe: dict[str, Any]) -> Converted:
    job = vocabulary_job(root, pair.donor, pair.vocabulary, recipe)
    convert(job, WorkDir(Path(job.work_dir)), StopRequest())
    output = Path(job.output_dir)
    return Converted(
        pair,
        output / "payload",
        json.loads((output / "summary.json").read_text()),
        load_file(pair.donor / "model.safetensors"),
        {name: tensor for file in SHARDS for name, tensor in load_file(output / "payload" / file).items()},
        load_file(pair.vocabulary / "model.safetensors"),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    old, new = write_donor(root / "donor"), write_vocabulary(root / "vocabulary")
    return Pair(root / "donor", root / "vocabulary", old, new)


@pytest.fixture(scope="module")
def omp(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return run(tmp_path_factory.mktemp("omp"), pair, vocabulary_recipe())


@pytest.fixture(scope="module")
def subword(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Converted:
    root = tmp_path_factory.mktemp("subword")
    old, new = write_donor(root / "donor", tied=True), write_vocabulary(root / "vocabulary")
    tied = Pair(root / "donor", root / "vocabulary", old, new)
    with forks.below():
        return run(root, tied, vocabulary_recipe(tied=True, approximation_method="subword"))


def numpy_omp(target: np.ndarray, atoms: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Greedy orthogonal matching pursuit from its textbook: pick, refit by least squares, repeat."""
    chosen: list[int] = []
    coefficients = np.zeros(0)
    residual = target
    for _ in range(k):
        scores = np.abs(atoms @ residual)
        scores[chosen] = -1
        chosen.append(int(np.argmax(scores)))
        coefficients = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        residual = target - coefficients @ atoms[chosen]
    return chosen, coefficients


@pytest.mark.slow
@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_row_made_by_omp_is_that_of_an_independent_numpy_omp(omp: Converted, name: str):
    old, new = zip(*omp.shared().values(), strict=True)
    # Shared special roles are atoms as well: pad by its name, the ends of text by their role.
    specials = [
        (omp.pair.old.token_to_id(mine), omp.pair.new.token_to_id(theirs))
        for mine, theirs in (("<|pad|>", "<|pad|>"), ("<|im_end|>", "<|return|>"))
    ]
    pairs = sorted([*zip(old, new, strict=True), *specials], key=lambda ids: ids[1])
    atoms = omp.reference[name].double().numpy()[[theirs for _, theirs in pairs]]
    rows = omp.before[name].double().numpy()[[mine for mine, _ in pairs]]
    texts = np.random.default_rng(0).choice(omp.fresh(), 20, replace=False)
    for text in texts:
        number = omp.pair.new.token_to_id(str(text))
        chosen, coefficients = numpy_omp(omp.reference[name][number].double().numpy(), atoms, K)
        expected = coefficients @ rows[chosen]
        found = omp.after[name][number].double().numpy()
        # Stored in bf16: right to half a unit in its eighth bit, beside fp32's own error.
        assert np.allclose(found, expected, rtol=2**-8, atol=1e-4), text


@pytest.mark.slow
def test_tokens_of_both_vocabularies_have_the_very_bits_of_their_old_row(omp: Converted, subword: Converted):
    for made in (omp, subword):
        shared = made.shared()
        assert len(shared) > 900
        for name in {EMBEDDING, HEAD} & made.after.keys():
            for old, new in shared.values():
                assert torch.equal(made.after[name][new], made.before[name][old])


@pytest.mark.slow
def test_a_special_role_of_both_is_copied_whatever_its_name(omp: Converted):
    old, new = omp.pair.old.token_to_id, omp.pair.new.token_to_id
    assert torch.equal(omp.after[EMBEDDING][new("<|return|>")], omp.before[EMBEDDING][old("<|im_end|>")])
    assert torch.equal(omp.after[EMBEDDING][new("<|pad|>")], omp.before[EMBEDDING][old("<|pad|>")])


@pytest.mark.slow
def test_a_subword_row_is_the_mean_of_the_pieces_of_its_bytes(subword: Converted):
    """Also outside ASCII, where the usual tokenizer of the donor would read the byte characters as text."""
    matrix, decode = subword.before[EMBEDDING].float(), subword.pair.new.decode
    checked = 0
    for text in subword.fresh():
        number = subword.pair.new.token_to_id(text)
        words = decode([number])
        if "<|" in text or "\ufffd" in words:
            continue
        pieces = subword.pair.old.encode(words).ids
        expected = matrix[pieces].mean(dim=0)
        assert torch.allclose(subword.after[EMBEDDING][number].float(), expected, rtol=0.02, atol=0.01), text
        checked += not words.isascii()
    assert checked > 10


@pytest.mark.slow
def test_padding_is_the_mean_row_in_fp32(omp: Converted):
    for name in (EMBEDDING, HEAD):
        mean = omp.after[name][:TOKENS].float().mean(dim=0)
        assert omp.after[name].shape == (RESULT_ROWS, HIDDEN)
        padding = omp.after[name][TOKENS:]
        assert (padding == padding[0]).all()
        assert torch.allclose(padding[0].float(), mean, rtol=2**-8, atol=1e-7)


@pytest.mark.slow
def test_everything_else_is_the_donors(omp: Converted, subword: Converted):
    for made in (omp, subword):
        rest = made.before.keys() - {EMBEDDING, HEAD}
        assert made.after.keys() - {EMBEDDING, HEAD} == rest
        assert all(torch.equal(made.after[name], made.before[name]) for name in rest)
    assert HEAD in omp.after
    assert HEAD not in subword.after


@pytest.mark.slow
def test_only_size_and_special_ids_of_the_configuration_change(omp: Converted, subword: Converted):
    for made, tied in ((omp, False), (subword, True)):
        before = json.loads((made.pair.donor / "config.json").read_text())
        after = json.loads((made.payload / "config.json").read_text())
        assert after.pop("vocab_size") == RESULT_ROWS
        assert (after.pop("eos_token_id"), after.pop("pad_token_id")) == (TOKENS - 2, TOKENS - 3)
        assert "bos_token_id" not in after  # the new vocabulary has none; the old id names another token
        assert after == {key: before[key] for key in after}
        assert after["tie_word_embeddings"] is tied
        assert before.keys() - after.keys() == {"vocab_size", "eos_token_id", "bos_token_id"}
    generation = json.loads((omp.payload / "generation_config.json").read_text())
    assert generation == {"eos_token_id": TOKENS - 2, "pad_token_id": TOKENS - 3, "temperature": 0.6}


@pytest.mark.slow
def test_the_matrices_of_the_vocabulary_are_the_second_of_two_shards(omp: Converted):
    assert sorted(load_file(omp.payload / SHARDS[1])) == [HEAD, EMBEDDING]
    index = json.loads((omp.payload / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: SHARDS[name in (EMBEDDING, HEAD)] for name in omp.after}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in omp.after.values())


@pytest.mark.slow
def test_transformers_loads_the_result_with_the_new_tokenizer(omp: Converted, subword: Converted):
    for made in (omp, subword):
        model, report = AutoModelForCausalLM.from_pretrained(made.payload, output_loading_info=True)
        assert isinstance(model, Qwen3ForCausalLM)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = AutoTokenizer.from_pretrained(made.payload)
        text = "größer 你好 return"
        ids = tokenizer(text)["input_ids"]
        assert ids == made.pair.new.encode(text).ids
        with torch.no_grad():
            assert torch.isfinite(model(torch.tensor([ids])).logits).all()
        assert (tokenizer.eos_token_id, model.config.eos_token_id) == (TOKENS - 2, TOKENS - 2)


@pytest.mark.slow
def test_the_summary_says_what_was_done(omp: Converted):
    summary = omp.summary
    copied = summary["transform"]["copied_tokens"]
    assert copied == len(omp.shared()) + 2
    assert summary["transform"]["approximated_tokens"] == TOKENS - copied
    assert "--approximation-method=omp" in summary["transform"]["arguments"]
    assert [row["matrix"] for row in summary["layers"]] == [EMBEDDING, HEAD]
    failed = [name for name, check in summary["checks"].items() if not check["passed"]]
    assert failed == ["numeric_prompts"]  # this vocabulary is not o200k
    assert summary["provenance"]["student_spec"]["vocab_size"] == RESULT_ROWS


@pytest.mark.slow
def test_the_same_job_gives_the_same_bytes(omp: Converted, tmp_path: Path, forks: Forks):
    with forks.below():
        again = run(tmp_path, omp.pair, vocabulary_recipe())
    names = sorted(path.name for path in omp.payload.iterdir())
    assert names == sorted(path.name for path in again.payload.iterdir())
    assert all((omp.payload / name).read_bytes() == (again.payload / name).read_bytes() for name in names)


def refusal(tmp_path: Path, pair: Pair, recipe: dict[str, Any]) -> str:
    job = vocabulary_job(tmp_path, pair.donor, pair.vocabulary, recipe)
    with pytest.raises(ValueError, match=r".") as error:
        convert(job, WorkDir(Path(job.work_dir)), StopRequest())
    assert not (Path(job.output_dir) / "payload").exists()
    assert not (Path(job.work_dir) / "tokensurgeon.log").exists()
    return str(error.value)


def test_a_vocabulary_is_never_cut(tmp_path: Path, pair: Pair):
    message = refusal(tmp_path, pair, vocabulary_recipe(vocab_size=TOKENS - 1))
    assert f"has {TOKENS} rows, more than vocab_size = {TOKENS - 1}" in message


def test_a_donor_of_another_geometry_is_refused_before_any_work(tmp_path: Path, pair: Pair):
    recipe = vocabulary_recipe()
    recipe["donor"]["rope_theta"] = 1e4
    assert "rope_theta: 10000.0 expected, 1000000.0 found" in refusal(tmp_path, pair, recipe)


def test_a_vocabulary_donor_of_another_width_is_refused(tmp_path: Path, pair: Pair):
    recipe = vocabulary_recipe() | {"vocabulary_hidden_size": 64}
    assert "expected rows of width 64" in refusal(tmp_path, pair, recipe)


def test_a_missing_tokenizer_is_named(tmp_path: Path, pair: Pair):
    copy = tmp_path / "vocabulary"
    copy.mkdir()
    for path in pair.vocabulary.iterdir():
        if path.name != "tokenizer.json":
            (copy / path.name).symlink_to(path)
    bare = Pair(pair.donor, copy, pair.old, pair.new)
    assert "tokenizer.json: no such file" in refusal(tmp_path, bare, vocabulary_recipe())


def test_more_atoms_than_dimensions_are_refused(tmp_path: Path, pair: Pair):
    job = vocabulary_job(tmp_path, pair.donor, pair.vocabulary, vocabulary_recipe(k=41))
    with pytest.raises(ConfigError, match=r"surgery.k = 41 atoms are more than the 40"):
        job.convert_recipe()
