"""Draws and log-probabilities by the native kernels, a row a part: each as if it were alone.

`compute.sampler` says what is drawn and is the way without them. N rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoal.compute.native import is_plain
from shoal.compute.race import LEAST_TEMPERATURE, LIKELY, draw_key
from shoal.kernels import kernels
from shoal.messages import Sampling, TokenLogprobs

if TYPE_CHECKING:
    from shoal_kernels import Draw


def can_sample(logits_NV: torch.Tensor) -> bool:
    """Whether the kernels take such rows where they lie."""
    return kernels is not None and is_plain(logits_NV)


def draw(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """A token for each row."""
    draws = [_draw(row, sampling) for row, sampling in enumerate(samplings)]
    tokens: list[int] = kernels.draw(*_at(logits_NV), draws, LIKELY)
    return tokens


def _draw(row: int, sampling: Sampling) -> Draw:
    if sampling.temperature == 0.0:
        return kernels.Draw(row, 0, 0.0, 0, 1.0, 0.0)
    return kernels.Draw(
        row,
        draw_key(sampling.seed, sampling.position),
        max(sampling.temperature, LEAST_TEMPERATURE),
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
    )


def token_logprobs(
    logits_NV: torch.Tensor, rows: list[int], targets: list[int], num_top: list[int]
) -> list[TokenLogprobs]:
    wanted = [kernels.Wanted(*each) for each in zip(rows, targets, num_top, strict=True)]
    return [
        TokenLogprobs(scores.target, scores.best_ids, scores.best)
        for scores in kernels.score(*_at(logits_NV), wanted)
    ]


def _at(logits_NV: torch.Tensor) -> tuple[int, int, int]:
    return logits_NV.data_ptr(), logits_NV.stride(0), logits_NV.shape[1]
