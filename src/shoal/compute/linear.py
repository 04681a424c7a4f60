"""Linear layers behind one call, whatever the weights are held as.

N out-features, K in-features, M rows. Which kernel is fast depends on M: see `kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from shoal.compute.affine import Affine4
from shoal.compute.quantized import Int4Linear, Int8Linear


class Linear(Protocol):
    """`x [..., K] -> y [..., N]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Embedding(Protocol):
    """`tokens [T] -> x [T, E]`."""

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are held: the type of activations and the width of the weights.

    `int4_rows`: up to so many rows the 4-bit kernel is used, beyond it the 8-bit one.
    `widen_rows`: from so many rows on, bfloat16 weights are multiplied in float32 (None: never).
    """

    dtype: torch.dtype = torch.float32
    quantize: Literal["none", "int8", "int4"] = "none"
    int4_rows: int = 1
    widen_rows: int | None = None


class DenseLinear:
    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self.weight_NK = weight_NK
        self.bias_N = bias_N

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_NK, self.bias_N)


class WideningLinear:
    """Weights held in bfloat16; many rows are multiplied in float32, on processors whose
    bfloat16 is emulated and ten times slower."""

    def __init__(self, narrow: DenseLinear, from_rows: int) -> None:
        self.narrow = narrow
        self.from_rows = from_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() < self.from_rows * x.shape[-1]:
            return self.narrow(x)
        bias_N = self.narrow.bias_N
        wide = F.linear(
            x.float(), self.narrow.weight_NK.float(), None if bias_N is None else bias_N.float()
        )
        return wide.to(x.dtype)


class LinearByRows:
    """One kernel for a few rows, another for many."""

    def __init__(self, few: Linear, many: Linear, few_rows: int) -> None:
        self.few = few
        self.many = many
        self.few_rows = few_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        is_few = x.numel() <= self.few_rows * x.shape[-1]
        return self.few(x) if is_few else self.many(x)


class TableEmbedding:
    """Rows of a table, cast to the activations' type as they are looked up."""

    def __init__(self, table_VE: torch.Tensor, dtype: torch.dtype) -> None:
        self.table_VE = table_VE
        self.dtype = dtype

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_T, self.table_VE).to(self.dtype)


def make_linear(
    weight: torch.Tensor | Affine4, bias_N: torch.Tensor | None, scheme: Scheme
) -> Linear:
    """The linear layer for a weight matrix [N, K] as read from its file."""
    if scheme.quantize == "none":
        return _dense(_to_dense(weight), bias_N, scheme)
    int8 = Int8Linear(_to_dense(weight), bias_N)
    if scheme.quantize == "int8":
        return int8
    return LinearByRows(Int4Linear(weight, bias_N), int8, scheme.int4_rows)


def make_head(weight_VE: torch.Tensor | Affine4, scheme: Scheme) -> Linear:
    """The output head. 4 bits would cost quality where every token feels it: 8 at the least."""
    if scheme.quantize == "none":
        return _dense(_to_dense(weight_VE), None, scheme)
    return Int8Linear(_to_dense(weight_VE), None)


def make_embedding(weight_VE: torch.Tensor | Affine4, scheme: Scheme) -> TableEmbedding:
    """The token table; in 16 bits beside quantised layers."""
    table_VE = _to_dense(weight_VE)
    if scheme.quantize == "none":
        return TableEmbedding(table_VE.to(scheme.dtype), scheme.dtype)
    is_narrow = table_VE.dtype in (torch.float16, torch.bfloat16)
    return TableEmbedding(table_VE if is_narrow else table_VE.half(), scheme.dtype)


def _dense(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, scheme: Scheme) -> Linear:
    bias = None if bias_N is None else bias_N.to(scheme.dtype)
    linear = DenseLinear(weight_NK.to(scheme.dtype), bias)
    if scheme.dtype != torch.bfloat16 or scheme.widen_rows is None:
        return linear
    return WideningLinear(linear, scheme.widen_rows)


def _to_dense(weight: torch.Tensor | Affine4) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Affine4) else weight
