"""What the donors say when one is not what it must be."""

from vpmoe_assets.harmony.errors import DataError


class DonorError(DataError):
    """A donor is absent, damaged, or not the one that the experiment names; the message says what to do."""
