"""What decides the bytes of `synth_kd_v1`, and the two hashes over it."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.harmony.conversation import ASSISTANT_CHANNELS, ROLES
from vpmoe_assets.harmony.render import RENDERER_VERSION
from vpmoe_assets.harmony.split import split_threshold
from vpmoe_assets.harmony.tokenizer import EOD, RANKS_SHA256
from vpmoe_assets.harmony.truncate import DROP_REASONS, POLICY

PACK_POLICY = "document-aligned/1"
COUNTS = ("kept", "truncated_analysis", "emptied_analysis", "truncated_user", *DROP_REASONS)
"""What is counted of the conversations of a split."""


@dataclass(frozen=True)
class KdConfig:
    """Configuration of a build.

    Args:
        seq_len: Longest conversation in tokens, EOD included; longer ones are cut or dropped.
        valid_fraction: Share of ids that goes to the valid split, in [0, 1].
        max_rows: Take only that many conversations, in input order; -1 takes all.
        pack_block: Documents per packing block, used by the trainer and recorded here.
        on_invalid: What to do with a row that breaks the format; only `fail` exists.
    """

    seq_len: int = 2048
    valid_fraction: float = 0.001
    max_rows: int = -1
    pack_block: int = 1024
    on_invalid: str = "fail"

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {self.seq_len}")
        if self.max_rows < -1:
            raise ValueError(f"max_rows must be -1 (all) or a number of rows, got {self.max_rows}")
        if self.pack_block < 1:
            raise ValueError(f"pack_block must be at least 1, got {self.pack_block}")
        if self.on_invalid != "fail":
            raise ValueError(f'on_invalid must be "fail" (the only policy), got {self.on_invalid!r}')
        split_threshold(self.valid_fraction)

    def v1(self) -> dict[str, Any]:
        """Return the six fields that the first version of the format hashed."""
        return {
            "valid_fraction": self.valid_fraction,
            "hash": "blake2b-8",
            "loss_mask_alignment": "labels_shifted_with_pad",
            "eod_token_id": EOD,
            "roles_preserved": list(ROLES),
            "assistant_channels": list(ASSISTANT_CHANNELS),
        }

    def hash_v1(self) -> str:
        """sha256 over `v1`, comparable with manifests made by other builders of this format."""
        text = json.dumps(self.v1(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def full(self, scaffold: Scaffold, input_manifest_sha256: str) -> dict[str, Any]:
        """Everything that can change an output byte."""
        return {
            **self.v1(),
            "seq_len": self.seq_len,
            "max_rows": self.max_rows,
            "on_invalid": self.on_invalid,
            "truncation": POLICY,
            "pack": {"policy": PACK_POLICY, "block": self.pack_block},
            "renderer_version": RENDERER_VERSION,
            "tokenizer_sha256": RANKS_SHA256,
            "scaffold": scaffold.as_dict(),
            "input_manifest_sha256": input_manifest_sha256,
        }

    def hash(self, scaffold: Scaffold, input_manifest_sha256: str) -> str:
        """sha256 over `full`: two builds with the same hash have the same shards."""
        return sha256_json(self.full(scaffold, input_manifest_sha256))
