"""From a plan's chunks to the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from shoal.compute.attention import Group
from shoal.messages import Chunk

# A group of decodes is padded to its longest; a shorter sequence starts a new group when
# padding would more than double its work. Few groups or little padding: one costs calls per
# layer, the other memory traffic.
_MAX_PADDING = 2.0
_MIN_KEYS = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one after the other: decodes first, by tokens and by length.

    `last_rows[i]` is the row of chunk i's last token.
    """

    chunks: list[Chunk]
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    groups: list[Group]
    last_rows: list[int]


def build_batch(chunks: list[Chunk], block_size: int) -> Batch:
    """Lay out a plan's chunks; the order of the batch's chunks is its own."""
    decodes = sorted(filter(_is_decode, chunks), key=lambda chunk: (len(chunk.tokens), chunk.start))
    together = _alike(decodes) + [[chunk] for chunk in chunks if not _is_decode(chunk)]
    ordered = [chunk for some in together for chunk in some]
    groups: list[Group] = []
    for some in together:
        groups.append(_group(groups[-1].stop if groups else 0, some, block_size))
    slots_T = torch.cat([g.slots_BL.gather(1, g.positions_BQ).flatten() for g in groups])
    last_rows = [row - 1 for row in accumulate(len(chunk.tokens) for chunk in ordered)]
    for row, chunk in zip(last_rows, ordered, strict=True):
        if chunk.is_cached:
            slots_T[row] = _slot(chunk, chunk.start + 1, block_size)
    return Batch(
        chunks=ordered,
        tokens_T=torch.tensor([token for chunk in ordered for token in chunk.tokens]),
        positions_T=torch.cat([group.positions_BQ.flatten() for group in groups]),
        slots_T=slots_T,
        groups=groups,
        last_rows=last_rows,
    )


def _is_decode(chunk: Chunk) -> bool:
    """One token that is known, and perhaps guesses behind it."""
    return len(chunk.tokens) == 1 + chunk.num_drafted


def _alike(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Of as many tokens each, cut where padding would cost too much."""
    together: list[list[Chunk]] = []
    most_keys = 0
    for chunk in chunks:
        num_tokens, num_keys = len(chunk.tokens), chunk.start + len(chunk.tokens)
        if not together or num_tokens != len(together[-1][0].tokens) or num_keys > most_keys:
            together.append([])
            most_keys = max(_MIN_KEYS, int(num_keys * _MAX_PADDING))
        together[-1].append(chunk)
    return together


def _group(first_row: int, chunks: list[Chunk], block_size: int) -> Group:
    num_tokens = len(chunks[0].tokens)
    starts = np.array([chunk.start for chunk in chunks])[:, None]
    return Group(
        start=first_row,
        stop=first_row + len(chunks) * num_tokens,
        slots_BL=torch.from_numpy(_slots(chunks, starts + num_tokens, block_size)),
        positions_BQ=torch.from_numpy(starts + np.arange(num_tokens)),
    )


def _slot(chunk: Chunk, position: int, block_size: int) -> int:
    block, offset = divmod(position, block_size)
    return chunk.block_ids[block] * block_size + offset


def _slots(chunks: list[Chunk], lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Where tokens 0 … length of each sequence lie; lengths [B, 1].

    Padding points at a sequence's own first slot: always allocated, always masked.
    """
    longest = int(lengths.max())
    num_blocks = -(-longest // block_size)
    blocks = np.zeros((len(chunks), num_blocks), np.int64)
    for row, chunk in zip(blocks, chunks, strict=True):
        own = chunk.block_ids[:num_blocks]
        row[: len(own)] = own
    slots = (blocks[:, :, None] * block_size + np.arange(block_size)).reshape(len(chunks), -1)
    slots = slots[:, :longest]
    padded: np.ndarray = np.where(np.arange(longest) < lengths, slots, slots[:, :1])
    return padded
