"""The halves of a decoder layer, each in one native call, or whole layers, over a paged cache.

Between small calls lie microseconds of Python, and a step of one token would have hundreds of them.
T tokens, E hidden, H query heads, G KV heads, J = H + G, D head dim,
W what a cache holds of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shoal.compute import native
from shoal.compute.attention import Group
from shoal.compute.native import GatedLinear, NativeLinear, NormedLinear, kernels

if TYPE_CHECKING:
    from shoal_kernels import Cache


class NativeStep:
    """Where a step's tokens lie in the caches of a shard's layers, and what they attend to."""

    def __init__(
        self,
        caches: Sequence[Cache],
        first_layer: int,
        slots_T: torch.Tensor,
        groups: Sequence[Group],
    ) -> None:
        self.caches = caches
        self._first_layer = first_layer
        self.step = kernels.Step(slots_T.data_ptr(), slots_T.shape[0])
        self._held = (slots_T, groups)
        for group in groups:
            self.step.add_group(
                group.start,
                *group.positions_BQ.shape,
                group.slots_BL.data_ptr(),
                group.slots_BL.stride(0),
                group.positions_BQ.data_ptr(),
            )

    def cache(self, layer: int) -> Cache:
        """Of a layer, counted from the model's first."""
        return self.caches[layer - self._first_layer]


class NativeAttention:
    """From the norm before queries, keys and values to the product with the output's weights."""

    def __init__(
        self,
        qkv: NormedLinear,
        output: NativeLinear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        head_norm_JD: torch.Tensor | None,
        head_eps: float,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self._width = output.num_rows
        self._held = (qkv, output, head_norm_JD)
        self.half = kernels.AttentionHalf(
            *qkv.how,
            qkv.linear.matrix,
            qkv.linear.bias_at,
            native.address(head_norm_JD),
            head_eps,
            output.matrix,
            output.bias_at,
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            window or 0,
            softcap or 0.0,
        )

    def __call__(
        self,
        x_TE: torch.Tensor,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
        step: NativeStep,
        layer: int,
    ) -> torch.Tensor:
        y_TE = torch.empty(x_TE.shape[0], self._width)
        self.half.run(
            *native.at(x_TE),
            y_TE.data_ptr(),
            cos_T1D.data_ptr(),
            sin_T1D.data_ptr(),
            step.cache(layer),
            step.step,
        )
        return y_TE


class NativeMLP:
    """From the norm before gate and up to the product with the weights of down."""

    def __init__(self, gate_up: NormedLinear, down: GatedLinear) -> None:
        self._width = down.linear.num_rows
        self._held = (gate_up, down)
        self.half = kernels.MlpHalf(
            *gate_up.how,
            gate_up.linear.matrix,
            gate_up.linear.bias_at,
            down.activation,
            down.linear.matrix,
            down.linear.bias_at,
        )

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        y_TE = torch.empty(x_TE.shape[0], self._width)
        self.half.run(*native.at(x_TE), y_TE.data_ptr())
        return y_TE


class NativeLayers:
    """All layers of a shard, if nothing but addition lies between their halves."""

    def __init__(
        self, halves: Sequence[tuple[NativeAttention, NativeMLP]], rotations: Sequence[int]
    ) -> None:
        """`rotations` says for each layer which of a step's rotations its heads are turned by."""
        self._held = halves
        self._layers = kernels.Layers()
        for (attention, mlp), rotation in zip(halves, rotations, strict=True):
            self._layers.add(attention.half, mlp.half, rotation)

    def __call__(
        self,
        x_TE: torch.Tensor,
        cos_and_sin: Sequence[tuple[torch.Tensor, torch.Tensor]],
        step: NativeStep,
    ) -> torch.Tensor:
        """cos and sin are [T, 1, D]."""
        y_TE = x_TE.clone(memory_format=torch.contiguous_format)
        rotations = [(cos_T1D.data_ptr(), sin_T1D.data_ptr()) for cos_T1D, sin_T1D in cos_and_sin]
        self._layers.run(y_TE.data_ptr(), y_TE.shape[0], rotations, step.caches, step.step)
        return y_TE
