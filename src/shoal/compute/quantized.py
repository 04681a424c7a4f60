"""8-bit and 4-bit linear layers on torch's own CPU kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.compute.affine import GROUP, Affine4, quantize_affine4


class Int8Linear:
    """8-bit weights, one scale per out-feature; activations to 8 bits on the fly, FBGEMM inside.

    FBGEMM gives a whole batch one activation scale. Dividing each row by its own peak first
    makes that one scale right for every row: one token's outliers do not blur its neighbours.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        weight_NK = weight_NK.float()
        scales_N = (weight_NK.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
        zeros_N = torch.zeros(weight_NK.shape[0], dtype=torch.long)
        with _fbgemm():
            quantized = torch.quantize_per_channel(weight_NK, scales_N, zeros_N, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias_N = None if bias_N is None else bias_N.float()
        # Without VNNI, pairs of 8-bit products are added in 16 bits and would saturate.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).float()
        if rows_MK.shape[0] == 1:
            out_MN = self._multiply(rows_MK)
        else:
            peaks_M1 = torch.linalg.vector_norm(rows_MK, torch.inf, dim=1, keepdim=True)
            peaks_M1 = peaks_M1.clamp_min_(1e-30)
            out_MN = self._multiply(rows_MK / peaks_M1).mul_(peaks_M1)
        if self._bias_N is not None:
            out_MN += self._bias_N
        return out_MN.view(*x.shape[:-1], -1).to(x.dtype)

    def _multiply(self, rows_MK: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.quantized.linear_dynamic(
            rows_MK, self._packed, self._reduce_range
        )
        return out


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
        ).float()
        if self._bias_N is not None:
            out_MN += self._bias_N
        out: torch.Tensor = out_MN.view(*x.shape[:-1], -1).to(x.dtype)
        return out


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
