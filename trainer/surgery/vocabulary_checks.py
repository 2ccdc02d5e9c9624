"""What a checkpoint with a new vocabulary is held to, by tokenizers and bytes, not by the tool's word."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.contract.donor import HF_EMBEDDING, HF_HEAD
from trainer.contract.schema.rungs.vocabulary import VocabularyRecipe
from trainer.surgery.step import Verdict
from trainer.surgery.tokens import TOKENIZER_NAME, Vocabulary, piece_ids, shared_rows
from trainer.surgery.weights import WeightsReader, shown_differences

SAMPLE = 512
"""Approximated tokens whose rows are computed again."""

NUMERIC_PROMPTS: dict[str, tuple[int, ...]] = {
    "1 2 3 4 5": (16, 220, 17, 220, 18, 220, 19, 220, 20),
    "1234567890": (7633, 19354, 29338, 15),
    "1.2345e-10": (16, 13, 20771, 20, 68, 12, 702),
    "2025-08-05": (1323, 20, 12, 3062, 12, 2922),
    "1/3 = 0.333...": (16, 14, 18, 314, 220, 15, 13, 15517, 1008),
}
"""Strings whose o200k ids are known; numbers are what a wrong vocabulary breaks first."""

_SPECIAL = ("bos", "eos", "pad")
_BLOCK_ROWS = 16_384


def with_special_ids(
    config: Mapping[str, Any], other_config: Mapping[str, Any], after: Vocabulary
) -> dict[str, Any]:
    """Return a configuration with the new vocabulary's special ids; one that it does not have is dropped.

    Args:
        config: With the old vocabulary's ids.
        other_config: Of the vocabulary's model; what it says counts more than its tokenizer's roles.
        after: The new vocabulary.
    """
    updated = dict(config)
    for role in _SPECIAL:
        key = f"{role}_token_id"
        number = other_config.get(key)
        number = after.role_id(role) if number is None else number
        if number is None:
            updated.pop(key, None)  # the old id would name some other token
        else:
            updated[key] = number
    return updated


def config_update(
    config: Mapping[str, Any], other_config: Mapping[str, Any], after: Vocabulary, recipe: VocabularyRecipe
) -> dict[str, Any]:
    """Return the donor's configuration over the new vocabulary: size and special ids change, nothing else."""
    return {**with_special_ids(config, other_config, after), "vocab_size": recipe.vocab_size}


def vocabulary_rows(
    source: WeightsReader,
    result: WeightsReader,
    other_config: Mapping[str, Any],
    after: Vocabulary,
    recipe: VocabularyRecipe,
) -> Verdict:
    """`vocab_size` and rows agree, the head is tied or not as before, the config is otherwise kept."""
    tied = recipe.donor.tie_word_embeddings
    wanted = [HF_EMBEDDING] if tied else [HF_EMBEDDING, HF_HEAD]
    rows = {name: result.specs[name].shape[0] for name in (HF_EMBEDDING, HF_HEAD) if name in result}
    wrong = shown_differences(config_update(source.config, other_config, after, recipe), result.config)
    sizes = {result.config.get("vocab_size"), *rows.values()}
    passed = sizes == {recipe.vocab_size} and sorted(rows) == sorted(wanted) and not wrong
    return Verdict(
        passed,
        f"vocab_size = {result.config.get('vocab_size')}, rows {rows}, "
        f"{'tied' if tied else 'untied'} head" + (f"; configuration: {wrong}" if wrong else ""),
        {"vocab_size": recipe.vocab_size, "tokens": len(after.ids)},
    )


def shared_tokens_copied(
    source: WeightsReader, result: WeightsReader, before: Vocabulary, after: Vocabulary
) -> Verdict:
    """Every token of both vocabularies has the donor's very row, bit for bit."""
    shared = shared_rows(before, after)
    new_rows, old_rows = torch.tensor(list(shared)), torch.tensor(list(shared.values()))
    differing: dict[str, int] = {}
    for name in (HF_EMBEDDING, HF_HEAD):
        if name in result:
            ours, theirs = _bits(result.read(name)), _bits(source.read(name))
            differing[name] = sum(
                int((ours[new] != theirs[old]).any(dim=1).sum())
                for new, old in zip(new_rows.split(_BLOCK_ROWS), old_rows.split(_BLOCK_ROWS), strict=True)
            )
    return Verdict(
        bool(shared) and not any(differing.values()),
        f"{len(shared)} of {len(after.ids)} tokens are the donor's too; "
        f"rows that are not its bits: {differing}",
        {"shared": len(shared), "differing_rows": sum(differing.values())},
    )


