"""Random numbers of rollouts, each a function of what it is for: never of time, batch or rank."""

import hashlib


def draw(what: str, *names: int) -> int:
    """Return 64 random bits.

    Args:
        what: What they are for.
        names: The numbers that name it, the experiment's seed among them.
    """
    text = f"rollouts {what} {' '.join(map(str, names))}"
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")
