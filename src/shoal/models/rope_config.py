"""Rotary position embeddings as a checkpoint's configuration describes them. Pure values.

Both spellings are read: `rope_parameters` (nested per layer type where layers differ) and the
older `rope_theta` with `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.errors import SourceError, UnsupportedModel

DEFAULT_THETA = 10_000.0


class DefaultRope(msgspec.Struct, frozen=True, kw_only=True):
    theta: float


class LinearRope(msgspec.Struct, frozen=True, kw_only=True):
    theta: float
    factor: float


class Llama3Rope(msgspec.Struct, frozen=True, kw_only=True):
    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class YarnRope(msgspec.Struct, frozen=True, kw_only=True):
    theta: float
    factor: float
    original_context: int
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class FactorsRope(msgspec.Struct, frozen=True, kw_only=True):
    """One divisor per frequency, as GGUF stores the long-context variants of Llama."""

    theta: float
    factors: tuple[float, ...]


Rope = DefaultRope | LinearRope | Llama3Rope | YarnRope | FactorsRope

SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn", "freq_factors")


def ropes_by_layer_type(raw: Mapping[str, Any], max_positions: int) -> dict[str, Rope]:
    """The rope of "full_attention" and of "sliding_attention" layers.

    Raises UnsupportedModel for a rope type that is not supported, SourceError when one of its
    parameters is missing.
    """
    theta = float(raw.get("rope_theta") or DEFAULT_THETA)
    local_theta = raw.get("rope_local_base_freq")
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full = parameters.get("full_attention") or {}
        sliding = parameters.get("sliding_attention") or {}
    else:
        # The local rope of a two-theta family is never scaled: only full attention reaches far.
        full, sliding = parameters, parameters if local_theta is None else {}
    return {
        "full_attention": _rope(full, theta, max_positions),
        "sliding_attention": _rope(sliding, float(local_theta or theta), max_positions),
    }


def _rope(parameters: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters.get("rope_theta") or theta)
    if float(parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embeddings (partial_rotary_factor) are unsupported")
    try:
        return _rope_of_kind(str(kind), parameters, theta, max_positions)
    except KeyError as missing:
        raise SourceError(f"the rope parameters of type '{kind}' lack {missing}") from None


def _rope_of_kind(
    kind: str, parameters: Mapping[str, Any], theta: float, max_positions: int
) -> Rope:
    original_context = int(parameters.get("original_max_position_embeddings") or max_positions)
    match kind:
        case "default":
            return DefaultRope(theta=theta)
        case "linear":
            return LinearRope(theta=theta, factor=float(parameters["factor"]))
        case "llama3":
            return Llama3Rope(
                theta=theta,
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_context=original_context,
            )
        case "yarn":
            return YarnRope(
                theta=theta,
                factor=float(parameters.get("factor") or max_positions / original_context),
                original_context=original_context,
                attention_factor=parameters.get("attention_factor"),
                mscale=parameters.get("mscale"),
                mscale_all_dim=parameters.get("mscale_all_dim"),
                beta_fast=float(parameters.get("beta_fast") or 32.0),
                beta_slow=float(parameters.get("beta_slow") or 1.0),
                truncate=bool(parameters.get("truncate", True)),
            )
        case "freq_factors":
            return FactorsRope(theta=theta, factors=tuple(map(float, parameters["factors"])))
    raise UnsupportedModel(
        f"rope type '{kind}' is unsupported; supported are {', '.join(SUPPORTED_TYPES)}"
    )
