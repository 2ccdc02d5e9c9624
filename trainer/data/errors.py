"""The one error of the data path."""


class DataError(ValueError):
    """A data set that cannot be trained on.

    The message names the file or document, what was found, and the remedy.
    """
