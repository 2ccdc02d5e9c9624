"""What the trainer refuses or stops at, each kind with a class of its own.

The orchestrator has a `DataError` too: no error crosses the wall, only its message, in `STATUS`.
"""


class DataError(ValueError):
    """A data set that cannot be trained on.

    The message names the file or document, what was found, and the remedy.
    """


class EvaluationError(ValueError):
    """A checkpoint, bundle or report cannot be used as asked; the message says what to do."""


class TokenizerMismatchError(EvaluationError):
    """A measurement by the token was asked of a checkpoint that reads other tokens than the data hold."""


class TeacherError(ValueError):
    """A teacher that cannot be used as asked, or has no usable answer; the message says what to do."""


class LossError(ValueError):
    """A batch or a weighting from which no loss can be computed; the message says what was found."""


class OptimizerError(ValueError):
    """A parameter, setting or call that the optimizer refuses; the message says what to change."""


class MissingGradientError(OptimizerError):
    """Parameters that require a gradient got none in a step; no weight and no optimizer state has changed."""


class OptimizerStateError(OptimizerError):
    """Saved optimizer state is missing, or does not fit the parameters it is loaded for."""


class NonFiniteGradientError(ArithmeticError):
    """The gradient norm is NaN or infinite; no weight and no optimizer state has changed."""


class NoRoomError(ValueError):
    """A run does not fit the memory or the disk that it was given; the message says what would help."""


class ProfileError(ValueError):
    """A step cannot be measured here as asked; the message says what to change."""
