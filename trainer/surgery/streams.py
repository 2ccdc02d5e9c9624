"""Models run one layer at a time over a calibration slice: one layer's weights in memory, never a model's.

Both streams have the same three moves. `load(n)` builds layer n with its weights; whoever needs its inputs
then finds them in `hidden`; `run(layer)` replaces them by the layer's outputs. At 64 thousand tokens and
hidden size 1024 the residual stream is 268 MB, and the largest tensor read is the embedding.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import nn

from trainer.contract.geometry import geometry
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError
from trainer.model.backends.reference import BACKEND
from trainer.model.config import transformer_config
from trainer.model.context import forward_context
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.document_mask import Documents, document_mask
from trainer.model.gpt import ensure_parallel_state
from trainer.model.positions import GrapeM, Rope
from trainer.model.specs import block_spec
from trainer.surgery.calibration import NO_LABEL, Batch

ReadTensor = Callable[[str], torch.Tensor]
"""A tensor of a checkpoint by its name."""

FfnObserver = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with the FFN's normalised inputs and its outputs, each `[tokens, H]`."""


class Stream(Protocol):
    """What both streams have."""

    layers: int

    def load(self, number: int) -> nn.Module:
        """Build layer `number` (from 1) with its weights."""

    def run(self, layer: nn.Module) -> None:
        """Take the residual stream through a layer."""

    def residual(self) -> Iterator[torch.Tensor]:
        """Return the residual stream of each batch, `[tokens, H]`, row after row."""