def rest_copied(source: WeightsReader, result: WeightsReader) -> Verdict:
    """Every tensor without a row for each token has the donor's bytes."""
    names = [name for name in source.names if name not in (HF_EMBEDDING, HF_HEAD)]
    wrong = [
        name for name in names if name not in result or result.digest(name) != source.digest(name)
    ] + sorted(set(result.names) - set(names) - {HF_EMBEDDING, HF_HEAD})
    return Verdict(
        not wrong, f"{len(names)} other tensors, {len(wrong)} of them not the donor's", {"wrong": wrong[:10]}
    )


def new_rows(
    source: WeightsReader,
    result: WeightsReader,
    before: Vocabulary,
    after: Vocabulary,
    recipe: VocabularyRecipe,
    seed: int,
) -> Verdict:
    """Return a sample of the other rows, computed again from the donor's rows where the method allows it.

    `omp` and `common_interpolation` need all shared rows for each token, so of theirs only that they are
    finite and not all zero is looked at.
    """
    shared, method = shared_rows(before, after), recipe.surgery.approximation_method
    new = sorted((row, text) for text, row in after.ids.items() if row not in shared)
    if not new:
        return Verdict(True, "the donor has every token", {"sample": 0})
    generator = torch.Generator().manual_seed(seed)
    chosen = [new[int(at)] for at in torch.randperm(len(new), generator=generator)[:SAMPLE]]
    worst = 0.0
    for name in (HF_EMBEDDING, HF_HEAD):
        if name not in result:
            continue
        ours, theirs = result.read(name), source.read(name)
        found = ours[[row for row, _ in chosen]].float()
        scale = theirs.float().square().mean().sqrt()
        if (expected := _expected_rows(theirs, before, [text for _, text in chosen], recipe)) is None:
            alive = bool(torch.isfinite(found).all()) and bool((found != 0).any())
            worst = max(worst, 0.0 if alive else float("inf"))
        else:
            worst = max(worst, float((found - expected).abs().max() / scale))
    # Pieces are added up in the stored type, so a bf16 row is right to a few of its last bits.
    tolerance = 0.05 if source.specs[HF_EMBEDDING].dtype != torch.float32 else 1e-4
    passed = worst <= tolerance
    return Verdict(
        passed,
        f"{len(chosen)} of {len(new)} rows made by {method!r}: largest deviation {worst:.2g} of a row's rms",
        {"sample": len(chosen), "worst": worst if passed else str(worst), "tolerance": tolerance},
    )


def padding_rows(result: WeightsReader, after: Vocabulary, recipe: VocabularyRecipe) -> Verdict:
    """Rows without a token are the mean of the rows with one."""
    worst = 0.0
    for name in (HF_EMBEDDING, HF_HEAD):
        if name in result and recipe.vocab_size > after.rows:
            matrix = result.read(name)
            mean = matrix[: after.rows].double().mean(dim=0)
            worst = max(worst, float((matrix[after.rows :].double() - mean).abs().max() / mean.abs().max()))
    return Verdict(
        worst <= 2**-7,
        f"{recipe.vocab_size - after.rows} rows of padding, "
        f"off the mean row by {worst:.2g} of its largest value",
        {"rows": recipe.vocab_size - after.rows},
    )


def numeric_prompts(payload: Path) -> Verdict:
    """Return the delivered tokenizer turns the numeric prompts into their known ids, and back."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(payload / TOKENIZER_NAME))
    wrong = []
    for text, ids in NUMERIC_PROMPTS.items():
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if tuple(found) != ids or tokenizer.decode(found, skip_special_tokens=False) != text:
            wrong.append(f"{text!r} → {found}, expected {list(ids)}")
    return Verdict(
        not wrong,
        "; ".join(wrong) or f"{len(NUMERIC_PROMPTS)} prompts have their o200k ids and decode to themselves",
        {"prompts": len(NUMERIC_PROMPTS), "wrong": len(wrong)},
    )


def _expected_rows(
    matrix: torch.Tensor, before: Vocabulary, texts: list[str], recipe: VocabularyRecipe
) -> torch.Tensor | None:
    surgery = recipe.surgery
    if surgery.prefix_match or surgery.byte_match:
        return None
    if surgery.approximation_method == "zero":
        return torch.zeros(len(texts), matrix.shape[1])
    if surgery.approximation_method == "mean":
        return matrix.float().mean(dim=0).expand(len(texts), -1)
    if surgery.approximation_method == "subword" and surgery.subword_method == "mean":
        return torch.stack([matrix[piece_ids(before, text)].float().mean(dim=0) for text in texts])
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
