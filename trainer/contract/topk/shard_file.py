"""The file of a shard: a header, then frames, each with a checksum over all of it.

Little-endian. The header is the magic number, bytes and CRC-32 of a canonical JSON document, and that
itself: split, shard, K, draws, error bound, vocabulary, and `binding`, the digest of the store's identity. A
frame is its tag, bytes of the payload, first sequence, sequences, tokens, CRC-32 (over those fields and the
payload), and the payload. Frames are `BLCK` (records), `TABL` (tables for the blocks after it) and last
`INDX`: u64 blocks, int64 [blocks, 5] (offset, offset of the table, first sequence, sequences, tokens), int64
numbers of all sequences. Behind it stand its offset and a magic number of its own. What stops before is an
unfinished shard, readable up to its last whole frame.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.contract.canonical import canonical_json
from trainer.contract.json_text import parse_json
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity

MAGIC = b"vpTOPK\x00\x01"
END_MAGIC = b"vpTOPKen"
BLOCK, TABLE, INDEX = b"BLCK", b"TABL", b"INDX"
MOST_FRAME_BYTES = 1 << 30
_HEADER = struct.Struct("<8sII")
_FRAME = struct.Struct("<4sIQII")
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<Q")
FRAME_BYTES = _FRAME.size + _CRC.size
END = struct.Struct("<Q8s")
REMEDY = "delete it and score this shard again"


type Buffer = mmap | bytes


class Frame(NamedTuple):
    """A frame in a file.

    Attributes:
        tag: `BLOCK`, `TABLE` or `INDEX`.
        offset: Of its first byte.
        size: Bytes of its payload.
        first: First sequence.
        sequences: Number of sequences.
        tokens: Number of supervised positions.
    """

    tag: bytes
    offset: int
    size: int
    first: int
    sequences: int
    tokens: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + FRAME_BYTES + self.size


def shard_name(shard: int) -> str:
    """Return the name of a shard's file, beside that of the data set's shard."""
    return f"shard_{shard:02d}.topk"


def pack_header(identity: StoreIdentity, split: str, shard: int) -> bytes:
    """Return the first bytes of a shard."""
    document = {
        "split": split,
        "shard": shard,
        "topk": identity.topk,
        "tail_draws": identity.tail_draws,
        "logprob_error": identity.logprob_error,
        "vocabulary": identity.vocabulary,
        "binding": identity.digest,
    }
    content = canonical_json(document).encode("ascii")
    return _HEADER.pack(MAGIC, len(content), zlib.crc32(content)) + content


def check_header(content: Buffer, identity: StoreIdentity, split: str, shard: int, path: Path) -> int:
    """Hold the first bytes of a shard against what they must be.

    Returns:
        Number of bytes of the header.

    Raises:
        StoreError: If it is another format, another shard, another store's, or damaged.
    """
    expected = pack_header(identity, split, shard)
    found = bytes(content[: len(expected)])
    if found == expected:
        return len(expected)
    if found[:6] != MAGIC[:6] or len(found) < _HEADER.size:
        raise StoreError(f"{path} is no shard of a top-K store, or cut off in its header; {REMEDY}")
    if found[:8] != MAGIC:
        raise StoreError(f"{path} is of format {found[6:8].hex()}, expected {MAGIC[6:8].hex()}; {REMEDY}")
    _, size, crc = _HEADER.unpack_from(found)
    text = bytes(content[_HEADER.size : _HEADER.size + min(size, 1 << 16)])
    if len(text) != size or zlib.crc32(text) != crc:
        raise StoreError(f"{path}: the header is damaged; {REMEDY}")
    wanted = json.loads(expected[_HEADER.size :])
    try:
        document = dict(parse_json(text))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: the header is damaged ({error}); {REMEDY}") from error
    differing = [key for key in wanted if document.get(key) != wanted[key]]
    raise StoreError(
        f"{path} belongs to another store: "
        + ", ".join(f"{key} {document.get(key)!r}, expected {wanted[key]!r}" for key in differing)
        + f"; {REMEDY}"
    )


def pack_frame(tag: bytes, payload: bytes, first: int = 0, sequences: int = 0, tokens: int = 0) -> bytes:
    """Return a frame."""
    head = _FRAME.pack(tag, len(payload), first, sequences, tokens)
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def read_frame(content: Buffer, offset: int, name: str) -> tuple[Frame, memoryview]:
    """Read the frame at an offset.

    Args:
        content: The file, as a buffer.
        offset: Where the frame begins.
        name: Of the file and the frame, for messages.

    Raises:
        StoreError: If it is cut off or damaged.
    """
    view = memoryview(content)
    if offset < 0 or len(view) - offset < FRAME_BYTES:
        raise StoreError(f"{name} is cut off: the file ends after {len(view)} bytes; {REMEDY}")
    tag, size, first, sequences, tokens = _FRAME.unpack_from(view, offset)
    frame = Frame(tag, offset, size, first, sequences, tokens)
    if frame.tag not in (BLOCK, TABLE, INDEX) or size > MOST_FRAME_BYTES:
        raise StoreError(f"{name} is damaged: no frame begins at byte {offset}; {REMEDY}")
    if frame.end > len(view):
        raise StoreError(f"{name} is cut off: it ends at byte {frame.end} of {len(view)}; {REMEDY}")
    payload = view[offset + FRAME_BYTES : frame.end]
    (crc,) = _CRC.unpack_from(view, offset + _FRAME.size)
    if zlib.crc32(payload, zlib.crc32(view[offset : offset + _FRAME.size])) != crc:
        raise StoreError(f"{name} is damaged: its checksum is not that of its bytes; {REMEDY}")
    return frame, payload


def whole_frames(content: Buffer, start: int, name: str) -> Iterator[tuple[Frame, memoryview]]:
    """Yield the frames of a shard up to the first that is not whole."""
    offset = start
    while True:
        try:
            frame, payload = read_frame(content, offset, name)
        except StoreError:
            return
        yield frame, payload
        offset = frame.end


class IndexEntry(NamedTuple):
    """A block in the index.

    Attributes:
        offset: Of its frame.
        table: Offset of its table's frame.
        first: First sequence.
        sequences: Number of sequences.
        tokens: Number of supervised positions.
    """

    offset: int
    table: int
    first: int
    sequences: int
    tokens: int


class Index(NamedTuple):
    """What the last frame of a shard says.

    Attributes:
        blocks: In the order of the file.
        numbers: Of all sequences, ascending, int64.
    """

    blocks: list[IndexEntry]
    numbers: NDArray[np.int64]


def pack_index(index: Index) -> bytes:
    """Return the payload of the index frame: how many blocks there are, the blocks, the sequences."""
    blocks = np.array(index.blocks, "<i8").tobytes()
    return _COUNT.pack(len(index.blocks)) + blocks + index.numbers.astype("<i8").tobytes()


def read_index(content: Buffer, path: Path) -> Index:
    """Read the index at the end of a shard.

    Raises:
        StoreError: If the shard is unfinished, cut off or damaged there.
    """
    tail = content[-END.size :]
    if len(tail) < END.size or not tail.endswith(END_MAGIC):
        raise StoreError(f"{path} is unfinished or cut off; score this shard again to complete it")
    offset, _ = END.unpack(tail)
    frame, payload = read_frame(content, min(offset, len(content)), f"{path}: the index")
    width = len(IndexEntry._fields)
    if frame.tag == INDEX and frame.end + END.size == len(content) and len(payload) % 8 == 0 and payload:
        (count,) = _COUNT.unpack_from(payload)
        if 8 + 8 * width * count <= len(payload):
            blocks = np.frombuffer(payload, "<i8", width * count, 8).reshape(-1, width)
            numbers = np.frombuffer(payload, "<i8", offset=8 + 8 * width * count).astype(np.int64)
            firsts = np.cumsum(blocks[:, 3]) - blocks[:, 3]
            if (
                (blocks >= 0).all()
                and (np.diff(blocks[:, 0]) > 0).all()
                and (np.diff(numbers) > 0).all()
                and (blocks[:, 3] > 0).all()
                and blocks[:, 3].max(initial=0) <= len(numbers) == blocks[:, 3].sum()
                and (numbers[firsts] == blocks[:, 2]).all()
            ):
                return Index([IndexEntry(*row) for row in blocks.tolist()], numbers)
    raise StoreError(f"{path}: the index is damaged; {REMEDY}")
