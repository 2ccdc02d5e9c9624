"""One interface over the two kinds of checkpoint; `trainer.evaluate.opening` opens them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.schema.architecture import Architecture
from trainer.model.chunked_head import cached_rows

_CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at a time: 64 MiB and 1 GiB of float32


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

    def head_logits(
        self, hidden: Tensor, *, out: Tensor | None = None, columns: slice = slice(None)
    ) -> Tensor:
        """Logits `[T, V]` of hidden states `[T, H]`, in float32 whatever the weights' type.

        Args:
            hidden: Hidden states.
            out: Where to write them, float32 `[T, V]`; new memory by default.
            columns: Tokens whose logits are computed; all by default.
        """
        weight, bias = self.head
        weight = weight[columns]
        if weight.dtype != torch.float32 and weight.device.type == "cuda":
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32, out=out)
        else:
            logits = torch.mm(hidden.float(), weight.float().t(), out=out)
        return logits if bias is None else logits.add_(bias[columns].float())

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
            for rows in cached_rows(logits):
                some, target = logits[rows], wanted[rows]
                chosen = some.gather(1, target[:, None]).squeeze(1)
                largest, first = some.max(dim=1)
                # In place: the vocabulary is large, and a second buffer costs as much as the product.
                total = some.sub_(largest[:, None]).exp_().sum(dim=1)
                logprobs.append(chosen - largest - total.log_())
                greedy.append(first == target)
        if not logprobs:
            return torch.empty(0), torch.empty(0, dtype=torch.bool)
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
