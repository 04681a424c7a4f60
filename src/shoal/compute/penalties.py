"""What a request changes in its own logits before a token is drawn."""

from __future__ import annotations

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
        ids, counts = torch.unique(torch.tensor(sampling.output_history), return_counts=True)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits_V.dtype)
    if sampling.banned_ids:
        logits_V[torch.tensor(sampling.banned_ids)] = -torch.inf


def _repetition(logits_V: torch.Tensor, sampling: Sampling) -> None:
    """CTRL's penalty (Keskar et al., 2019) over prompt and answer, as in transformers."""
    ids = torch.unique(torch.tensor(sampling.prompt_history + sampling.output_history))
    seen = logits_V[ids]
    penalty = sampling.repetition_penalty
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    # A tiny penalty must not make an infinity: inf - inf later on is no number to draw by.
    logits_V[ids] = penalised.clamp_max(torch.finfo(seen.dtype).max)
