r"""The header of Megatron's IndexedDataset index.

`.bin` is the concatenation of all sequences. `.idx` is, little-endian: 9 bytes `MMIDIDX\0\0`, u64 version 1,
u8 dtype code, u64 number of sequences n, u64 number of document indices n+1, int32[n] lengths, int64[n] byte
offsets, int64[n+1] document indices. Here one sequence is one document, and elements are uint8 or int32.
"""

import struct
from dataclasses import dataclass

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "u1", 4: "<i4"}
"""NumPy's names of the element types that are written here, by Megatron's code."""

_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class IndexHeader:
    """The first bytes of an `.idx`.

    Attributes:
        magic: `MAGIC` in a file of this format.
        version: `VERSION` in one that is read here.
        code: Of the element type; see `DTYPES`.
        sequences: Number of sequences.
        documents: Number of document indices.
    """

    magic: bytes
    version: int
    code: int
    sequences: int
    documents: int

    @property
    def known(self) -> bool:
        """Whether this is an index of the version that is read here."""
        return self.magic == MAGIC and self.version == VERSION

    @property
    def file_bytes(self) -> int:
        """Size that the file must have."""
        return HEADER_BYTES + 12 * self.sequences + 8 * self.documents


def pack_header(code: int, sequences: int) -> bytes:
    """Return the header of an index of so many sequences, each a document."""
    return _HEADER.pack(MAGIC, VERSION, code, sequences, sequences + 1)


def unpack_header(content: bytes) -> IndexHeader:
    """Read a header; `content` has at least `HEADER_BYTES`."""
    return IndexHeader(*_HEADER.unpack_from(content))
