"""What a request changes in its own logits before a token is drawn."""

from __future__ import annotations

from array import array

import numpy as np
import torch

from shoal.messages import Sampling


def needs_adjusting(sampling: Sampling) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.banned_ids
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def adjust_logits(logits_V: torch.Tensor, sampling: Sampling) -> None:
    """Penalties, bias and bans, in place."""
    if sampling.repetition_penalty != 1.0:
        _repetition(logits_V, sampling)
    if sampling.output_history and (sampling.presence_penalty or sampling.frequency_penalty):
        _presence_and_frequency(logits_V, sampling)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits_V.dtype)
    if sampling.banned_ids:
        logits_V[torch.tensor(sampling.banned_ids)] = -torch.inf


def _repetition(logits_V: torch.Tensor, sampling: Sampling) -> None:
    """CTRL's penalty (Keskar et al., 2019) over prompt and answer, as in transformers."""
    # A token that comes twice becomes the same twice.
    ids = torch.from_numpy(_ids(sampling.prompt_history + sampling.output_history))
    seen = logits_V[ids]
    penalty = sampling.repetition_penalty
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    # A tiny penalty must not make an infinity: inf - inf later on is no number to draw by.
    logits_V[ids] = penalised.clamp_max(torch.finfo(seen.dtype).max)


def _presence_and_frequency(logits_V: torch.Tensor, sampling: Sampling) -> None:
    unique = np.unique(_ids(sampling.output_history), return_counts=True)
    ids, counts = (torch.from_numpy(each) for each in unique)
    logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _ids(history: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # Several times as fast as torch and numpy read a list.
    return np.frombuffer(array("q", history), dtype=np.int64)
