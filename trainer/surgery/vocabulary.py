"""The donor with another model's vocabulary: mergekit's tokensurgeon makes the rows, the rest is copied.

tokensurgeon reads two checkpoints. What it is given are two small views of them:

* of the donor, its embedding without its layers, and its tokenizer without a pre-tokenizer. tokensurgeon
  hands that tokenizer the *byte-level characters* of a token, and the usual pre-tokenizer would take those
  for text and encode them a second time, so that every token outside ASCII would get the row of other bytes;
* of the vocabulary's model, embedding, head and tokenizer under the name of an architecture that tokensurgeon
  knows; it knows no GPT-OSS.

The rows that come back are padded to `vocab_size` with their mean.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.format import CONFIG_NAME, shard_name, write_index
from trainer.contract.donor import HF_EMBEDDING, HF_FINAL_NORM, HF_HEAD
from trainer.contract.schema.rungs.vocabulary import VocabularyRecipe
from trainer.surgery import vocabulary_checks as checks
from trainer.surgery.donor import require_donor
from trainer.surgery.program import run_program
from trainer.surgery.step import Conversion, Outcome
from trainer.surgery.tensorfile import TensorFileWriter, TensorSpec, WeightsError
from trainer.surgery.tokens import (
    ROLES,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    Vocabulary,
    read_vocabulary,
    shared_rows,
)
from trainer.surgery.weights import WeightsReader

MODULE = "mergekit.scripts.tokensurgeon"
GENERATION_NAME = "generation_config.json"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
}
_BLOCK_ROWS = 16_384


def convert(conversion: Conversion, out: Path) -> Outcome:
    """Fill `out` with a Hugging Face checkpoint: the donor over the other vocabulary.

    Args:
        conversion: Inputs are the donor and the vocabulary's model.
        out: Empty directory.

    Raises:
        WeightsError: An input is not what the recipe says, or the vocabulary does not fit `vocab_size`.
        ProgramError: Tokensurgeon failed.
    """
    recipe = _recipe(conversion)
    with WeightsReader(conversion.source) as source, WeightsReader(_donor_of(conversion)) as other:
        require_donor(source, recipe.donor)
        _require_vocabulary(other, recipe)
        before = read_vocabulary(source.directory, source.config)
        after = read_vocabulary(other.directory, other.config)
        _require_room(before, after, recipe)
        arguments = _program_arguments(conversion)
        views = (conversion.scratch / "donor", conversion.scratch / "vocabulary", conversion.scratch / "rows")
        _write_donor_view(views[0], source, before, recipe)
        _write_vocabulary_view(views[1], other, after)
        _run(conversion, [*map(str, views), *arguments])
        shared = shared_rows(before, after)
        with WeightsReader(views[2]) as rows:
            layers = _write_weights(conversion, source, rows, after, shared, out)
        _write_config(source, after, other.config, recipe, out)
        shutil.copyfile(other.directory / TOKENIZER_NAME, out / TOKENIZER_NAME)
        _copy_tokenizer_config(other.directory, after, out)
    listed = ",".join(f"{row}:{shared[row]}" for row in sorted(shared))
    return Outcome(
        transform={
            "tool": recipe.surgery.tool,
            "tool_version": version("mergekit"),
            "arguments": arguments,
            "copied_tokens": len(shared),
            "approximated_tokens": len(after.ids) - len(shared),
            "padding_rows": recipe.vocab_size - after.rows,
            "padding": "mean row (fp32 mean, cast)",
            "shared_rows_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        },
        layers=layers,
    )


def check(conversion: Conversion, payload: Path, outcome: Outcome) -> None:
    """Compare the result with both inputs, by their tokenizers and bytes; see `.vocabulary_checks`."""
    recipe = _recipe(conversion)
    with (
        WeightsReader(conversion.source) as source,
        WeightsReader(_donor_of(conversion)) as other,
        WeightsReader(payload) as result,
    ):
        before = read_vocabulary(source.directory, source.config)
        after = read_vocabulary(payload, result.config)
        outcome.checks |= {
            "vocabulary_rows": checks.vocabulary_rows(source, result, other.config, after, recipe),
            "shared_tokens_copied": checks.shared_tokens_copied(source, result, before, after),
            "rest_copied": checks.rest_copied(source, result),
            "new_rows": checks.new_rows(source, result, before, after, recipe, conversion.seed),
            "padding_rows": checks.padding_rows(result, after, recipe),
            "numeric_prompts": checks.numeric_prompts(payload),
        }


def _recipe(conversion: Conversion) -> VocabularyRecipe:
    assert isinstance(conversion.recipe, VocabularyRecipe)
    return conversion.recipe


def _donor_of(conversion: Conversion) -> Path:
    return conversion.inputs[_recipe(conversion).vocabulary]


def _require_vocabulary(reader: WeightsReader, recipe: VocabularyRecipe) -> None:
    for name in (HF_EMBEDDING, HF_HEAD):
        if name not in reader:
            raise WeightsError(f"{reader.directory}: no tensor {name}; the vocabulary's model must have it")
        shape = reader.specs[name].shape
        if len(shape) != 2 or shape[1] != recipe.vocabulary_hidden_size:
            raise WeightsError(
                f"{reader.directory}: {name} is {list(shape)}; expected rows of width "
                f"{recipe.vocabulary_hidden_size}, as the recipe says"
            )


def _require_room(before: Vocabulary, after: Vocabulary, recipe: VocabularyRecipe) -> None:
    if after.rows > recipe.vocab_size:
        raise WeightsError(
            f"the tokenizer of {recipe.vocabulary} has {after.rows} rows, more than vocab_size = "
            f"{recipe.vocab_size}; rows are added, never cut. Set vocab_size to at least {after.rows}"
        )
    if before.rows > recipe.donor.vocab_size:
        raise WeightsError(
            f"the tokenizer of {recipe.source} has {before.rows} rows, its embedding only "
            f"{recipe.donor.vocab_size}; they do not belong together"
        )


def _program_arguments(conversion: Conversion) -> list[str]:
    """Return tokensurgeon's arguments after its three directories; other options keep their defaults."""
    surgery = _recipe(conversion).surgery
    return [
        f"--approximation-method={surgery.approximation_method}",
        f"--k={surgery.k}",
        f"--subword-method={surgery.subword_method}",
        f"--weight-scheme={surgery.weight_scheme}",
        "--cosine-similarity" if surgery.cosine_similarity else "--no-cosine-similarity",
        f"--prefix-match={'yes' if surgery.prefix_match else 'no'}",
        f"--byte-match={'yes' if surgery.byte_match else 'no'}",
        f"--batch-size={surgery.batch_size}",
        f"--random-seed={conversion.seed}",
        f"--device={conversion.device.type}",
        "-v",
    ]


