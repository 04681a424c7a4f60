"""What a worker without the files and the head say to each other about weights.

The worker asks for the index, and then for extents by their number in it.
"""

from __future__ import annotations

import msgspec

PIECE_BYTES = 1 << 20


# ---- worker to head -----------------------------------------------------------------------


class AskIndex(
    msgspec.Struct, frozen=True, kw_only=True, tag="ask-index", forbid_unknown_fields=True
):
    """Answered by Index, and by Preparing as long as the head computes its digests."""


class AskExtents(
    msgspec.Struct, frozen=True, kw_only=True, tag="ask-extents", forbid_unknown_fields=True
):
    """Answered by the Pieces of these extents, in this order."""

    extents: tuple[int, ...]


# ---- head to worker -----------------------------------------------------------------------


class Preparing(
    msgspec.Struct, frozen=True, kw_only=True, tag="preparing", forbid_unknown_fields=True
):
    done_bytes: int
    total_bytes: int | None


class Index(msgspec.Struct, frozen=True, kw_only=True, tag="index", forbid_unknown_fields=True):
    """A SharedIndex follows as the frame's body."""

    model: str


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag="piece", forbid_unknown_fields=True):
    """Up to PIECE_BYTES of an extent follow as the frame's body; `start` is within the extent."""

    extent: int
    start: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", forbid_unknown_fields=True):
    """The request cannot be answered; and nothing more will be answered."""

    reason: str


FromFetcher = AskIndex | AskExtents
FromProvider = Preparing | Index | Piece | Refused
