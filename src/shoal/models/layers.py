"""The parts of a decoder layer. They hold the linears they are given, however those work.

Shape suffixes: T tokens, E hidden, H query heads, G KV heads, J = any heads, D head dim,
N rows asked for, V vocabulary, F = D // 2 frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from shoal.compute import native
from shoal.compute.linear import Linear
from shoal.compute.native import GatedLinear, NativeLinear, NormedLinear
from shoal.compute.native_layer import NativeAttention, NativeMLP, NativeStep
from shoal.models.config import Activation, DecoderConfig
from shoal.models.rope import Rotation

AllReduce = Callable[[torch.Tensor], torch.Tensor]


class Attend(Protocol):
    """Attention over what was said so far; the KV cache lives behind it.

    `native_step` is the same for kernels that do half a layer at once; None: they cannot.
    """

    native_step: NativeStep | None

    def __call__(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Store the step's keys and values of `layer` (counted from the model's first), attend.

        q, k and v may be views with strides. `window` is in tokens, the query's own included.
        Scores are `softcap * tanh(score / softcap)` where a softcap is given. Returns [T, H, D].
        """
        ...


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


class RMSNorm:
    """Normalises in float32. Computes in the weight's dtype: float32 keeps 1 + w exact."""

    def __init__(self, weight_E: torch.Tensor, eps: float) -> None:
        self.weight_E = weight_E
        self.eps = eps

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        weight_E = self.weight_E
        normed_TE = F.rms_norm(x_TE.to(weight_E.dtype), weight_E.shape, weight_E, self.eps)
        return normed_TE.to(x_TE.dtype)


class HeadNorm:
    """RMSNorm of each query and key head, all heads in one call. weight_JD: a row per head."""

    def __init__(self, weight_JD: torch.Tensor, eps: float) -> None:
        self.weight_JD = weight_JD
        self.eps = eps

    def __call__(self, x_TJD: torch.Tensor) -> torch.Tensor:
        weight_JD = self.weight_JD
        normed_TJD = F.rms_norm(x_TJD.to(weight_JD.dtype), weight_JD.shape[1:], None, self.eps)
        return (normed_TJD * weight_JD).to(x_TJD.dtype)


class Gate:
    """activation(gate) * up, of rows that hold gate, then up."""

    def __init__(self, activation: Activation) -> None:
        self._activate = ACTIVATIONS[activation]

    def __call__(self, gate_up_TI: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TI.chunk(2, dim=-1)
        return self._activate(gate).mul_(up)


class _Apart:
    """One after the other, by kernels that cannot do both at once."""

    def __init__(self, first: Callable[[torch.Tensor], torch.Tensor], linear: Linear) -> None:
        self._first = first
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self._first(x))


def normed(norm: RMSNorm, linear: Linear) -> Linear:
    """The norm, then the linear layer: in one, where its kernel can."""
    if isinstance(linear, NativeLinear):
        return NormedLinear(linear, norm.weight_E.float(), norm.eps)
    return _Apart(norm, linear)


def gated(activation: Activation, linear: Linear) -> Linear:
    """activation(gate) * up of rows that hold gate, then up; then the linear layer."""
    if isinstance(linear, NativeLinear):
        return GatedLinear(linear, activation)
    return _Apart(Gate(activation), linear)


class Residual:
    """How what half a layer makes of x is added to x: summed over the tensor ranks, then normed.

    Neither, where there is one rank (`all_reduce` None) and no norm after the half.
    `is_plain_sum`: no norm.
    """

    def __init__(self, all_reduce: AllReduce | None, norm: RMSNorm | None) -> None:
        self._all_reduce = all_reduce
        self._norm = norm
        self.is_plain_sum = norm is None

    def __call__(self, x_TE: torch.Tensor, y_TE: torch.Tensor) -> torch.Tensor:
        if self._all_reduce is not None:
            y_TE = self._all_reduce(y_TE)
        if self._norm is not None:
            y_TE = self._norm(y_TE)
        return x_TE + y_TE