def _run(conversion: Conversion, arguments: list[str]) -> None:
    log = conversion.work.path / "tokensurgeon.log"
    conversion.work.at("tokensurgeon", 0)
    size = 0

    def beat() -> None:
        nonlocal size
        conversion.check_stop()
        if log.stat().st_size > size:  # its progress bars write a line for each batch
            size = log.stat().st_size
            conversion.work.at("tokensurgeon", size)

    run_program(MODULE, arguments, log=log, environment=_OFFLINE, beat=beat)


def _write_donor_view(
    directory: Path, source: WeightsReader, vocabulary: Vocabulary, recipe: VocabularyRecipe
) -> None:
    directory.mkdir()
    names = [HF_EMBEDDING, HF_FINAL_NORM] + [HF_HEAD] * (not recipe.donor.tie_word_embeddings)
    _write_file(directory / "model.safetensors", source, names)
    config = {**source.config, "num_hidden_layers": 0}
    config.pop("layer_types", None)
    _write_json(directory / CONFIG_NAME, config)
    content = {
        **vocabulary.content,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "Ġ"},
        "pre_tokenizer": None,
    }
    _write_json(directory / TOKENIZER_NAME, content)
    _write_json(directory / TOKENIZER_CONFIG_NAME, _tokenizer_config(vocabulary))


