"""The deterministic train/valid split: a hash of the row's id against a threshold."""

from decimal import Decimal
from hashlib import blake2b

SPLITS = ("train", "valid")


def split_hash(synth_id: str) -> int:
    """First 8 bytes of BLAKE2b over the UTF-8 id, as a big-endian integer in [0, 2**64)."""
    return int.from_bytes(blake2b(synth_id.encode("utf-8"), digest_size=8).digest(), "big")


def split_threshold(valid_fraction: float) -> int:
    """`valid_fraction` of the hash range; a row is valid exactly when its hash lies below.

    The fraction is taken as its shortest decimal, not as its binary value, so 0.1 means one tenth.

    Raises:
        ValueError: `valid_fraction` is outside [0, 1].
    """
    if not 0 <= valid_fraction <= 1:
        raise ValueError(f"valid_fraction must lie in [0, 1], got {valid_fraction}")
    return int(Decimal(str(valid_fraction)) * 2**64)


def split_of(synth_id: str, valid_fraction: float) -> str:
    """`train` or `valid`."""
    return "valid" if split_hash(synth_id) < split_threshold(valid_fraction) else "train"
