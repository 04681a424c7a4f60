"""4-bit weights in groups of 32: `w = code * scale + minimum`, as GGUF's 4-bit blocks hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32


@dataclass(frozen=True, slots=True)
class Affine4:
    """A matrix [N, K]. codes uint8 [N, K] in 0…15; scales, minimums float32 [N, K // 32]."""

    codes_NK: torch.Tensor
    scales_NG: torch.Tensor
    minimums_NG: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_columns = self.codes_NK.shape
        return num_rows, num_columns

    def dense(self) -> torch.Tensor:
        """Float32 [N, K], exactly the values the blocks stand for."""
        num_rows, num_columns = self.shape
        codes = self.codes_NK.view(num_rows, -1, GROUP).float()
        values = codes * self.scales_NG.unsqueeze(-1) + self.minimums_NG.unsqueeze(-1)
        return values.view(num_rows, num_columns)

    def cat(self, *others: Affine4) -> Affine4:
        """Rows of this matrix, then the rows of the others."""
        parts = (self, *others)
        return Affine4(
            torch.cat([part.codes_NK for part in parts]),
            torch.cat([part.scales_NG for part in parts]),
            torch.cat([part.minimums_NG for part in parts]),
        )


def quantize_affine4(weight_NK: torch.Tensor) -> Affine4:
    """Round to the nearest of 16 levels between each group's minimum and maximum."""
    num_rows, num_columns = weight_NK.shape
    groups = weight_NK.float().view(num_rows, num_columns // GROUP, GROUP)
    minimums = groups.amin(dim=-1)
    scales = ((groups.amax(dim=-1) - minimums) / 15).clamp_min(1e-12)
    codes = ((groups - minimums.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp_(0, 15)
    return Affine4(codes.to(torch.uint8).view(num_rows, num_columns), scales, minimums)