def _write_vocabulary_view(directory: Path, other: WeightsReader, vocabulary: Vocabulary) -> None:
    directory.mkdir()
    _write_file(directory / "model.safetensors", other, [HF_EMBEDDING, HF_HEAD])
    rows, hidden = other.specs[HF_EMBEDDING].shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 0,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "tie_word_embeddings": False,
        **{f"{role}_token_id": vocabulary.role_id(role) for role in ("bos", "eos", "pad")},
    }
    _write_json(directory / CONFIG_NAME, config)
    shutil.copyfile(other.directory / TOKENIZER_NAME, directory / TOKENIZER_NAME)
    _write_json(directory / TOKENIZER_CONFIG_NAME, _tokenizer_config(vocabulary))


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Roles and no class of its own: such a tokenizer is what `tokenizer.json` says and nothing else."""
    roles = {f"{role}_token": vocabulary.roles.get(role) for role in ROLES}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}


def _write_file(path: Path, reader: WeightsReader, names: list[str]) -> None:
    writer = TensorFileWriter(path, {name: reader.specs[name] for name in names})
    try:
        for name in names:
            writer.write(name, reader.read(name))
    except BaseException:
        writer.abandon()
        raise
    writer.finish()


def _write_weights(
    conversion: Conversion,
    source: WeightsReader,
    rows: WeightsReader,
    after: Vocabulary,
    shared: Mapping[int, int],
    out: Path,
) -> list[dict[str, Any]]:
    """Two shards: everything else first, then the matrices with a row for each token.

    Returns:
        The report: one row for each matrix.
    """
    recipe = _recipe(conversion)
    matrices = [HF_EMBEDDING] + [HF_HEAD] * (not recipe.donor.tie_word_embeddings)
    rest = [name for name in source.names if name not in (HF_EMBEDDING, HF_HEAD)]
    files = [(shard_name(1, 2), rest), (shard_name(2, 2), matrices)]
    specs = {name: source.specs[name] for name in rest}
    for name in matrices:
        spec = source.specs[name]
        specs[name] = TensorSpec((recipe.vocab_size, spec.shape[1]), spec.dtype)
    report = []
    with conversion.phase("convert", len(specs)) as tick:
        for file, names in files:
            writer = TensorFileWriter(out / file, {name: specs[name] for name in names})
            try:
                for name in names:
                    if name in matrices:
                        made = _made_rows(rows, name, after, source.specs[name])
                        writer.write(name, padded(made, recipe.vocab_size))
                        report.append(_report(name, made, after, shared, recipe))
                    else:
                        writer.write(name, source.read(name))
                    tick(name)
            except BaseException:
                writer.abandon()
                raise
            writer.finish()
    weight_map = {name: file for file, names in files for name in names}
    write_index(out, weight_map, sum(spec.nbytes for spec in specs.values()))
    return report


def _made_rows(rows: WeightsReader, name: str, after: Vocabulary, spec: TensorSpec) -> torch.Tensor:
    if name not in rows:
        raise WeightsError(f"tokensurgeon wrote no {name}; see its log in the work directory")
    made = rows.read(name)
    expected = (after.rows, spec.shape[1])
    if tuple(made.shape) != expected or made.dtype != spec.dtype:
        raise WeightsError(
            f"tokensurgeon made {name} as {made.dtype} {list(made.shape)}; "
            f"expected {spec.dtype} {list(expected)}"
        )
    if not torch.isfinite(torch.stack(torch.aminmax(made))).all():
        raise WeightsError(f"tokensurgeon made NaN or infinity in {name}")
    return made


def mean_row(matrix: torch.Tensor) -> torch.Tensor:
    """Return the mean of the rows, fp32 `[H]`; summed in fp64 blocks, so that threads do not change it."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for start in range(0, matrix.shape[0], _BLOCK_ROWS):
        total += matrix[start : start + _BLOCK_ROWS].double().sum(dim=0)
    return (total / matrix.shape[0]).float()


def padded(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the matrix with its mean row, cast to its type, appended until it has `rows` rows.

    Raises:
        WeightsError: It has more already.
    """
    missing = rows - matrix.shape[0]
    if missing < 0:
        raise WeightsError(f"a matrix of {matrix.shape[0]} rows is not cut to {rows}; rows are only added")
    filler = mean_row(matrix).to(matrix.dtype).expand(missing, -1)
    return torch.cat([matrix, filler])


def _report(
    name: str, made: torch.Tensor, after: Vocabulary, shared: Mapping[int, int], recipe: VocabularyRecipe
) -> dict[str, Any]:
    def rms(indices: list[int]) -> float | None:
        if not indices:
            return None
        chosen = torch.tensor(indices)
        total = sum(made[part].double().square().sum().item() for part in chosen.split(_BLOCK_ROWS))
        return float((total / (len(indices) * made.shape[1])) ** 0.5)

    new = [row for row in after.ids.values() if row not in shared]
    return {
        "matrix": name,
        "rows": recipe.vocab_size,
        "copied": len(shared),
        "approximated": len(new),
        "padding": recipe.vocab_size - after.rows,
        "rms_copied": rms(list(shared)),
        "rms_approximated": rms(new),
        "zero_rows": int((made == 0).all(dim=1).sum()),
    }


def _write_config(
    source: WeightsReader,
    after: Vocabulary,
    other_config: Mapping[str, Any],
    recipe: VocabularyRecipe,
    out: Path,
) -> None:
    update = checks.config_update(source.config, other_config, after, recipe)
    _write_json(out / CONFIG_NAME, update)
    generation = source.directory / GENERATION_NAME
    if generation.is_file():
        stated = json.loads(generation.read_text(encoding="utf-8"))
        _write_json(out / GENERATION_NAME, checks.with_special_ids(stated, other_config, after))


def _copy_tokenizer_config(directory: Path, after: Vocabulary, out: Path) -> None:
    given = directory / TOKENIZER_CONFIG_NAME
    if given.is_file():
        shutil.copyfile(given, out / TOKENIZER_CONFIG_NAME)
    else:
        _write_json(out / TOKENIZER_CONFIG_NAME, _tokenizer_config(after))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
