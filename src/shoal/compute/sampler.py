"""From logits to tokens, a whole batch at once. Randomness is a pure function of (seed, position).

Order, as in transformers: bias and penalties, temperature, top-k, top-p, min-p. Reported
log-probabilities are those of the model itself, before any of these.
"""

from __future__ import annotations

import torch

from shoal.compute import native_sampling
from shoal.compute.native_sampling import can_sample
from shoal.compute.penalties import adjust_logits, needs_adjusting
from shoal.compute.race import LEAST_TEMPERATURE, draw, draw_among, draw_key, mix
from shoal.messages import Sampling, TokenLogprobs

# top-k and top-p look at this many best tokens first: a partial sort is 20 times cheaper than
# sorting a vocabulary, and the count must not depend on the batch or ties would.
NUM_CANDIDATES = 1024

_MASK = 2**64 - 1


def sample(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """One token id per row of float32 logits [N, V]; logits are overwritten where adjusted."""
    for row, sampling in enumerate(samplings):
        if needs_adjusting(sampling):
            adjust_logits(logits_NV[row], sampling)
    return (native_sampling.draw if can_sample(logits_NV) else _draw)(logits_NV, samplings)


def _draw(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """By torch, on any device. What the native kernels draw is held against it."""
    random = {row: s for row, s in enumerate(samplings) if s.temperature > 0.0}
    # All rows at once, drawn or not: to take some out would copy them.
    tokens = _best(logits_NV) if len(random) < len(samplings) else [0] * len(samplings)
    dense = {row: s for row, s in random.items() if not _truncates(s)}
    truncated = {row: s for row, s in random.items() if _truncates(s)}
    for some, draw_each in ((dense, _draw_from_all), (truncated, _draw_from_best)):
        if some:
            drawn = draw_each(logits_NV[list(some)], list(some.values()))
            for row, token in zip(some, drawn, strict=True):
                tokens[row] = token
    return tokens


def _best(logits_NV: torch.Tensor) -> list[int]:
    """The first of the highest in each row."""
    # numpy's is in vectors, and tens of times faster than torch's on a processor.
    on_host = logits_NV.device.type == "cpu"
    best: list[int] = (logits_NV.numpy() if on_host else logits_NV).argmax(-1).tolist()
    return best


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request; sample 0 keeps the request's own."""
    return seed if index == 0 else mix((seed & _MASK) ^ mix(index)) >> 1


def token_logprobs(
    logits_NV: torch.Tensor, rows: list[int], targets: list[int], num_top: list[int]
) -> list[TokenLogprobs]:
    """Log-probability of some rows' targets and of their `num_top` best tokens."""
    if can_sample(logits_NV):
        return native_sampling.token_logprobs(logits_NV, rows, targets, num_top)
    logprobs_NV = logits_NV[rows].log_softmax(dim=-1)
    chosen = logprobs_NV.gather(1, torch.tensor(targets).unsqueeze(1).to(logits_NV.device))
    best = logprobs_NV.topk(max(1, max(num_top)))
    scores = zip(
        chosen.squeeze(1).tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        num_top,
        strict=True,
    )
    return [TokenLogprobs(value, ids[:n], values[:n]) for value, ids, values, n in scores]


def _truncates(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0


def _draw_from_all(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """Rows without top-k and top-p: no order needed, the vocabulary's own will do."""
    probs_NV = _apply_min_p(_tempered(logits_NV, samplings).softmax(dim=-1), samplings)
    return draw(probs_NV, _keys(samplings))


def _draw_from_best(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """Rows with top-k or top-p, from the best candidates if they are sure to be enough."""
    tempered_NV = _tempered(logits_NV, samplings)
    values_NC, ids_NC = _ordered_best(tempered_NV, min(NUM_CANDIDATES, tempered_NV.shape[-1]))
    # A row's probabilities are of its top-k tokens where that is set, else of the vocabulary.
    total_N1 = tempered_NV.logsumexp(dim=-1, keepdim=True)
    probs_NC = (values_NC - total_N1).exp()
    enough = _are_enough(values_NC, probs_NC, samplings, tempered_NV.shape[-1])
    tokens = [0] * len(samplings)
    rows = [row for row, is_enough in enumerate(enough) if is_enough]
    if rows:
        chosen = [samplings[row] for row in rows]
        drawn = _draw_sorted(probs_NC[rows], ids_NC[rows], chosen)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    for row in (row for row, is_enough in enumerate(enough) if not is_enough):
        # The slow road for a flat distribution: sort the whole vocabulary.
        ordered = tempered_NV[row : row + 1].sort(dim=-1, descending=True, stable=True)
        probs_1V = ordered.values.softmax(dim=-1)
        [tokens[row]] = _draw_sorted(probs_1V, ordered.indices, [samplings[row]])
    return tokens


def _ordered_best(tempered_NV: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest values and their tokens; equal ones in the order of these, which topk is not."""
    best = tempered_NV.topk(number, dim=-1)
    by_id = best.indices.sort(dim=-1)
    by_value = best.values.gather(1, by_id.indices).sort(dim=-1, descending=True, stable=True)
    return by_value.values, by_id.values.gather(1, by_value.indices)


def _are_enough(
    values_NC: torch.Tensor, probs_NC: torch.Tensor, samplings: list[Sampling], num_tokens: int
) -> list[bool]:
    """Whether what is cut off ends among the candidates, and before those that tie with others."""
    if values_NC.shape[-1] == num_tokens:
        return [True] * len(samplings)
    is_sure_NC = values_NC > values_NC[:, -1:]
    masses = (probs_NC * is_sure_NC).sum(dim=-1).tolist()
    numbers = is_sure_NC.sum(dim=-1).tolist()
    return [
        number >= s.top_k if s.top_k > 0 else mass >= s.top_p
        for s, number, mass in zip(samplings, numbers, masses, strict=True)
    ]


def _draw_sorted(
    probs_NC: torch.Tensor, ids_NC: torch.Tensor, samplings: list[Sampling]
) -> list[int]:
    """From probabilities in falling order and their tokens, after top-k, top-p and min-p."""
    num_columns = probs_NC.shape[-1]
    top_k = torch.tensor([s.top_k if s.top_k > 0 else num_columns for s in samplings]).unsqueeze(1)
    kept_NC = probs_NC.double().masked_fill(torch.arange(num_columns) >= top_k, 0.0)
    has_top_k = torch.tensor([s.top_k > 0 for s in samplings]).unsqueeze(1)
    kept_NC = torch.where(has_top_k, kept_NC / kept_NC.sum(dim=-1, keepdim=True), kept_NC)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64).unsqueeze(1)
    mass_before_NC = kept_NC.cumsum(dim=-1) - kept_NC
    # The best token always stays, whatever top_p says.
    beyond_NC = (mass_before_NC >= top_p) & (torch.arange(num_columns) > 0)
    speeds_NC = _apply_min_p(kept_NC.masked_fill(beyond_NC, 0.0), samplings)
    return draw_among(speeds_NC, ids_NC, _keys(samplings))


def _keys(samplings: list[Sampling]) -> list[int]:
    return [draw_key(s.seed, s.position) for s in samplings]


def _tempered(logits_NV: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """Shifted so that the best is 0: a tiny temperature must not overflow into inf - inf."""
    temperatures = (
        torch.tensor([s.temperature for s in samplings]).clamp_min(LEAST_TEMPERATURE).unsqueeze(1)
    )
    return (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperatures


def _apply_min_p(probs: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    if all(s.min_p == 0.0 for s in samplings):
        return probs
    min_p = torch.tensor([s.min_p for s in samplings], dtype=probs.dtype).unsqueeze(1)
    return probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
