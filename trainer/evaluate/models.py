"""One interface over the two kinds of checkpoint: Hugging Face directories and our published weights."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.evaluate import Dtype, HuggingFaceCheckpoint, MegatronCheckpoint
from trainer.errors import EvaluationError

CONFIG_NAME = "config.json"
_CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at a time: 64 MiB and 1 GiB of float32
_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LanguageModel(ABC):
    """A causal language model to measure: weights, in evaluation mode and without gradients, and tokenizer.

    Rows are right-padded, so that a causal mask alone keeps padding out; what stands at padded positions, in
    and out, has no meaning. Logits of a whole batch are never made unless asked for: measurements take hidden
    states at the positions they need and turn them into scores a chunk at a time.

    Attributes:
        name: Object that the weights belong to, for messages and reports.
        path: Directory of the checkpoint.
        kind: Format of the checkpoint.
        module: The network itself, for those who decode with its cache.
        tokenizer: Its tokenizer.
        device: Where the weights are.
        dtype: Type of weights and activations.
        vocab_size: Rows of the output head; the tokenizer may use fewer.
        context: Longest row in tokens.
        shares_prefixes: Whether `hidden_trees` is available.
    """

    kind: Literal["huggingface", "megatron"]
    module: nn.Module
    tokenizer: Tokenizer
    vocab_size: int
    context: int
    shares_prefixes: bool = False

    def __init__(self, name: str, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.path, self.device, self.dtype = name, path, device, dtype

    @abstractmethod
    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return final hidden states (after the last norm) of plain rows.

        Args:
            tokens: int64 `[B, S]`; ids at padded positions must be valid.
            lengths: int64 `[B]`, tokens of each row.

        Returns:
            `[B, S, H]` on the model's device.
        """

    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Return final hidden states of rows in which several continuations share one prefix.

        A token sees the earlier tokens of its row that belong to branch 0 (the prefix) or to its own branch.

        Args:
            tokens: int64 `[B, S]`: prefix, then one continuation after the other, then padding.
            positions: int64 `[B, S]`, position of each token in prefix + own continuation.
            branch: int64 `[B, S]`: 0 prefix, 1… continuations, -1 padding.

        Returns:
            `[B, S, H]`.

        Raises:
            NotImplementedError: `shares_prefixes` is false.
        """
        raise NotImplementedError(f"{self.kind} checkpoint {self.name}: score each continuation as a row")

    @property
    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, H]` and bias `[V]` (or None) of the output head."""

    @property
    def architecture(self) -> Architecture | None:
        """Geometry of one of our checkpoints; None for others."""
        return None

    def head_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Logits `[T, V]` of hidden states `[T, H]`, in float32 whatever the weights' type.

        Args:
            hidden: Hidden states.
            out: Where to write them, float32 `[T, V]`; new memory by default.
        """
        weight, bias = self.head
        if weight.dtype != torch.float32 and weight.device.type == "cuda":
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32, out=out)
        else:
            logits = torch.mm(hidden.float(), weight.float().t(), out=out)
        return logits if bias is None else logits.add_(bias.float())

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits `[B, S, V]` float32 of plain rows: for small batches and for tests."""
        hidden = self.hidden(tokens, lengths)
        return self.head_logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits `[B, V]` float32 after the last token of each row."""
        hidden = self.hidden(tokens, lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head_logits(hidden[rows, lengths.to(hidden.device) - 1])

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of one target at each of some hidden states, in chunks.

        Args:
            hidden: `[T, H]`.
            targets: int64 `[T]`.

        Returns:
            `(logprob [T] float32, greedy [T] bool)` on the CPU; `greedy` says whether the target is the
            Most probable token (of equal ones, the first).
        """
        size = max(1, _CHUNK_LOGITS[self.device.type] // self.vocab_size)
        targets = targets.to(self.device)
        # One buffer for all chunks: pages of fresh memory cost a CPU as much as the product itself.
        buffer = torch.empty(min(size, len(targets)), self.vocab_size, device=self.device)
        logprobs, greedy = [], []
        for start in range(0, len(targets), size):
            wanted = targets[start : start + size]
            logits = self.head_logits(hidden[start : start + size], out=buffer[: len(wanted)])
            chosen = logits.gather(1, wanted[:, None]).squeeze(1)
            largest, first = logits.max(dim=1)
            # In place: the vocabulary is large, and a second buffer costs as much as the product.
            total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
            logprobs.append(chosen - largest - total.log_())
            greedy.append(first == wanted)
        if not logprobs:
            return torch.empty(0), torch.empty(0, dtype=torch.bool)
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()


def open_model(
    path: Path,
    *,
    name: str,
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    expected: HuggingFaceCheckpoint | MegatronCheckpoint | None = None,
    tokenizer: Path | None = None,
) -> LanguageModel:
    """Open a checkpoint of either kind.

    Args:
        path: Directory with a `config.json`.
        name: Object that it is.
        device: Where to put it.
        dtype: Type to compute in.
        expected: What the experiment says of it; a checkpoint that differs is refused.
        tokenizer: Directory of the o200k rank file; needed for our own checkpoints.

    Raises:
        EvaluationError: It is neither kind, or differs from what is expected.
        PublishedError: See `trainer.evaluate.megatron.MegatronModel`.
    """
    from trainer.checkpoints.published import SCHEMA
    from trainer.evaluate.huggingface import HuggingFaceModel
    from trainer.evaluate.megatron import MegatronModel

    device = torch.device(device)
    config = _read_config(path)
    if config.get("schema") == SCHEMA:
        if isinstance(expected, HuggingFaceCheckpoint):
            raise EvaluationError(
                f"{name}: a Hugging Face checkpoint is expected, {path} is a published one of ours"
            )
        if tokenizer is None:
            raise EvaluationError(
                f"{name}: {path} has token ids of o200k; give the input o200k_tokenizer to evaluate it"
            )
        return MegatronModel(
            name,
            path,
            device,
            _DTYPES[dtype],
            tokenizer=tokenizer,
            architecture=None if expected is None else expected.architecture,
        )
    if "model_type" not in config:
        raise EvaluationError(
            f"{path / CONFIG_NAME} has neither schema {SCHEMA!r} nor a model_type: not a known checkpoint"
        )
    if isinstance(expected, MegatronCheckpoint):
        raise EvaluationError(
            f"{name}: one of our published checkpoints is expected, {path} is a Hugging Face directory"
        )
    if expected is not None and expected.geometry is not None:
        _check_geometry(name, path, config, dict(expected.geometry))
    return HuggingFaceModel(name, path, device, _DTYPES[dtype])


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds weights of either kind."""
    return (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path} holds no {CONFIG_NAME}: it is not a checkpoint") from None
    except ValueError as error:
        raise EvaluationError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"{file} holds a {type(config).__name__}, not a table")
    return config


def _check_geometry(name: str, path: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = {key: _lookup(config, key) for key in expected}
    wrong = [
        f"{key}: {found[key]!r} found, {expected[key]!r} expected"
        for key in sorted(expected)
        if found[key] != expected[key]
    ]
    if wrong:
        raise EvaluationError(
            f"{name}: {path / CONFIG_NAME} is not what the experiment says: {'; '.join(wrong)}"
        )


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    """Return a value of a Hugging Face config; newer files keep the rotary base in a table of its own."""
    return next(_values(config, key), None)


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    if key in config:
        yield config[key]
    for table in ("rope_parameters", "rope_scaling"):
        nested = config.get(table)
        if isinstance(nested, Mapping) and key in nested:
            yield nested[key]
