"""What an evaluation is called."""

PREFIX = "eval_"


def eval_name(checkpoint: str) -> str:
    """Return the asset that measures a checkpoint."""
    return PREFIX + checkpoint
