"""The one error of the losses."""


class LossError(ValueError):
    """A batch or a weighting from which no loss can be computed; the message says what was found."""
