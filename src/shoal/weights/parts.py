"""Reads a checkpoint's tensors by the names of the model's parts, several fused into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shoal.compute.affine import Affine4
from shoal.compute.linear import Linear, Scheme, make_linear
from shoal.parallel.partition import Span
from shoal.weights.tensors import TensorSource

Rows = tuple[str, Span | None]
"""A part's name and the rows wanted of it; None is all."""


class Parts:
    """`names` maps a part's name to the checkpoint's name for it."""

    def __init__(self, source: TensorSource, names: Mapping[str, str], scheme: Scheme) -> None:
        self._source = source
        self._names = names
        self._scheme = scheme

    def has(self, name: str) -> bool:
        """Whether the model has this part; `inventory.check` made sure that the file has it."""
        return name in self._names

    def vector(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._source.dense(self._names[name]).to(dtype or self._scheme.dtype)

    def matrix(
        self, name: str, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor | Affine4:
        """[N, K], kept in 4 bits where the file holds it so and the scheme quantises."""
        row_slice, column_slice = _slice(rows), _slice(columns)
        if self._scheme.few in ("int4", "as_stored"):
            packed = self._source.affine4(self._names[name], row_slice, column_slice)
            if packed is not None:
                return packed
        return self._source.dense(self._names[name], row_slice, column_slice)

    def linear(self, *parts: Rows, columns: Span | None = None, with_bias: bool = True) -> Linear:
        """One linear layer whose rows are those of `parts`, one after the other.

        `parts` are names without ".weight" and ".bias"; a part without a bias makes none.
        """
        weights = [self.matrix(f"{name}.weight", rows, columns) for name, rows in parts]
        biases = [
            self._source.dense(self._names[f"{name}.bias"], _slice(rows))
            for name, rows in parts
            if with_bias and self.has(f"{name}.bias")
        ]
        return make_linear(_stacked(weights), torch.cat(biases) if biases else None, self._scheme)


def _stacked(weights: Sequence[torch.Tensor | Affine4]) -> torch.Tensor | Affine4:
    """All 4-bit stays 4-bit; a mixture becomes dense."""
    packed = [weight for weight in weights if isinstance(weight, Affine4)]
    if len(packed) == len(weights):
        return packed[0].cat(*packed[1:]) if len(packed) > 1 else packed[0]
    dense = [weight.dense() if isinstance(weight, Affine4) else weight for weight in weights]
    return torch.cat(dense) if len(dense) > 1 else dense[0]


def _slice(span: Span | None) -> slice | None:
    return None if span is None else span.as_slice()
