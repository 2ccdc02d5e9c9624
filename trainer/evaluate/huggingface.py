"""Hugging Face checkpoints, through `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.checkpoints.tokenizers import HuggingFaceTokenizer
from trainer.errors import EvaluationError
from trainer.evaluate.models import LanguageModel

_MOST_TRIED = 600  # tokens of the row that is tried out when a checkpoint is opened


class HuggingFaceModel(LanguageModel):
    """A directory that `transformers` loads.

    Whether hidden states times the head really are the model's logits (some architectures scale or cap them),
    and whether its attention takes a mask of our own for shared prefixes, is tried out when it is opened.

    Args:
        name: Object.
        path: Directory: `config.json`, safetensors, tokenizer files.
        device: Where to put it.
        dtype: Type to compute in.

    Raises:
        EvaluationError: The weights do not fill the architecture exactly, or its logits are made in a way
            that is not supported.
    """

    kind = "huggingface"

    def __init__(self, name: str, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(name, path, device, dtype)
        from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
        from transformers.utils import logging

        logging.disable_progress_bar()  # one for every file that is opened
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            # Weights of four bits are widened as they are read: every type of device then computes the same.
            quantization = getattr(config, "quantization_config", None)
            narrow = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
            module, loading = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **({"quantization_config": Mxfp4Config(dequantize=True)} if narrow else {}),
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise EvaluationError(
                f"{path} cannot be loaded ({said}): a file is cut off, damaged or missing, or its "
                "config.json is of another model; restore it"
            ) from error
        wrong = {key: sorted(map(str, value)) for key, value in loading.items() if value}
        if wrong:
            raise EvaluationError(f"{path} does not fill its architecture exactly: {wrong}")
        self.module = module.to(device).eval().requires_grad_(False)
        self.tokenizer = HuggingFaceTokenizer(path)
        self.vocab_size = self.head[0].shape[0]
        self._window = _sliding_window(module.config)
        self.context = int(module.config.max_position_embeddings)
        self._try_out()

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output head."""
        head: Any = self.module.get_output_embeddings()  # type: ignore[operator]
        return head.weight, getattr(head, "bias", None)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return final hidden states of plain rows; right padding needs no mask."""
        del lengths
        return self._backbone(input_ids=tokens.to(self.device))

    @torch.no_grad()
    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Return final hidden states of rows with a shared prefix."""
        branch, positions = branch.to(self.device), positions.to(self.device)
        mine, theirs = branch[:, :, None], branch[:, None, :]
        places = torch.arange(branch.shape[1], device=self.device)
        allowed = (places[None, :] <= places[:, None]) & ((theirs == 0) | (theirs == mine))
        everywhere = self._additive(allowed)
        mask: Tensor | Mapping[str, Tensor] = everywhere
        if self._window is not None:
            near = positions[:, :, None] - positions[:, None, :] < self._window
            mask = {"full_attention": everywhere, "sliding_attention": self._additive(allowed & near)}
        return self._backbone(input_ids=tokens.to(self.device), position_ids=positions, attention_mask=mask)

    def _additive(self, allowed: Tensor) -> Tensor:
        """Return a mask `[B, 1, S, S]` that is added to scores, which every kind of attention takes."""
        blank = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return blank.masked_fill_(~allowed, torch.finfo(self.dtype).min)[:, None]

    def _backbone(self, **inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        backbone: Any = self.module.base_model
        states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def _try_out(self) -> None:
        """Compare both ways of scoring with the model's own logits on some tokens, a window at least."""
        generator = torch.Generator().manual_seed(0)
        length = 12 + (self._window or 0)
        if length > min(_MOST_TRIED, self.context):
            length = 12
        tokens = torch.randint(self.vocab_size, (1, length), generator=generator)
        expected = self.module(input_ids=tokens.to(self.device), use_cache=False).logits.float()
        lengths = torch.tensor([tokens.shape[1]])
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        spread = float(expected.std()) + 1e-6
        if float((self.logits(tokens, lengths) - expected).abs().max()) > tolerance * spread * 10:
            raise EvaluationError(
                f"{self.path}: {type(self.module).__name__} does more to its logits than the output head; "
                "only models whose logits are final hidden states times the head can be evaluated"
            )
        if not _sees_all_or_a_window(self.module.config) or length <= (self._window or 0):
            return  # nobody has seen whether a branch keeps to what its layers see
        # Prefix of 4, then the others as a branch, with a stranger branch of 3 between.
        positions = torch.cat((torch.arange(4), torch.arange(4, 7), torch.arange(4, length)))[None]
        branch = torch.tensor([[0] * 4 + [1] * 3 + [2] * (length - 4)])
        row = torch.cat((tokens[:, :4], tokens.flip(1)[:, :3], tokens[:, 4:]), dim=1)
        try:
            shared = self.hidden_trees(row, positions, branch)[:, 7:]
        except (TypeError, ValueError, RuntimeError, KeyError):
            return
        plain = self.hidden(tokens, lengths)[:, 4:]
        gap = float((shared - plain).abs().float().max())
        self.shares_prefixes = gap <= tolerance * 10 * (float(plain.float().std()) + 1e-6)


def _sees_all_or_a_window(config: Any) -> bool:
    """Whether each layer sees everything before a token, or a window that the config names by layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is None
    return set(kinds) <= {"full_attention", "sliding_attention"}


def _sliding_window(config: Any) -> int | None:
    """Return how many tokens the sliding layers of a model see, None where it has none."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return None
    return int(config.sliding_window)
