"""One interface over the two kinds of checkpoint: Hugging Face directories and our published weights."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.config import Architecture
from trainer.config.evaluate import Dtype, HuggingFaceCheckpoint, MegatronCheckpoint
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.tokenizers import HuggingFaceTokenizer, O200kTokenizer, Tokenizer

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
        """Final hidden states (after the last norm) of plain rows.

        Args:
            tokens: int64 ``[B, S]``; ids at padded positions must be valid.
            lengths: int64 ``[B]``, tokens of each row.

        Returns:
            ``[B, S, H]`` on the model's device.
        """

    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Final hidden states of rows in which several continuations share one prefix.

        A token sees the earlier tokens of its row that belong to branch 0 (the prefix) or to its own branch.

        Args:
            tokens: int64 ``[B, S]``: prefix, then one continuation after the other, then padding.
            positions: int64 ``[B, S]``, position of each token in prefix + own continuation.
            branch: int64 ``[B, S]``: 0 prefix, 1… continuations, -1 padding.

        Returns:
            ``[B, S, H]``.

        Raises:
            NotImplementedError: `shares_prefixes` is false.
        """
        raise NotImplementedError(f"{self.kind} checkpoint {self.name}: score each continuation as a row")

    @property
    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, H]`` and bias ``[V]`` (or None) of the output head."""

    @property
    def architecture(self) -> Architecture | None:
        """Geometry of one of our checkpoints; None for others."""
        return None

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[T, V]`` of hidden states ``[T, H]``, in float32 whatever the weights' type."""
        weight, bias = self.head
        if weight.dtype == torch.float32:
            logits = hidden.float() @ weight.t()
        elif weight.device.type == "cuda":
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        else:
            logits = hidden.float() @ weight.float().t()
        return logits if bias is None else logits + bias.float()

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` float32 of plain rows: for small batches and for tests."""
        hidden = self.hidden(tokens, lengths)
        return self.head_logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits ``[B, V]`` float32 after the last token of each row."""
        hidden = self.hidden(tokens, lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head_logits(hidden[rows, lengths.to(hidden.device) - 1])

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of one target at each of some hidden states, in chunks.

        Args:
            hidden: ``[T, H]``.
            targets: int64 ``[T]``.

        Returns:
            ``(logprob [T] float32, greedy [T] bool)`` on the CPU; ``greedy`` says whether the target is the
            most probable token (of equal ones, the first).
        """
        size = max(1, _CHUNK_LOGITS[self.device.type] // self.vocab_size)
        targets = targets.to(self.device)
        logprobs, greedy = [], []
        for start in range(0, len(targets), size):
            wanted = targets[start : start + size]
            logits = self.head_logits(hidden[start : start + size])
            chosen = logits.gather(1, wanted[:, None]).squeeze(1)
            logprobs.append(chosen - logits.logsumexp(dim=1))
            greedy.append(logits.argmax(dim=1) == wanted)
        if not logprobs:
            return torch.empty(0), torch.empty(0, dtype=torch.bool)
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()


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
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # one for every file that is opened
        module, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        wrong = {key: sorted(map(str, value)) for key, value in loading.items() if value}
        if wrong:
            raise EvaluationError(f"{path} does not fill its architecture exactly: {wrong}")
        self.module = module.to(device).eval().requires_grad_(False)
        self.tokenizer = HuggingFaceTokenizer(path)
        self.vocab_size = self.head[0].shape[0]
        self.context = int(module.config.max_position_embeddings)
        self._try_out()

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output head."""
        head: Any = self.module.get_output_embeddings()  # type: ignore[operator]
        return head.weight, getattr(head, "bias", None)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Final hidden states of plain rows; right padding needs no mask."""
        del lengths
        return self._backbone(input_ids=tokens.to(self.device))

    @torch.no_grad()
    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Final hidden states of rows with a shared prefix."""
        branch = branch.to(self.device)
        mine, theirs = branch[:, :, None], branch[:, None, :]
        places = torch.arange(branch.shape[1], device=self.device)
        allowed = (places[None, :] <= places[:, None]) & ((theirs == 0) | (theirs == mine))
        return self._backbone(
            input_ids=tokens.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=allowed[:, None],
        )

    def _backbone(self, **inputs: Tensor) -> Tensor:
        backbone: Any = self.module.base_model
        states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def _try_out(self) -> None:
        """Compares both ways of scoring with the model's own logits on a handful of tokens."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (1, 12), generator=generator)
        expected = self.module(input_ids=tokens.to(self.device), use_cache=False).logits.float()
        lengths = torch.tensor([tokens.shape[1]])
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        spread = float(expected.std()) + 1e-6
        if float((self.logits(tokens, lengths) - expected).abs().max()) > tolerance * spread * 10:
            raise EvaluationError(
                f"{self.path}: {type(self.module).__name__} does more to its logits than the output head; "
                "only models whose logits are final hidden states times the head can be evaluated"
            )
        # Prefix of 4, then the 8 others as a branch, with a stranger branch of 3 between.
        positions = torch.cat((torch.arange(4), torch.arange(4, 7), torch.arange(4, 12)))[None]
        branch = torch.tensor([[0] * 4 + [1] * 3 + [2] * 8])
        row = torch.cat((tokens[:, :4], tokens.flip(1)[:, :3], tokens[:, 4:]), dim=1)
        try:
            shared = self.hidden_trees(row, positions, branch)[:, 7:]
        except (TypeError, ValueError, RuntimeError):
            return
        plain = self.hidden(tokens, lengths)[:, 4:]
        gap = float((shared - plain).abs().float().max())
        self.shares_prefixes = gap <= tolerance * 10 * (float(plain.float().std()) + 1e-6)


class MegatronModel(LanguageModel):
    """One of our published checkpoints, built through the same configuration path as training.

    Args:
        name: Object.
        path: Directory of the published checkpoint.
        device: Where to put it.
        dtype: Type to compute in; stored weights of another type are cast.
        tokenizer: Directory of the o200k rank file.
        architecture: When given, must equal the checkpoint's own.

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
        tokenizer: Path,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__(name, path, device, dtype)
        from trainer.model.gpt import VPGPTModel, build_model
        from trainer.published import load_published, read_architecture

        self._architecture = read_architecture(path) if architecture is None else architecture
        self.tokenizer = O200kTokenizer(tokenizer)
        network = build_model(self._architecture, dtype=dtype, device=device)
        load_published(network, path, architecture=self._architecture, cast_dtype=True)
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
        """Final hidden states of plain rows; padding belongs to no document."""
        places = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
        padding = places >= lengths.cpu()[:, None]
        states = self.module.forward_hidden(
            tokens.to(self.device),
            places.masked_fill(padding, 0).to(self.device),
            torch.zeros_like(places).masked_fill(padding, -1).to(self.device),
        )
        return states.transpose(0, 1)

    @torch.no_grad()
    def hidden_trees(self, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
        """Final hidden states of rows with a shared prefix: the prefixes once, then all continuations.

        Between the two the decoding cache is copied for every continuation.
        """
        del positions  # they follow from the lengths
        from trainer.model.cache import DecodingCache, extend

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


def open_model(
    path: Path,
    *,
    name: str,
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    expected: HuggingFaceCheckpoint | MegatronCheckpoint | None = None,
    tokenizer: Path | None = None,
) -> LanguageModel:
    """Opens a checkpoint of either kind.

    Args:
        path: Directory with a `config.json`.
        name: Object that it is.
        device: Where to put it.
        dtype: Type to compute in.
        expected: What the experiment says of it; a checkpoint that differs is refused.
        tokenizer: Directory of the o200k rank file; needed for our own checkpoints.

    Raises:
        EvaluationError: It is neither kind, or differs from what is expected.
        PublishedError: See `MegatronModel`.
    """
    from trainer.published import SCHEMA

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
    """A value of a Hugging Face config; newer files keep the rotary base in a table of its own."""
    return next(_values(config, key), None)


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    if key in config:
        yield config[key]
    for table in ("rope_parameters", "rope_scaling"):
        nested = config.get(table)
        if isinstance(nested, Mapping) and key in nested:
            yield nested[key]