class GatedMLP:
    """`gate_up` holds the rows of gate, then those of up, and norms what it is given."""

    def __init__(
        self, gate_up: Linear, down: Linear, activation: Activation, residual: Residual
    ) -> None:
        self._gate_up = gate_up
        self._down = gated(activation, down)
        self._native = _native_mlp(self._gate_up, self._down)
        self._residual = residual

    @property
    def native_sum(self) -> NativeMLP | None:
        """If what it makes of x, or all ranks do, is added to x, and nothing else done."""
        return self._native if self._residual.is_plain_sum else None

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        if self._native is None or not native.is_plain(x_TE):
            return self._residual(x_TE, self._down(self._gate_up(x_TE)))
        return self._residual(x_TE, self._native(x_TE))


def _native_mlp(gate_up: Linear, down: Linear) -> NativeMLP | None:
    if isinstance(gate_up, NormedLinear) and isinstance(down, GatedLinear):
        return NativeMLP(gate_up, down)
    return None


class Attention:
    """`qkv` holds the rows of the part's query heads, then of its KV heads: k, then v, and norms
    what it is given."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        qkv: Linear,
        output: Linear,
        qk_norm: HeadNorm | None,
        residual: Residual,
    ) -> None:
        self._layer = layer
        self._num_heads = num_heads
        self._num_qk_heads = num_heads + num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.attention_scale
        self._window = config.layers[layer].window
        self._softcap = config.attention_softcap
        self._qkv = qkv
        self._output = output
        self._qk_norm = qk_norm
        self._native = self._as_native(config, num_kv_heads)
        self._residual = residual

    @property
    def is_native(self) -> bool:
        return self._native is not None

    @property
    def native_sum(self) -> NativeAttention | None:
        """If what it makes of x, or all ranks do, is added to x, and nothing else done."""
        return self._native if self._residual.is_plain_sum else None

    def __call__(self, x_TE: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        step = attend.native_step
        if self._native is None or step is None or not native.is_plain(x_TE):
            return self._residual(x_TE, self._in_parts(x_TE, rotation, attend))
        y_TE = self._native(x_TE, rotation.cos_T1D, rotation.sin_T1D, step, self._layer)
        return self._residual(x_TE, y_TE)

    def _in_parts(self, x_TE: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        num_tokens = x_TE.shape[0]
        qkv_TJD = self._qkv(x_TE).view(num_tokens, -1, self._head_dim)
        qk_TJD = qkv_TJD[:, : self._num_qk_heads]
        if self._qk_norm is not None:
            qk_TJD = self._qk_norm(qk_TJD)
        qk_TJD = rotation(qk_TJD)
        out_THD = attend(
            self._layer,
            qk_TJD[:, : self._num_heads],
            qk_TJD[:, self._num_heads :],
            qkv_TJD[:, self._num_qk_heads :],
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
        )
        return self._output(out_THD.reshape(num_tokens, -1))

    def _as_native(self, config: DecoderConfig, num_kv_heads: int) -> NativeAttention | None:
        qkv, output, qk_norm = self._qkv, self._output, self._qk_norm
        if not (isinstance(qkv, NormedLinear) and isinstance(output, NativeLinear)):
            return None
        # The model's, so that all tensor ranks decide alike: a part has no more heads to a KV head.
        if config.num_heads > native.MOST_HEADS * config.num_kv_heads:
            return None
        return NativeAttention(
            qkv,
            output,
            num_heads=self._num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim,
            head_norm_JD=None if qk_norm is None else qk_norm.weight_JD.float().contiguous(),
            head_eps=0.0 if qk_norm is None else qk_norm.eps,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
        )


class DecoderLayer:
    def __init__(self, attention: Attention, mlp: GatedMLP) -> None:
        self._attention = attention
        self._mlp = mlp

    @property
    def is_native(self) -> bool:
        """Whether the kernels turn its heads."""
        return self._attention.is_native

    @property
    def native_halves(self) -> tuple[NativeAttention, NativeMLP] | None:
        """If the layer is nothing but these, each added to x."""
        attention, mlp = self._attention.native_sum, self._mlp.native_sum
        return None if attention is None or mlp is None else (attention, mlp)

    def __call__(self, x_TE: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        return self._mlp(self._attention(x_TE, rotation, attend))
