"""Linear layers with 16-, 8- and 4-bit weights on torch's own CPU kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.compute.affine import GROUP, Affine4, quantize_affine4


class DynamicInt8Linear:
    """8-bit weights and activations, quantised on the fly: the most rows per second.

    FBGEMM gives a whole batch one activation scale. Dividing each row by its own peak first
    makes that one scale right for every row: one token's outliers do not blur its neighbours.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        # Without VNNI, pairs of 8-bit products are added in 16 bits: one side must have 7 bits
        # or they saturate, and the weights lose less by it than the activations.
        levels = 127 if torch.cpu._is_vnni_supported() else 63
        weight_NK = weight_NK.float()
        scales_N = (weight_NK.abs().amax(dim=1) / levels).clamp_min(1e-12).double()
        zeros_N = torch.zeros(weight_NK.shape[0], dtype=torch.long)
        with _fbgemm():
            quantized = torch.quantize_per_channel(weight_NK, scales_N, zeros_N, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias_N = None if bias_N is None else bias_N.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).float()
        peaks_M1 = torch.linalg.vector_norm(rows_MK, torch.inf, dim=1, keepdim=True)
        peaks_M1 = peaks_M1.clamp_min_(1e-30)
        out_MN = torch.ops.quantized.linear_dynamic(rows_MK / peaks_M1, self._packed, False)
        return _shaped(out_MN.mul_(peaks_M1), self._bias_N, x)


class Float16Linear:
    """16-bit weights, float32 arithmetic: half the memory traffic of float32, the same result."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        with _fbgemm():
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight_NK.float(), None)
        self._bias_N = None if bias_N is None else bias_N.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).float()
        out_MN = torch.ops.quantized.linear_dynamic_fp16(rows_MK, self._packed)
        return _shaped(out_MN, self._bias_N, x)


class Int8Linear:
    """8-bit weights, one scale per out-feature; activations in bfloat16. For a few rows."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        weight_NK = weight_NK.float()
        scales_N = (weight_NK.abs().amax(dim=1) / 127).clamp_min(1e-12)
        self._codes_NK = (weight_NK / scales_N.unsqueeze(1)).round_().to(torch.int8)
        # The kernel multiplies by bfloat16 scales; what they miss is multiplied afterwards.
        self._scales_N = scales_N.bfloat16()
        self._corrections_N = scales_N / self._scales_N.float()
        self._bias_N = None if bias_N is None else bias_N.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).bfloat16()
        out_MN = torch.ops.aten._weight_int8pack_mm(rows_MK, self._codes_NK, self._scales_N)
        return _shaped(out_MN.float().mul_(self._corrections_N), self._bias_N, x)


class Int4Linear:
    """4-bit weights in groups of 32. The codes are the file's own where it holds such blocks;
    scales pass through bfloat16, as do the activations, because the kernel reads nothing else."""

    def __init__(self, weight: torch.Tensor | Affine4, bias_N: torch.Tensor | None = None) -> None:
        blocks = weight if isinstance(weight, Affine4) else quantize_affine4(weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            blocks.codes_NK.to(torch.int32), 1
        )
        # The kernel computes (code - 8) * scale + zero.
        zeros_NG = blocks.minimums_NG + 8 * blocks.scales_NG
        scales_and_zeros = torch.stack([blocks.scales_NG.T, zeros_NG.T], dim=-1)
        self._scales_and_zeros = scales_and_zeros.bfloat16().contiguous()
        self._bias_N = None if bias_N is None else bias_N.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).bfloat16()
        out_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows_MK, self._packed, GROUP, self._scales_and_zeros
        )
        return _shaped(out_MN.float(), self._bias_N, x)


def _shaped(out_MN: torch.Tensor, bias_N: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """A kernel's float32 rows as the answer to `x`: bias added, leading dims and type as in x."""
    if bias_N is not None:
        out_MN += bias_N
    return out_MN.view(*x.shape[:-1], -1).to(x.dtype)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Packing asks a process-wide setting which library to pack for; put it back afterwards.

    torch warns that these tensors will go one day; torch 2.13 has no other way to FBGEMM.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before
