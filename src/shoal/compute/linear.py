"""Linear layers behind one call, whatever the weights are held as.

N out-features, K in-features, M rows. Which kernel is fast depends on M: see `kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from shoal.compute import native
from shoal.compute.affine import GROUP, Affine4, quantize_affine4
from shoal.compute.native import NativeLinear
from shoal.compute.quantized import DynamicInt8Linear, Float16Linear, Int4Linear, Int8Linear

Weights = Literal["int8", "int4", "as_stored"]


class Linear(Protocol):
    """`x [..., K] -> y [..., N]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Embedding(Protocol):
    """`T tokens -> x [T, E]`. Raises IndexError for a token that the table has not."""

    def __call__(self, tokens: list[int]) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """How linear layers hold their weights. `kernels.py` chooses; activations have `dtype`.

    `many` is the kernel for many rows, where arithmetic limits, and `few` the one for up to
    `few_rows` rows, where reading the weights does. `few=None`: one kernel for all; "as_stored":
    4 bits for a matrix that its file holds in 4-bit blocks, else 8. `many="native"`: the native
    kernel for any number of rows, over weights as `few` says.
    `widen_rows`: from so many rows on, bfloat16 weights are multiplied in float32.
    """

    dtype: torch.dtype = torch.float32
    many: Literal["dense", "float16", "int8", "native"] = "dense"
    few: Weights | None = None
    few_rows: int = 0
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
        self._is_native = dtype == torch.float32 and native.can_look_up(table_VE)

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        if self._is_native:
            return native.look_up(self.table_VE, tokens)
        tokens_T = torch.tensor(tokens, device=self.table_VE.device)
        return F.embedding(tokens_T, self.table_VE).to(self.dtype)


def make_linear(
    weight: torch.Tensor | Affine4, bias_N: torch.Tensor | None, scheme: Scheme
) -> Linear:
    """The linear layer for a weight matrix [N, K] as read from its file."""
    if scheme.many == "native":
        return NativeLinear(_at_width(weight, scheme), bias_N)
    many = _for_many(_to_dense(weight), bias_N, scheme)
    if scheme.few is None:
        return many
    few: Linear
    if scheme.few == "int4" or (scheme.few == "as_stored" and isinstance(weight, Affine4)):
        few = Int4Linear(weight, bias_N)
    else:
        few = Int8Linear(_to_dense(weight), bias_N)
    return LinearByRows(few, many, scheme.few_rows)


def make_head(weight_VE: torch.Tensor | Affine4, scheme: Scheme) -> Linear:
    """The output head. 4 bits would cost quality where every token feels it: 8 at the least."""
    dense_VE = _to_dense(weight_VE)
    if scheme.many == "native":
        return NativeLinear(dense_VE)
    many = _for_many(dense_VE, None, scheme)
    if scheme.few is None:
        return many
    return LinearByRows(Int8Linear(dense_VE), many, scheme.few_rows)


def make_embedding(weight_VE: torch.Tensor | Affine4, scheme: Scheme) -> TableEmbedding:
    """The token table; in 16 bits beside layers that have no more."""
    table_VE = _to_dense(weight_VE)
    if scheme.many == "dense":
        return TableEmbedding(table_VE.to(scheme.dtype), scheme.dtype)
    is_narrow = table_VE.dtype in (torch.float16, torch.bfloat16)
    return TableEmbedding(table_VE if is_narrow else table_VE.half(), scheme.dtype)


def _for_many(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, scheme: Scheme) -> Linear:
    if scheme.many == "float16":
        return Float16Linear(weight_NK, bias_N)
    if scheme.many == "int8":
        return DynamicInt8Linear(weight_NK, bias_N)
    return _dense(weight_NK, bias_N, scheme)


def _dense(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, scheme: Scheme) -> Linear:
    bias = None if bias_N is None else bias_N.to(scheme.dtype)
    linear = DenseLinear(weight_NK.to(scheme.dtype), bias)
    if scheme.dtype != torch.bfloat16 or scheme.widen_rows is None:
        return linear
    return WideningLinear(linear, scheme.widen_rows)


def _at_width(weight: torch.Tensor | Affine4, scheme: Scheme) -> torch.Tensor | Affine4:
    if scheme.few == "int8":
        return _to_dense(weight)
    is_whole = weight.shape[1] % GROUP == 0
    if scheme.few == "int4" and isinstance(weight, torch.Tensor) and is_whole:
        return quantize_affine4(weight)
    return weight


def _to_dense(weight: torch.Tensor | Affine4) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Affine4) else weight
