"""What the donors say when one is not what it must be."""


class DonorError(ValueError):
    """A donor is absent, damaged, or not the one that the experiment names; the message says what to do."""
