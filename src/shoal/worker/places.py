"""Where a step's tokens lie in a paged cache, and what they attend to.

B sequences of Q new tokens each, L the longest with them, T tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from shoal.compute.attention import Group
from shoal.kernels import kernels
from shoal.messages import Chunk

if TYPE_CHECKING:
    from shoal_kernels import Step


@dataclass(frozen=True, slots=True)
class Places:
    slots_T: torch.Tensor
    """Where they are stored: a cached token ahead of its place, which others may read."""
    groups: list[Group]

    def to(self, device: str) -> Places:
        groups = [
            Group(each.start, each.stop, each.slots_BL.to(device), each.positions_BQ.to(device))
            for each in self.groups
        ]
        return Places(self.slots_T.to(device), groups)


def native_places(together: list[list[Chunk]], block_size: int) -> Step:
    """Of chunks that are attended to together, each of as many tokens as the others."""
    # No tensors: each costs microseconds, and a step of one token has few of them.
    step = kernels.Step(block_size)
    for chunks in together:
        step.add(
            [chunk.start for chunk in chunks],
            [int(chunk.is_cached) for chunk in chunks],
            [chunk.block_ids for chunk in chunks],
            len(chunks[0].tokens),
        )
    return step


def find_places(together: list[list[Chunk]], block_size: int) -> Places:
    """The same as tensors, for kernels that want them."""
    groups: list[Group] = []
    slots: list[torch.Tensor] = []
    for chunks in together:
        group = _group(groups[-1].stop if groups else 0, chunks, block_size)
        groups.append(group)
        slots.append(group.slots_BL.gather(1, group.positions_BQ).flatten())
    slots_T = torch.cat(slots)
    for group, chunks in zip(groups, together, strict=True):
        for row, chunk in enumerate(chunks, group.start):
            if chunk.is_cached:
                slots_T[row] = _slot(chunk, chunk.start + 1, block_size)
    return Places(slots_T, groups)


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
