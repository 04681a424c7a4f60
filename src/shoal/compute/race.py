"""Draws by an exponential race: token i arrives at E_i / p_i, and the first to arrive is drawn.

That follows the distribution p (as the Gumbel-max trick does, see Maddison, Tarlow and Minka,
2014), and E_i depends on (seed, position, i) alone. So another rounding of p, as a recomputation
in another batch brings, changes a draw only where two tokens arrive together; inverting the running
sum of p would move with every rounding before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

LIKELY = 1e-5
"""Tokens below this race as one, and among themselves only if that one wins."""

LEAST_TEMPERATURE = 1e-5
"""One that is smaller is as good as 0, and would make infinities."""


def draw_key(seed: int, position: int) -> int:
    """64 bits for a seed and a position: splitmix64's finaliser (Steele, Lea and Flood, 2014),
    applied to the position and then to the seed."""
    return mix((seed & _MASK) ^ mix((position + _GOLDEN) & _MASK))


def draw(probs_NV: torch.Tensor, keys: Sequence[int]) -> list[int]:
    """A token per row, in proportion to probabilities that need not add up to 1."""
    num_rows, num_tokens = probs_NV.shape
    is_likely_NV = probs_NV >= LIKELY
    rest_N = probs_NV.masked_fill(is_likely_NV, 0.0).sum(dim=-1, dtype=torch.float64)
    rows_P, ids_P = is_likely_NV.nonzero(as_tuple=True)
    every_row = torch.arange(num_rows, device=probs_NV.device)
    speeds_P = torch.cat((probs_NV[rows_P, ids_P].double(), rest_N))
    rows_P = torch.cat((rows_P, every_row))
    ids_P = torch.cat((ids_P, torch.full_like(every_row, num_tokens)))  # an id that no token has
    arrivals_P = exponentials(ids_P, _signed_keys(keys, probs_NV)[rows_P]) / speeds_P
    best_N = torch.full((num_rows,), torch.inf, dtype=torch.float64, device=probs_NV.device)
    best_N.scatter_reduce_(0, rows_P, arrivals_P, "amin")
    winners_P = (arrivals_P == best_N[rows_P]).nonzero().squeeze(1)
    tokens = torch.zeros_like(every_row)
    tokens[rows_P[winners_P]] = ids_P[winners_P]
    drawn = tokens.tolist()
    for row in [row for row, token in enumerate(drawn) if token == num_tokens]:
        unlikely = (~is_likely_NV[row]).nonzero().squeeze(1)
        speeds_1U = probs_NV[row, unlikely].double().unsqueeze(0)
        drawn[row] = draw_among(speeds_1U, unlikely.unsqueeze(0), [keys[row]])[0]
    return drawn


def draw_among(speeds_NC: torch.Tensor, ids_NC: torch.Tensor, keys: Sequence[int]) -> list[int]:
    """A token per row of those that are named; speeds are float64, and 0 never arrives."""
    keys_N1 = _signed_keys(keys, speeds_NC).unsqueeze(1)
    arrivals_NC = exponentials(ids_NC, keys_N1) / speeds_NC
    drawn: list[int] = (
        ids_NC.gather(1, arrivals_NC.argmin(dim=-1, keepdim=True)).squeeze(1).tolist()
    )
    return drawn


def exponentials(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Exponentially distributed float64, one for each id under its key (int64 as the ids are)."""
    z = ids * _signed(_GOLDEN) + keys
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    z = z ^ _shifted(z, 31)
    # In (0, 1): a 0 would win whatever its probability.
    uniform = (_shifted(z, 11).double() + 0.5) * 2.0**-53
    return -torch.log1p(-uniform)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _signed_keys(keys: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([_signed(key) for key in keys], device=like.device)
