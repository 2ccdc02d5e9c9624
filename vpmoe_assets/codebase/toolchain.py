"""Packages of others whose release decides bytes: they belong to what a step is, as its own code does.

torch and megatron-core compute everything and are in no fingerprint: a new release would make every model
again, for differences that are mostly rounding. They stand in the record, every view shows both releases, and
an experiment with `strict_toolchain = true` refuses to reuse across a difference.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vpmoe_assets.codebase.closure import with_parents


@dataclass(frozen=True)
class Decider:
    """A distribution that decides bytes.

    Attributes:
        reason: How.
        uses: Dotted names whose use decides, with all below them; a name of a package stands for any use.
    """

    reason: str
    uses: tuple[str, ...]


DECIDERS: Mapping[str, Decider] = {
    "matplotlib": Decider("draws the plots of the ladder's page", ("matplotlib",)),
    "mergekit": Decider("its tokensurgeon makes the rows of the new vocabulary", ("mergekit",)),
    "numpy": Decider(
        "draws; the raw words of its bit generators, such as `Philox`, are promised never to change",
        ("numpy.random.Generator", "numpy.random.RandomState", "numpy.random.default_rng"),
    ),
    "openai-harmony": Decider("renders conversations", ("openai_harmony",)),
    "orjson": Decider("writes JSON", ("orjson.dumps",)),
    "pyarrow": Decider(
        "writes parquet, with its release in every file",
        ("pyarrow.parquet.ParquetWriter", "pyarrow.parquet.write_table"),
    ),
    "safetensors": Decider(
        "writes the headers of weights",
        ("safetensors.serialize", "safetensors.serialize_file", "safetensors.torch", "safetensors.numpy"),
    ),
    "tiktoken": Decider("makes token ids", ("tiktoken", "tiktoken_ext")),
    "tokenizers": Decider("makes token ids", ("tokenizers",)),
    "transformers": Decider("computes the donor's layers and scores, and makes token ids", ("transformers",)),
    "zstandard": Decider("compresses the columns of the top-K store", ("zstandard.ZstdCompressor",)),
}

NEUTRAL: Mapping[str, str] = {
    "cutlass": "compiles the kernels of flash-attn-4, of the one release that the extra `fused` pins",
    "filelock": "locks",
    "flash_attn": "kernels of `training.backend = 'fused'`, of the one release that the extra pins",
    "httpx": "asks a served teacher, whose ids and numbers count; fetches files held to a sha256",
    "huggingface_hub": "fetches files that are held to a pinned commit and sha256",
    "megatron": "recorded, and compared under `strict_toolchain`",
    "pydantic": "its error is caught where openai-harmony refuses a conversation",
    "torch": "recorded, and compared under `strict_toolchain`",
    "psutil": "how many processes the memory has room for",
    "tqdm": "bars on a terminal",
    "triton": "comes with torch, and is held to its release",
}
"""Other packages that steps import, and why their release is in no fingerprint."""

STRICT = ("megatron-core", "torch")
"""Distributions that an experiment with `strict_toolchain = true` holds what it reuses to."""


def deciding_packages(uses: Iterable[str]) -> dict[str, str]:
    """Return the installed release of every distribution that decides bytes, by name.

    Args:
        uses: Dotted names of other packages' things that the code of a step uses.
    """
    used = set(with_parents(set(uses)))
    return {name: installed(name) for name, decider in DECIDERS.items() if not used.isdisjoint(decider.uses)}


def toolchain_difference(environment: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the distributions of `STRICT` that a record was made with in another release: then and now.

    Args:
        environment: Of the record.
    """
    then = environment.get("packages") or {}
    pairs = {name: (str(then.get(name) or "absent"), installed(name)) for name in STRICT}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def toolchain_note(difference: Mapping[str, tuple[str, str]]) -> str:
    """Return a difference as a line for people, such as `made with torch 2.11.0, now 2.12.0`."""
    return "; ".join(f"made with {name} {then}, now {now}" for name, (then, now) in difference.items())


@cache
def installed(distribution: str) -> str:
    """Return the installed release of a distribution, `absent` where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
