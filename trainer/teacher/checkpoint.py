"""One of our own published checkpoints as a teacher."""

from pathlib import Path
from typing import ClassVar

import torch

from trainer.evaluate.megatron import MegatronModel
from trainer.teacher.local import LocalTeacher


class CheckpointTeacher(LocalTeacher):
    """A model that this trainer trained. It reads the token ids of its training and has no tokenizer.

    Args:
        path: Directory of the published checkpoint.
        digest: Content digest of the directory.
        device: Where to compute.
        dtype: Type to compute in.
        backend: Name of a module of `trainer.model.backends`.
        batch_tokens: See `LocalTeacher`.

    Raises:
        PublishedError: A file is missing or damaged.
    """

    kind: ClassVar[str] = "checkpoint"

    def __init__(
        self,
        path: Path,
        *,
        digest: str,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "reference",
        batch_tokens: int | None = None,
    ) -> None:
        model = MegatronModel("teacher", path, device, dtype, tokenizer=None, backend=backend)
        super().__init__(model, digest=digest, tokenizer_sha256=None, batch_tokens=batch_tokens)
