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
from shoal.compute.native import GatedLinear, NativeLinear, NormedLinear
from shoal.kernels import kernels

if TYPE_CHECKING:
    from shoal_kernels import Cache, Ranks, Step


class NativeStep:
    """Where a step's tokens lie in the caches of a shard's layers, and what they attend to."""

    def __init__(
        self,
        caches: Sequence[Cache],
        first_layer: int,
        step: Step,
    ) -> None:
        self.caches = caches
        self.step = step
        self._first_layer = first_layer

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
    """All layers of a shard, if nothing but addition lies between their halves, be it of what all
    tensor ranks make of x."""

    def __init__(
        self,
        halves: Sequence[tuple[NativeAttention, NativeMLP]],
        ropes: Sequence[tuple[torch.Tensor, float]],
        rope_of_layer: Sequence[int],
    ) -> None:
        """`ropes`: frequencies [D // 2], float32, and the factor on cos and sin."""
        self._held = (halves, ropes)
        self._layers = kernels.Layers()
        for frequencies_F, scaling in ropes:
            self._layers.add_rope(frequencies_F.data_ptr(), 2 * len(frequencies_F), scaling)
        for (attention, mlp), rope in zip(halves, rope_of_layer, strict=True):
            self._layers.add(attention.half, mlp.half, rope)

    def __call__(
        self,
        x_TE: torch.Tensor,
        step: NativeStep,
        rows: list[int] | None = None,
        ranks: Ranks | None = None,
    ) -> torch.Tensor:
        """What the last layer makes of `rows`, ascending, or of all; `ranks` add up their parts.

        Raises ValueError if the step has another number of rows, or caches of other layers;
        IndexError for `rows` that it does not have; PeerLost if a rank does not come.
        """
        y_TE = torch.empty(x_TE.shape)
        if ranks is not None:
            x_TE = x_TE.contiguous()
        self._layers.run(*native.at(x_TE), y_TE.data_ptr(), step.caches, step.step, rows, ranks)
        return y_TE if rows is None else y_TE[: len(rows)]
