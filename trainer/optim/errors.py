"""What can go wrong in the optimizer, each kind with its own class so that callers can tell them apart."""


class OptimizerError(ValueError):
    """A parameter, setting or call that the optimizer refuses; the message says what to change."""


class OptimizerStateError(OptimizerError):
    """Saved optimizer state is missing, or does not fit the parameters it is loaded for."""


class NonFiniteGradientError(ArithmeticError):
    """The gradient norm is NaN or infinite; no weight and no optimizer state has changed."""
