"""From a few layers and a small vocabulary to a whole model: a line through what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import msgspec

from bench.roofline import Load, Shape


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a step. `ms` is not measured: it is the line at all layers, with the head of
    all the vocabulary. `misfit` is how far the worst measured point lies from the line, as a share.
    """

    num_layers: int
    layer_ms: float
    head_ms: float
    rest_ms: float
    misfit: float

    @property
    def ms(self) -> float:
        return self.rest_ms + self.head_ms + self.num_layers * self.layer_ms


def extrapolate(
    step_ms: Mapping[int, float], *, head_ms: float, vocabulary_scale: float, num_layers: int
) -> Whole:
    """`step_ms` by number of layers; `head_ms` of each of them is the output head and the drawing
    of tokens, which grow with the vocabulary. Raises ValueError for fewer than two numbers.
    """
    if len(step_ms) < 2:
        raise ValueError(f"a line needs steps of two numbers of layers, not of {list(step_ms)}")
    layer_ms, at_none_ms = statistics.linear_regression(list(step_ms), list(step_ms.values()))
    misfits = [abs(at_none_ms + layer_ms * n - ms) / ms for n, ms in step_ms.items()]
    return Whole(
        num_layers=num_layers,
        layer_ms=layer_ms,
        head_ms=head_ms * vocabulary_scale,
        rest_ms=at_none_ms - head_ms,
        misfit=max(misfits),
    )


class Extrapolated(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model, which has not been measured, at a load that has."""

    model: str
    work: str
    load: Load
    shape: Shape
    whole: Whole

    @property
    def tokens_per_s(self) -> float:
        return self.load.rows / self.whole.ms * 1e3
