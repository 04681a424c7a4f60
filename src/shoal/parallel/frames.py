"""The fixed prefix of a frame: magic, version, sequence number, the two lengths, and a checksum.

A frame is this prefix, then `header_bytes` of header, then `body_bytes` of body.
"""

from __future__ import annotations

import struct
import zlib

from shoal.errors import FrameError

MAGIC = b"SHOL"
VERSION = 1
MAX_HEADER_BYTES = 64 * 2**20
MAX_BODY_BYTES = 2**30

_FIELDS = struct.Struct("!4sIQIQ")
_CHECKSUM = struct.Struct("!I")
_PREFIX = struct.Struct("!4sIQIQI")
PREFIX_BYTES = _PREFIX.size


def encode_prefix(sequence: int, header_bytes: int, body_bytes: int) -> bytes:
    """The prefix of a connection's frame number `sequence`. Raises FrameError if it is too big."""
    _check_lengths(header_bytes, body_bytes)
    fields = _FIELDS.pack(MAGIC, VERSION, sequence, header_bytes, body_bytes)
    return fields + _CHECKSUM.pack(zlib.crc32(fields))


def decode_prefix(prefix: bytes | bytearray | memoryview, *, sequence: int) -> tuple[int, int]:
    """(header_bytes, body_bytes) of the frame that must be number `sequence`.

    Raises FrameError for bytes that are not such a prefix, are damaged, or come out of turn.
    """
    if len(prefix) != PREFIX_BYTES:
        raise FrameError(f"a frame's prefix has {PREFIX_BYTES} bytes, not {len(prefix)}")
    magic, version, number, header_bytes, body_bytes, checksum = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FrameError(f"not a Shoal frame: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame of version {version}, not {VERSION}: run one Shoal everywhere")
    if checksum != zlib.crc32(prefix[: _FIELDS.size]):
        raise FrameError("a frame's prefix was damaged on the way: its checksum is wrong")
    if number != sequence:
        raise FrameError(f"frame number {number} where {sequence} is due: replayed or left out")
    _check_lengths(header_bytes, body_bytes)
    return header_bytes, body_bytes


def _check_lengths(header_bytes: int, body_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise FrameError(
            f"a frame of {header_bytes} + {body_bytes} bytes: at most {MAX_HEADER_BYTES} of "
            f"header and {MAX_BODY_BYTES} of body may travel at once"
        )
