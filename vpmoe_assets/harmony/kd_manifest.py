"""The manifest of `synth_kd_v1`: what was built, from what, how, and the sha256 of every file."""

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.conversation import ROLES
from vpmoe_assets.harmony.kd_config import COUNTS, KdConfig
from vpmoe_assets.harmony.render import RENDERER_VERSION
from vpmoe_assets.harmony.rows import InputFile
from vpmoe_assets.harmony.split import SPLITS
from vpmoe_assets.harmony.tokenizer import RANKS_NAME, RANKS_SHA256, VOCAB_SIZE
from vpmoe_assets.harmony.truncate import DROP_REASONS

SCHEMA_VERSION = "synth_kd_v1"


def input_from_synth(files: Sequence[InputFile], num_shards: int) -> dict[str, Any]:
    """Return the manifest's `input` for a build straight from SYNTH rows.

    There is no manifest file to hash then; the hash is over the list of files and their division into shards.
    """
    listing = [{"name": file.name, "rows": file.rows, "sha256": file.sha256} for file in files]
    content = {"files": [[file.rows, file.sha256] for file in files], "num_shards": num_shards}
    return {
        "kind": "synth",
        "dataset_dir": str(Path(files[0].path).resolve().parent),
        "manifest_path": None,
        "manifest_sha256": sha256_json(content),
        "glob": None,
        "files": listing,
        "num_shards": num_shards,
    }


def input_from_harmony(manifest_path: Path, harmony_dir: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's `input` for a build from synth_harmony."""
    from vpmoe_assets.lineage.volatile import without_volatile

    return {
        "kind": "synth_harmony",
        "dataset_dir": str(harmony_dir),
        "manifest_path": str(manifest_path),
        "manifest_sha256": sha256_json(without_volatile(manifest)),
        "glob": manifest["storage"]["glob"],
        "num_shards": len(manifest["storage"]["shards"]),
    }


def build_manifest(
    shards: Sequence[dict[str, Any]],
    config: KdConfig,
    scaffold: Scaffold,
    source: dict[str, Any],
    *,
    tokenizer_dir: Path,
    git_sha: str,
    created_unix_s: int,
    skipped_before: int = 0,
) -> dict[str, Any]:
    """Return the manifest of finished shards.

    Args:
        shards: Results of the workers, in shard order.
        config: Of the build.
        scaffold: Of the conversations.
        source: The `input` section.
        tokenizer_dir: Where the ranks came from.
        git_sha: Commit of the code.
        created_unix_s: Time of the build.
        skipped_before: Incomplete rows already skipped when the input was made.

    Raises:
        DataError: No conversation was kept in any split.
    """
    splits = {split: _split(split, shards) for split in SPLITS}
    if not any(split["rows"] for split in splits.values()):
        skipped = skipped_before + sum(shard["skipped"] for shard in shards)
        dropped: Counter[str] = Counter()
        for split in splits.values():
            dropped.update({name: split["counts"][name] for name in DROP_REASONS})
        raise DataError(
            f"no conversation is left to write: {skipped} rows skipped for want of a text"
            + "".join(f", {count} {reason}" for reason, count in dropped.items() if count)
            + f"; give more rows, a larger seq_len than {config.seq_len}"
            + (f" or a larger max_rows than {config.max_rows}" if config.max_rows >= 0 else "")
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "created_unix_s": created_unix_s,
        "git_sha": git_sha,
        "config_hash_v1": config.hash_v1(),
        "config_hash": config.hash(scaffold, source["manifest_sha256"]),
        "input": source,
        "renderer": {
            "library": "vpmoe_assets.harmony",
            "version": RENDERER_VERSION,
            "encoder": f"tiktoken {importlib.metadata.version('tiktoken')}",
            "oracle": f"openai-harmony {importlib.metadata.version('openai-harmony')}",
            "auto_drop_analysis": False,
            "roles_preserved": list(ROLES),
        },
        "tokenizer": {
            "type": "o200k_harmony",
            "model_path": str(tokenizer_dir / RANKS_NAME),
            "model_sha256": RANKS_SHA256,
            "vocab_size": VOCAB_SIZE,
        },
        "config": config.full(scaffold, source["manifest_sha256"]),
        "rows": {"skipped_incomplete": skipped_before + sum(shard["skipped"] for shard in shards)},
        "splits": splits,
    }


def payload_files(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of every payload file, by its path in the payload."""
    return {
        path: (shard["bytes"][kind], shard["sha256"][kind])
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for kind, path in shard["paths"].items()
    }


def _split(split: str, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parts = [(shard["shard"], shard["splits"][split]) for shard in shards]
    return {
        "rows": sum(part["rows"] for _, part in parts),
        "tokens": sum(part["tokens"] for _, part in parts),
        "counts": {name: sum(part["counts"][name] for _, part in parts) for name in COUNTS},
        "shards": [_shard(split, number, part) for number, part in parts if part["rows"]],
    }


def _shard(split: str, number: int, part: dict[str, Any]) -> dict[str, Any]:
    name = f"shard_{number:02d}"
    # "tokens.bin" from "shard_03_tokens.bin"
    files = {file.removeprefix(f"{name}_"): (file, entry) for file, entry in sorted(part["files"].items())}
    return {
        "name": name,
        "rows": part["rows"],
        "tokens": part["tokens"],
        "counts": part["counts"],
        "paths": {kind: f"{split}/{file}" for kind, (file, _) in files.items()},
        "bytes": {kind: entry["bytes"] for kind, (_, entry) in files.items()},
        "sha256": {kind: entry["sha256"] for kind, (_, entry) in files.items()},
    }
