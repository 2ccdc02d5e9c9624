"""Errors of the lineage library; each message says what was asked, what was found and what to do."""


class LineageError(Exception):
    """Base of every error that a user can act on; the command line prints it in one line."""


class UnsafePathError(LineageError):
    """A path is absolute, climbs out of its tree, or is of a kind that an artifact may not hold."""


class SecretFoundError(LineageError):
    """A value that identifies an artifact contains a secret."""


class ProvenanceError(LineageError):
    """The state of the code cannot be established."""


class RecordError(LineageError):
    """A record is unreadable, altered, or contradicts itself."""


class PublishError(LineageError):
    """A work area cannot be published as it is."""


class BusyError(LineageError):
    """Another process holds a lock; the message says which."""


class LocksMissingError(LineageError):
    """The store lies on a file system without locks between processes."""


class ArtifactMissing(LineageError):  # noqa: N818 - the three answers of Store.require read as states
    """No artifact was published under that name."""


class ArtifactDamaged(LineageError):  # noqa: N818
    """A published file is missing, added, truncated or altered."""


class ArtifactBlocked(LineageError):  # noqa: N818
    """A blocking check of the artifact failed, so nothing may be built on it."""


class ObjectMissing(LineageError):  # noqa: N818
    """An object that a record names is not in the store."""


class ObjectDamaged(LineageError):  # noqa: N818
    """The content of an object is not what its name says."""


class IndexLockedError(LineageError):
    """Another process is writing the index."""


class IndexCorruptError(LineageError):
    """The index file cannot be read; it can always be rebuilt from the records."""


class IndexOutdatedError(IndexCorruptError):
    """The index is whole, and of another version of this program."""


class QueryError(LineageError):
    """The SQL is wrong, or would write."""


class StatementError(LineageError):
    """Statements about a record were altered, or one is refused; the message says which and why."""


class EvidenceMissing(LineageError):  # noqa: N818
    """A check judges what a run left behind, and that was cleaned away."""


class ComparisonError(LineageError):
    """Two things cannot be compared; the message says why and which could."""


class CollectingError(LineageError):
    """A store cannot be cleaned up; the message says why and what to do."""


class SignatureError(LineageError):
    """A key cannot be used, or a signature does not hold; the message says which and why."""


class AdoptionError(LineageError):
    """A directory cannot become an artifact; the message says why and what to do."""
