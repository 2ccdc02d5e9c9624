"""One token after the other from either kind of model, each with a cache of its own making."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer.decoding.cache import DecodingCache, next_logits
from trainer.model.gpt import VPGPTModel


class Decoder(ABC):
    """A batch of sequences under way: first `prefill`, then any number of `step` and `keep`.

    Attributes:
        vocab_size: Columns of the logits.
        context: Longest sequence in tokens.
    """

    vocab_size: int
    context: int

    @abstractmethod
    def prefill(self, prompts: Sequence[Sequence[int]], reserve: int) -> torch.Tensor:
        """Run prompts of any lengths.

        Args:
            prompts: Token ids, each at least one.
            reserve: Length that the longest sequence may reach, to make room once.

        Returns:
            fp32 `[B, V]`, logits after each prompt.
        """

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each sequence; the fp32 logits `[B, V]` after it."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences, in this order; one may be named several times."""


class CachedDecoder(Decoder):
    """One of our models.

    Args:
        model: In any tensor-parallel layout; every rank of it takes part and gets the whole logits.

    Raises:
        NotImplementedError: Experts are spread over ranks.
    """

    def __init__(self, model: VPGPTModel) -> None:
        refuse_spread_experts(model)
        self._model = model
        self._device = model.head_weight.device
        self._cache: DecodingCache | None = None
        self.vocab_size = model.vocab_size
        self.context = model.max_sequence_length

    def prefill(self, prompts: Sequence[Sequence[int]], reserve: int) -> torch.Tensor:
        """Run prompts, padded on the right."""
        width = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        self._cache = DecodingCache(len(prompts), reserve=reserve)
        return next_logits(self._model, self._cache, tokens.to(self._device), [len(row) for row in prompts])

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each sequence."""
        assert self._cache is not None
        return next_logits(
            self._model, self._cache, torch.tensor(tokens, dtype=torch.int64, device=self._device)[:, None]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences."""
        assert self._cache is not None
        self._cache.select(rows)


def refuse_spread_experts(model: VPGPTModel) -> None:
    """Refuse to generate with a model whose experts are on several ranks.

    Raises:
        NotImplementedError: They are.
    """
    if model.pg_collection.ep.size() > 1:
        raise NotImplementedError(
            f"generation with experts spread over {model.pg_collection.ep.size()} ranks: sequences end at "
            "different steps on different ranks, which would wait for each other; load the model with ep = 1"
        )


class HuggingFaceDecoder(Decoder):
    """A causal language model of `transformers`, with that library's cache.

    Prompts are padded on the left, hidden by the attention mask, and positions are given explicitly.

    Args:
        model: An `AutoModelForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        head = model.get_output_embeddings()
        self._device = head.weight.device
        self.vocab_size = head.weight.shape[0]
        self.context = int(model.config.max_position_embeddings)
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: Any = None
        self._mask: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None

    def prefill(self, prompts: Sequence[Sequence[int]], reserve: int) -> torch.Tensor:
        """Run prompts, padded on the left."""
        from transformers import DynamicCache

        del reserve  # its cache grows by itself
        width = max(map(len, prompts))
        tokens = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts])
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        places = torch.arange(width, device=self._device) - (width - self._lengths[:, None])
        self._mask = (places >= 0).long()
        self._cache = DynamicCache(config=self._model.config)
        return self._run(tokens.to(self._device), places.clamp(min=0))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each sequence."""
        assert self._mask is not None
        assert self._lengths is not None
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        positions = self._lengths[:, None]
        self._lengths = self._lengths + 1
        return self._run(torch.tensor(tokens, device=self._device)[:, None], positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences."""
        assert self._mask is not None
        assert self._lengths is not None
        index = torch.tensor(rows, device=self._device)
        self._mask, self._lengths = self._mask[index], self._lengths[index]
        self._cache.batch_select_indices(index)

    @torch.no_grad()
    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: self._cache},
            **self._last_only,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


def open_decoder(model: nn.Module) -> Decoder:
    """Return a decoder for a model of ours or of `transformers`.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(model, VPGPTModel):
        return CachedDecoder(model)
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return HuggingFaceDecoder(model)
    raise TypeError(
        f"cannot generate with a {type(model).__name__}: expected a VPGPTModel or a transformers model"
    )
