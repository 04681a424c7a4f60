"""From a plan's chunks to the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

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
    prompts = [chunk for chunk in chunks if not _is_decode(chunk)]
    ordered = decodes + prompts
    lengths = np.array([len(chunk.tokens) for chunk in ordered])
    ends = lengths.cumsum()
    tokens = np.concatenate([np.asarray(chunk.tokens) for chunk in ordered])
    positions = np.concatenate([np.arange(c.start, c.start + len(c.tokens)) for c in ordered])
    slots = [_slots(chunk, block_size) for chunk in ordered]
    new_slots = [_new_slots(c, s, block_size) for c, s in zip(ordered, slots, strict=True)]
    groups = _decode_groups(decodes, slots[: len(decodes)], (ends - lengths).tolist())
    for row, chunk in enumerate(prompts, start=len(decodes)):
        groups.append(_prompt_group(chunk, slots[row], int(ends[row])))
    return Batch(
        chunks=ordered,
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        slots_T=torch.from_numpy(np.concatenate(new_slots)),
        groups=groups,
        last_rows=(ends - 1).tolist(),
    )


def _slots(chunk: Chunk, block_size: int) -> np.ndarray:
    """Where tokens 0 … start + len(tokens) of a sequence lie."""
    blocks = np.asarray(chunk.block_ids)[:, None] * block_size
    slots: np.ndarray = (blocks + np.arange(block_size)).reshape(-1)
    return slots[: chunk.start + len(chunk.tokens)]


def _new_slots(chunk: Chunk, slots: np.ndarray, block_size: int) -> np.ndarray:
    """Where its own tokens are stored."""
    if chunk.is_cached:
        block, offset = divmod(len(slots), block_size)
        return np.array([chunk.block_ids[block] * block_size + offset])
    return slots[chunk.start :]


def _is_decode(chunk: Chunk) -> bool:
    """One token that is known, and perhaps guesses behind it."""
    return len(chunk.tokens) == 1 + chunk.num_drafted


def _decode_groups(
    chunks: list[Chunk], slots: list[np.ndarray], first_rows: list[int]
) -> list[Group]:
    """Of as many tokens each, cut where padding would cost too much."""
    groups = []
    first = 0
    while first < len(chunks):
        num_tokens = len(chunks[first].tokens)
        limit = max(_MIN_KEYS, int((chunks[first].start + num_tokens) * _MAX_PADDING))
        stop = first + 1
        while stop < len(chunks) and _is_alike(chunks[stop], num_tokens, limit):
            stop += 1
        groups.append(_decode_group(first_rows[first], chunks[first:stop], slots[first:stop]))
        first = stop
    return groups


def _is_alike(chunk: Chunk, num_tokens: int, most_keys: int) -> bool:
    return len(chunk.tokens) == num_tokens and chunk.start + num_tokens <= most_keys


def _decode_group(first_row: int, chunks: list[Chunk], slots: list[np.ndarray]) -> Group:
    num_tokens = len(chunks[0].tokens)
    longest = max(len(s) for s in slots)
    # Padding points at a sequence's own first slot: always allocated, always masked.
    padded = np.stack([np.pad(s, (0, longest - len(s)), constant_values=s[0]) for s in slots])
    positions = np.array([[chunk.start] for chunk in chunks]) + np.arange(num_tokens)
    return Group(
        start=first_row,
        stop=first_row + len(chunks) * num_tokens,
        slots_BL=torch.from_numpy(padded),
        positions_BQ=torch.from_numpy(positions),
    )


def _prompt_group(chunk: Chunk, slots: np.ndarray, end_row: int) -> Group:
    num_tokens = len(chunk.tokens)
    positions = np.arange(chunk.start, chunk.start + num_tokens)[None]
    return Group(
        start=end_row - num_tokens,
        stop=end_row,
        slots_BL=torch.from_numpy(slots[None].copy()),
        positions_BQ=torch.from_numpy(positions),
    )
