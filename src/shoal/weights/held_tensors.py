"""A checkpoint of which only some tensors are on this machine."""

from __future__ import annotations

from typing import Any

import torch

from shoal.compute.affine import Affine4
from shoal.errors import InternalError
from shoal.weights.tensors import Layout, TensorSource


class HeldTensors:
    """A `TensorSource` that reads only `held`: elsewhere a sparse file would answer zeros."""

    def __init__(self, source: TensorSource, held: frozenset[str]) -> None:
        self._source = source
        self._held = held
        self.config: dict[str, Any] = source.config

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dense(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        self._check(name)
        return self._source.dense(name, rows, columns)

    def affine4(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Affine4 | None:
        self._check(name)
        return self._source.affine4(name, rows, columns)

    def layout(self) -> Layout:
        return self._source.layout()

    def close(self) -> None:
        self._source.close()

    def _check(self, name: str) -> None:
        if name in self._source.names() and name not in self._held:
            raise InternalError(f"{name} was not fetched for this shard, but is read")
