"""The native kernels of csrc/, on float32 tensors of this machine; not there if nobody built them.

Rows are rounded to 8 bits in groups of 32 before they meet 4- or 8-bit weights. What a row becomes
never depends on the rows beside it. T tokens, E hidden, J heads, G KV heads, D head dim, L keys,
W what a cache holds of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from shoal.compute.affine import Affine4
from shoal.compute.kv_types import head_dim_of
from shoal.compute.zeroed_memory import Slabs
from shoal.kernels import kernels

if TYPE_CHECKING:
    from shoal_kernels import Cache

Activation = Literal["silu", "gelu", "gelu_tanh"]

# In the order of csrc/isa.h.
_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
# Vectors of 8 floats.
_LANES = 8
_TABLE_TYPES = (torch.float16, torch.bfloat16)
_CACHE_TYPES = (torch.float32, torch.float16, torch.int8)
# Of this process's weights.
_slabs = Slabs()
# Of queries that share a KV head.
MOST_HEADS = 128


def is_available() -> bool:
    return kernels is not None


def set_num_threads(number: int) -> None:
    """Of this process, beside those of torch: they sleep while there is nothing to do."""
    if kernels is not None:
        kernels.set_num_threads(number)


class NativeLinear:
    """One kernel for any number of rows. Weights in 4 bits where they are given so, else in 8."""

    def __init__(self, weight: torch.Tensor | Affine4, bias_N: torch.Tensor | None = None) -> None:
        num_rows, num_columns = weight.shape
        bits = 4 if isinstance(weight, Affine4) else 8
        self.num_rows, self.num_columns = num_rows, num_columns
        num_bytes = kernels.num_bytes(bits, num_rows, num_columns)
        self._tiles = _slabs.zeroed(num_bytes)
        if isinstance(weight, Affine4):
            _pack4(weight, self._tiles)
        else:
            dense_NK = weight.float().contiguous()
            kernels.pack8(dense_NK.data_ptr(), num_rows, num_columns, self._tiles.data_ptr())
        self.matrix = kernels.Matrix(bits, self._tiles.data_ptr(), num_rows, num_columns)
        self._bias_N = None if bias_N is None else bias_N.float().contiguous()
        self.bias_at = address(self._bias_N)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.matrix.multiply, x, self.num_columns)

    def product(
        self, multiply: Callable[..., None], x: torch.Tensor, width: int, *how: float
    ) -> torch.Tensor:
        """What a method of `matrix` makes of rows x [..., width]; `how` are its own arguments."""
        rows = _float_rows(x, width)
        y_MN = torch.empty(rows.shape[0], self.num_rows)
        multiply(*at(rows), *how, y_MN.data_ptr(), self.num_rows, self.bias_at)
        return _shaped(y_MN, x)


class NormedLinear:
    """Of the RMS norms of rows x [..., K]; weight_K is float32."""

    def __init__(self, linear: NativeLinear, weight_K: torch.Tensor, eps: float) -> None:
        self.linear = linear
        self._weight_K = weight_K.contiguous()
        self.how = (self._weight_K.data_ptr(), eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        return linear.product(linear.matrix.multiply_normed, x, linear.num_columns, *self.how)


class GatedLinear:
    """Of activation(gate) * up, for rows x [..., 2K] that hold gate, then up."""

    def __init__(self, linear: NativeLinear, activation: Activation) -> None:
        self.linear = linear
        self.activation = _ACTIVATIONS.index(activation)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear, width = self.linear, 2 * self.linear.num_columns
        return linear.product(linear.matrix.multiply_gated, x, width, self.activation)


def look_up(table_VE: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The tokens' rows in float32, [T, E]. Raises IndexError for a token beyond the table."""
    x_TE = torch.empty(len(tokens), table_VE.shape[1])
    kernels.look_up(
        _TABLE_TYPES.index(table_VE.dtype),
        table_VE.data_ptr(),
        *table_VE.shape,
        tokens,
        x_TE.data_ptr(),
    )
    return x_TE


def can_look_up(table_VE: torch.Tensor) -> bool:
    is_here = kernels is not None and table_VE.device.type == "cpu"
    return is_here and table_VE.dtype in _TABLE_TYPES and table_VE.is_contiguous()


