"""What every weight format offers: tensors by their Hugging Face names, read slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from shoal.compute.affine import Affine4


class Extent(NamedTuple):
    """Bytes `[offset, offset + num_bytes)` of a file."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a checkpoint's bytes lie. File names are relative to the checkpoint's folder.

    `opening` is what must be there before the checkpoint can be opened and its names, shapes and
    configuration read; `tensors` is where each tensor's values are.
    """

    opening: tuple[Extent, ...]
    tensors: Mapping[str, Extent]


class TensorSource(Protocol):
    """An open checkpoint. Names and values are those of the Hugging Face checkpoint.

    `config` is a Hugging Face style `config.json`. `bytes_read` counts bytes of tensor data.
    """

    config: dict[str, Any]

    @property
    def bytes_read(self) -> int: ...

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises SourceError for a name that is not in `names()`."""
        ...

    def dense(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        """The tensor in its own float type, or float32 where the file holds it quantised.

        `rows` and `columns` slice the first and the second dim, with a step of 1; only the bytes
        of the slice are read. Raises SourceError.
        """
        ...

    def affine4(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Affine4 | None:
        """The same values as `dense`, kept in 4 bits; None when the file holds no such groups.

        None as well when `columns` do not start and stop at whole groups of 32.
        """
        ...

    def layout(self) -> Layout:
        """Raises SourceError."""
        ...

    def close(self) -> None: ...
