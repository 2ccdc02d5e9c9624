"""Any causal language model of `transformers` as a teacher, GPT-OSS as it is published among them."""

from pathlib import Path
from typing import ClassVar

import torch

from trainer.checkpoints.tokenizers import RANKS_FINGERPRINT, RANKS_SHA256, Tokenizer
from trainer.decoding.conversation import ENDOFTEXT, speaks_harmony
from trainer.evaluate.huggingface import HuggingFaceModel
from trainer.teacher.local import LocalTeacher


class TransformersTeacher(LocalTeacher):
    """A directory that `transformers` loads; MXFP4 weights are widened to the type it computes in.

    Args:
        path: Directory: `config.json`, safetensors, tokenizer files.
        digest: Content digest of the directory.
        device: Where to compute.
        dtype: Type to compute in.
        batch_tokens: See `LocalTeacher`.

    Raises:
        EvaluationError: The weights do not fill the architecture, or it has no tokenizer.
    """

    kind: ClassVar[str] = "transformers"

    def __init__(
        self,
        path: Path,
        *,
        digest: str,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int | None = None,
    ) -> None:
        model = HuggingFaceModel("teacher", path, device, dtype)
        super().__init__(
            model,
            digest=digest,
            tokenizer_sha256=tokenizer_digest(model.tokenizer),
            batch_tokens=batch_tokens,
        )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the rank file's sha256 for o200k Harmony in any format, the fingerprint of any other."""
    fingerprint = tokenizer.fingerprint
    harmony = speaks_harmony(tokenizer) and tokenizer.special.get("<|endoftext|>") == ENDOFTEXT
    return RANKS_SHA256 if fingerprint == RANKS_FINGERPRINT and harmony else fingerprint