class StudentStream:
    """A Megatron checkpoint of this project, layer by layer, in fp32.

    Attributes:
        hidden: The residual stream of each batch, `[S, B, H]`.
        layers: Number of layers.
    """

    def __init__(
        self,
        architecture: Architecture,
        read: ReadTensor,
        batches: Sequence[Batch],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        """Embed the batches.

        Args:
            architecture: What the checkpoint was built from.
            read: Gives a tensor by its Megatron name, full and of any floating type.
            batches: The calibration slice.
            device: Where to compute.
        """
        ensure_parallel_state()
        self.device = torch.device(device)
        self.layers = architecture.model.num_layers
        self._read, self._config = read, transformer_config(geometry(architecture))
        self._groups = ProcessGroupCollection.use_mpu_process_groups()
        self._specs = block_spec(self._config, BACKEND).layer_specs
        self._batches = [batch.to(self.device) for batch in batches]
        self._contexts = [
            forward_context(
                batch.tokens,
                batch.position_ids,
                Documents(batch.doc_id),
                max_sequence_length=architecture.attention.max_sequence_length,
            )
            for batch in self._batches
        ]
        if (rotary := self._rotary()) is not None:
            with torch.no_grad():
                for context in self._contexts:
                    context.rotation = rotary(context.position_ids)
        table = read("embedding.word_embeddings.weight")
        self.hidden = [_embed(table, batch.tokens, self.device).transpose(0, 1) for batch in self._batches]

    def _rotary(self) -> GrapeM | Rope | None:
        if self._config.rotation == "rope":
            return Rope(self._config)
        if not any(self._config.local_layers):
            return None
        with torch.device(self.device):
            rotary = GrapeM(self._config, self._groups.tp)
        _fill(rotary, self._read, "rotary_pos_emb.")
        return rotary

    def load(self, number: int) -> nn.Module:
        """Build layer `number` (from 1) with its weights, in evaluation mode."""
        with torch.device(self.device):
            layer: nn.Module = build_module(
                self._specs[number - 1],
                config=self._config,
                layer_number=number,
                pg_collection=self._groups,
            )
        _fill(layer, self._read, f"decoder.layers.{number - 1}.")
        return layer.eval()

    @torch.no_grad()
    def run(self, layer: nn.Module) -> None:
        """Take the residual stream through a layer."""
        for place, (context, hidden) in enumerate(zip(self._contexts, self.hidden, strict=True)):
            output, _ = layer(hidden_states=hidden, attention_mask=context, padding_mask=context.padding)
            self.hidden[place] = output.detach()  # Megatron marks a layer's output as differentiable

    def residual(self) -> Iterator[torch.Tensor]:
        """Return the residual stream of each batch, `[tokens, H]`, row after row."""
        return (hidden.transpose(0, 1).flatten(0, 1) for hidden in self.hidden)

    @torch.no_grad()
    def cross_entropy(self, tokens: int) -> float:
        """Mean next-token cross-entropy in nats over the first `tokens` tokens, after the last layer.

        Raises:
            ValueError: None of these tokens has a label.
        """
        gain = self._read("decoder.final_layernorm.weight").to(self.device, torch.float32)
        head = self._read("output_layer.weight").to(self.device, torch.float32)
        total, count, seen = 0.0, 0, 0
        for batch, hidden in zip(self._batches, self.hidden, strict=True):
            if seen >= tokens:
                break
            flat = hidden.transpose(0, 1).flatten(0, 1)[: tokens - seen]
            labels = batch.labels.flatten()[: len(flat)]
            seen += len(flat)
            normed = nn.functional.rms_norm(flat, gain.shape, gain, self._config.layernorm_epsilon)
            wanted = labels != NO_LABEL
            _, losses = chunked_cross_entropy(
                normed, head, labels.clamp(min=0), torch.zeros(len(flat), device=self.device), select=wanted
            )
            total += float(losses.double().sum())
            count += int(wanted.sum())
        if count == 0:
            raise ValueError(
                f"none of the first {tokens} calibration tokens has a label: the slice is too short"
            )
        return total / count


class DonorStream:
    """A Hugging Face Qwen3 checkpoint, layer by layer, in fp32, with documents isolated.

    Attributes:
        hidden: The residual stream of each batch, `[B, S, H]`.
        layers: Number of layers.
    """

    def __init__(
        self,
        directory: Path,
        read: ReadTensor,
        batches: Sequence[Batch],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        """Embed the batches.

        Args:
            directory: The checkpoint, for its `config.json`.
            read: Gives a tensor by its Hugging Face name, of any floating type.
            batches: The calibration slice.
            device: Where to compute.

        Raises:
            ConfigError: The checkpoint is not a Qwen3 model.
        """
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        self.device = torch.device(device)
        config = Qwen3Config.from_pretrained(directory)
        if config.model_type != "qwen3" or any(kind != "full_attention" for kind in config.layer_types):
            raise ConfigError(
                f"{directory}/config.json: a donor is a qwen3 model with full attention in every layer, "
                f"found model_type {config.model_type!r}, layer_types {sorted(set(config.layer_types))}"
            )
        config._attn_implementation = "sdpa"
        self._config, self._read = config, read
        self.layers: int = config.num_hidden_layers
        self._batches = [batch.to(self.device) for batch in batches]
        self._rotary = Qwen3RotaryEmbedding(config).to(self.device)
        table = read("model.embed_tokens.weight")
        self.hidden = [_embed(table, batch.tokens, self.device) for batch in self._batches]

    def load(self, number: int) -> nn.Module:
        """Build layer `number` (from 1) with its weights, in evaluation mode."""
        from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

        with torch.device(self.device):
            layer: nn.Module = Qwen3DecoderLayer(self._config, number - 1)
        _fill(layer, self._read, f"model.layers.{number - 1}.")
        return layer.eval()

    @torch.no_grad()
    def run(self, layer: nn.Module, observe_ffn: FfnObserver | None = None) -> None:
        """Take the residual stream through a layer.

        Args:
            layer: From `load`.
            observe_ffn: Sees the FFN's inputs and outputs of each batch.
        """

        def observe(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if observe_ffn is not None:
                observe_ffn(inputs[0].flatten(0, 1), output.flatten(0, 1))

        hook = layer.get_submodule("mlp").register_forward_hook(observe)
        try:
            for place, (batch, hidden) in enumerate(zip(self._batches, self.hidden, strict=True)):
                places = torch.arange(hidden.shape[1], device=self.device)
                output: Any = layer(
                    hidden,
                    attention_mask=document_mask(places, places, batch.doc_id, window=None)[:, None],
                    position_ids=batch.position_ids,
                    position_embeddings=self._rotary(hidden, batch.position_ids),
                )
                self.hidden[place] = output
        finally:
            hook.remove()

    def residual(self) -> Iterator[torch.Tensor]:
        """Return the residual stream of each batch, `[tokens, H]`, row after row."""
        return (hidden.flatten(0, 1) for hidden in self.hidden)


def residual_agreement(student: Stream, other: Stream) -> Iterator[dict[str, float | int]]:
    """How close a student's residual stream is to that of its donor or parent, after each layer.

    Args:
        student: At its start; afterwards at its last layer.
        other: At its start, over the same batches.

    Yields:
        One row a layer: `layer` from 1, `cosine` (mean over tokens) and `norm_ratio` (root mean square
        Of the student's stream over the other's).

    Raises:
        ConfigError: They differ in depth, in hidden size or in their batches.
    """
    shapes = [([list(h.shape) for h in s.residual()], s.layers) for s in (student, other)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "two residual streams cannot be compared: batches [tokens, hidden size] and layers are "
            f"{shapes[0]} and {shapes[1]}"
        )
    for number in range(1, student.layers + 1):
        student.run(student.load(number))
        other.run(other.load(number))
        cosine = ours_power = other_power = 0.0
        tokens = 0
        for ours, theirs in zip(student.residual(), other.residual(), strict=True):
            left, right = ours.double(), theirs.double()
            cosine += float(nn.functional.cosine_similarity(left, right, dim=-1).sum())
            ours_power += float(left.square().sum())
            other_power += float(right.square().sum())
            tokens += len(left)
        yield {
            "layer": number,
            "cosine": cosine / tokens,
            "norm_ratio": math.sqrt(ours_power / max(other_power, sys.float_info.min)),
        }


def _embed(table: torch.Tensor, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`[B, S, H]` fp32; only the rows that occur are widened and moved."""
    if int(tokens.max()) >= len(table):
        raise ConfigError(
            f"the calibration text holds token id {int(tokens.max())}, but the embedding has {len(table)} "
            "rows; text and checkpoint belong to different tokenizers"
        )
    return table[tokens.cpu()].to(device, torch.float32)


@torch.no_grad()
def _fill(module: nn.Module, read: ReadTensor, prefix: str) -> None:
    """Every parameter and persistent buffer from the checkpoint; a shape that differs is an error."""
    state: Mapping[str, torch.Tensor] = module.state_dict()
    for name, target in state.items():
        if name.endswith("_extra_state"):
            continue
        value = read(prefix + name)
        if value.shape != target.shape:
            raise ConfigError(
                f"{prefix + name}: shape {list(target.shape)} expected, {list(value.shape)} found in "
                "the checkpoint"
            )
        target.copy_(value)