def find_turns(
    positions: list[int], frequencies_F: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D] for `rotate`."""
    head_dim = 2 * frequencies_F.shape[0]
    cos_T1D, sin_T1D = torch.empty(2, len(positions), 1, head_dim).unbind()
    kernels.find_turns(
        frequencies_F.data_ptr(),
        head_dim,
        scaling,
        positions,
        cos_T1D.data_ptr(),
        sin_T1D.data_ptr(),
    )
    return cos_T1D, sin_T1D


def rotate(x_TJD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
    """In place; the first half of sin is negated, as in `models.rope`."""
    _, num_heads, head_dim = x_TJD.shape
    kernels.rotate(*at(x_TJD), num_heads, head_dim, cos_T1D.data_ptr(), sin_T1D.data_ptr())


def can_rotate(x_TJD: torch.Tensor) -> bool:
    return kernels is not None and is_plain(x_TJD) and x_TJD.stride(1) == x_TJD.shape[2]


def can_attend(q_THD: torch.Tensor, keys_SGW: torch.Tensor) -> bool:
    """Whether `attend` takes such queries over such a cache, `compute.kv_types`."""
    return can_store(q_THD, keys_SGW) and q_THD.shape[1] <= MOST_HEADS * keys_SGW.shape[1]


def can_store(k_TGD: torch.Tensor, keys_SGW: torch.Tensor) -> bool:
    return is_plain(k_TGD) and can_hold(keys_SGW)


def can_hold(keys_SGW: torch.Tensor) -> bool:
    """Whether the kernels know such a cache."""
    return (
        kernels is not None
        and keys_SGW.device.type == "cpu"
        and keys_SGW.dtype in _CACHE_TYPES
        and head_dim_of(keys_SGW) % _LANES == 0
    )


def store(
    keys_SGW: torch.Tensor,
    values_SGW: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Keys and values of a step's tokens to their slots."""
    k_at, k_stride, num_tokens = at(k_TGD)
    v_at, v_stride, _ = at(v_TGD)
    cache_of(keys_SGW, values_SGW).store(
        k_at, k_stride, v_at, v_stride, slots_T.data_ptr(), num_tokens
    )


def attend(
    q_BHD: torch.Tensor,
    keys_SGW: torch.Tensor,
    values_SGW: torch.Tensor,
    slots_BL: torch.Tensor,
    positions_BQ: torch.Tensor,
    out_BHD: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Queries of each sequence, one position after the other, each to its keys up to itself.

    q and out [B * Q, H, D].
    """
    cache_of(keys_SGW, values_SGW).attend(
        q_BHD.data_ptr(),
        q_BHD.stride(0),
        out_BHD.data_ptr(),
        *positions_BQ.shape,
        q_BHD.shape[1],
        slots_BL.data_ptr(),
        slots_BL.stride(0),
        positions_BQ.data_ptr(),
        scale,
        window or 0,
        softcap or 0.0,
    )


def cache_of(keys_SGW: torch.Tensor, values_SGW: torch.Tensor) -> Cache:
    """One layer's, as the kernels see it. It does not keep the memory."""
    return kernels.Cache(
        _CACHE_TYPES.index(keys_SGW.dtype),
        keys_SGW.data_ptr(),
        values_SGW.data_ptr(),
        *keys_SGW.shape[:2],
        head_dim_of(keys_SGW),
    )


def is_plain(x: torch.Tensor) -> bool:
    """Whether the kernels take such rows where they lie."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1


def _float_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    assert rows.shape[1] == width, f"rows of {rows.shape[1]} for a matrix of {width} columns"
    rows = rows if rows.dtype == torch.float32 else rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def at(rows: torch.Tensor) -> tuple[int, int, int]:
    """Where they lie, how far apart, and how many."""
    return rows.data_ptr(), rows.stride(0), rows.shape[0]


def _shaped(y_MN: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y_MN = y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], -1)
    return y_MN if x.dtype == torch.float32 else y_MN.to(x.dtype)


def _pack4(blocks: Affine4, tiles: torch.Tensor) -> None:
    codes, scales, minimums = (
        part.contiguous() for part in (blocks.codes_NK, blocks.scales_NG, blocks.minimums_NG)
    )
    kernels.pack4(
        codes.data_ptr(), scales.data_ptr(), minimums.data_ptr(), *blocks.shape, tiles.data_ptr()
    )
