"""Our own published checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoints.published import load_published, read_architecture
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.geometry import geometry
from trainer.contract.schema.architecture import Architecture
from trainer.decoding.cache import DecodingCache, extend
from trainer.evaluate.models import LanguageModel
from trainer.model.document_mask import PADDING
from trainer.model.gpt import VPGPTModel, build_model
from trainer.model.init import require_filled


class MegatronModel(LanguageModel):
    """One of our published checkpoints, built through the same configuration path as training.

    Args:
        name: Object.
        path: Directory of the published checkpoint.
        device: Where to put it.
        dtype: Type to compute in; stored weights of another type are cast.
        tokenizer: Directory of the o200k rank file; None for those who read token ids alone, whose model has
            no `tokenizer`.
        architecture: When given, must be of the checkpoint's geometry.
        backend: Name of a module of `trainer.model.backends`; no fusion is asked of it, whatever the
            checkpoint was trained with.

    Raises:
        PublishedError: Architecture, names or shapes differ, or a file is missing.
        EvaluationError: The tokenizer has more ids than the model.
    """

    kind = "megatron"
    shares_prefixes = True

    def __init__(
        self,
        name: str,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        tokenizer: Path | None,
        architecture: Architecture | None = None,
        backend: str = "reference",
    ) -> None:
        super().__init__(name, path, device, dtype)
        self._architecture = read_architecture(path) if architecture is None else architecture
        if tokenizer is not None:
            self.tokenizer = O200kTokenizer(tokenizer)
        network = build_model(
            geometry(self._architecture), dtype=dtype, device=device, seed=None, backend=backend
        )
        load_published(network, path, architecture=self._architecture, cast_dtype=True)
        require_filled(network, path)
        self.module: VPGPTModel = network.eval().requires_grad_(False)
        self.vocab_size = self._architecture.vocab_size
        self.context = self._architecture.attention.max_sequence_length

    @property
    def architecture(self) -> Architecture:
        """Geometry of the checkpoint."""
        return self._architecture

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight of the output head; it has no bias."""
        return self.module.head_weight, None

    @torch.no_grad()
    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return final hidden states of plain rows; padding belongs to no document."""
        places = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
        padding = places >= lengths.cpu()[:, None]
        states = self.module.forward_hidden(
            tokens.to(self.device),
            places.masked_fill(padding, 0).to(self.device),
            torch.zeros_like(places).masked_fill(padding, PADDING).to(self.device),
        )
        return states.transpose(0, 1)

    @torch.no_grad()
    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Return final hidden states of rows with a shared prefix: the prefixes once, then all continuations.

        Between the two the decoding cache is copied for every continuation.
        """
        del positions  # they follow from the lengths
        branch = branch.cpu()
        lengths = (branch == 0).sum(dim=1).tolist()
        cache = DecodingCache(len(tokens))
        prefix = extend(self.module, cache, tokens[:, : max(lengths)].to(self.device), lengths)
        hidden = prefix.new_zeros(*tokens.shape, prefix.shape[2])
        hidden[:, : max(lengths)] = prefix.transpose(0, 1)
        pieces = [
            (row, torch.nonzero(branch[row] == number).squeeze(1))
            for row in range(len(branch))
            for number in branch[row].unique().tolist()
            if number > 0
        ]
        counts = [len(places) for _, places in pieces]
        cache.select([row for row, _ in pieces])
        continued = torch.zeros(len(pieces), max(counts), dtype=torch.int64)
        for number, (row, places) in enumerate(pieces):
            continued[number, : len(places)] = tokens[row, places]
        states = extend(self.module, cache, continued.to(self.device), counts)
        for number, (row, places) in enumerate(pieces):
            hidden[row, places.to(self.device)] = states[: len(places), number]
        return hidden
