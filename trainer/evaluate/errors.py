"""What evaluation refuses."""


class EvaluationError(ValueError):
    """A checkpoint, bundle or report cannot be used as asked; the message says what to do."""


class TokenizerMismatchError(EvaluationError):
    """A measurement by the token was asked of a checkpoint that reads other tokens than the data hold."""
