"""What the top-K store refuses."""


class StoreError(ValueError):
    """A store, or something offered to one, that cannot be used as asked.

    The message names the file, the block or record, what was found, and the remedy.
    """
