"""A GGUF file as a tensor source: values and names are those of the Hugging Face checkpoint."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from shoal.compute.affine import GROUP, Affine4
from shoal.errors import SourceError, UnsupportedModel
from shoal.weights.gguf_blocks import AFFINE4_TYPES, READABLE_TYPES, Bytes, to_affine4, to_dense
from shoal.weights.gguf_config import architecture_of, config_from
from shoal.weights.gguf_header import GgufHeader, TensorInfo, read_header
from shoal.weights.gguf_names import ROPE_FACTORS, hugging_face_name
from shoal.weights.tensors import Extent, Layout

_PERMUTED = (".self_attn.q_proj.", ".self_attn.k_proj.")


class GgufFile:
    """A `TensorSource`. Several threads may read; only rows that are asked for are read.

    The file is not mapped: taking a page at a time from the system is slower than reading.
    """

    def __init__(self, path: Path) -> None:
        """Raises SourceError (no GGUF file, truncated), UnsupportedModel (tensor type, model)."""
        header = read_header(path)
        self._path = path
        self._header = header
        self._architecture = architecture_of(header.metadata)
        _check_types(path, header)
        self.bytes_read = 0
        self._counting = Lock()
        self._tensors = {
            hugging_face_name(name, self._architecture): info
            for name, info in header.tensors.items()
            if name != ROPE_FACTORS
        }
        self._descriptor = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        try:
            self.config: dict[str, Any] = config_from(header, self._rope_factors(header))
            self._check_heads()
        except BaseException:
            self.close()
            raise

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dense(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        info = self._info(name)
        first, last = _bounds(rows, info.shape[0], name)
        if len(info.shape) == 1:
            return self._vector(name, info)[first:last]
        left, right = _bounds(columns, info.shape[1], name)
        block_values, _ = info.block
        # Blocks cannot be split: read those that cover the slice, and cut afterwards.
        start, stop = left // block_values * block_values, _round_up(right, block_values)
        values = to_dense(self._rows(name, info, first, last, start, stop), info.type)
        return values[:, left - start : right - start].contiguous()

    def affine4(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Affine4 | None:
        info = self._info(name)
        if info.type not in AFFINE4_TYPES or len(info.shape) != 2:
            return None
        first, last = _bounds(rows, info.shape[0], name)
        left, right = _bounds(columns, info.shape[1], name)
        if left % GROUP or right % GROUP:
            return None
        block_values, _ = info.block
        start, stop = left // block_values * block_values, _round_up(right, block_values)
        whole = to_affine4(self._rows(name, info, first, last, start, stop), info.type)
        if (start, stop) == (left, right):
            return whole
        groups = slice((left - start) // GROUP, (right - start) // GROUP)
        return Affine4(
            whole.codes_NK[:, left - start : right - start].contiguous(),
            whole.scales_NG[:, groups].contiguous(),
            whole.minimums_NG[:, groups].contiguous(),
        )

    def layout(self) -> Layout:
        file = self._path.name
        opening = [Extent(file, 0, self._header.num_bytes)]
        if ROPE_FACTORS in self._header.tensors:
            opening.append(_extent(file, self._header.tensors[ROPE_FACTORS]))
        tensors = {name: _extent(file, info) for name, info in self._tensors.items()}
        return Layout(tuple(opening), tensors)

    def close(self) -> None:
        self._closing()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise SourceError(f"{self._path} holds no tensor named {name}")
        return self._tensors[name]

    def _read(self, offset: int, num_bytes: int) -> Bytes:
        if not self._closing.alive:
            raise SourceError(f"{self._path} is closed")
        data = np.empty(num_bytes, dtype=np.uint8)
        left = data.data
        while left:
            num_read = os.preadv(self._descriptor, [left], offset)
            if num_read == 0:
                raise SourceError(f"{self._path} has become shorter: fetch it again")
            left, offset = left[num_read:], offset + num_read
        return data

    def _whole(self, info: TensorInfo) -> Bytes:
        return self._read(info.offset, info.num_bytes).reshape(1, -1)

    def _vector(self, name: str, info: TensorInfo) -> torch.Tensor:
        self._count(info.num_bytes)
        values = to_dense(self._whole(info), info.type).view(-1)
        if self._is_permuted(name):
            values = _unpermute(values.view(-1, 1), self.config["head_dim"]).view(-1)
        # llama.cpp stores Gemma's norms with the 1 added that the model adds itself.
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            values = values.float() - 1.0
        return values

    def _rows(
        self, name: str, info: TensorInfo, first: int, last: int, start: int, stop: int
    ) -> Bytes:
        """Raw bytes of rows [first, last) in Hugging Face order, of columns [start, stop)."""
        block_values, block_bytes = info.block
        within = slice(start // block_values * block_bytes, stop // block_values * block_bytes)
        if not self._is_permuted(name):
            return self._table(info, first, last, within)
        head_dim = self.config["head_dim"]
        # llama.cpp's order mixes rows within a head: read the heads that cover the slice.
        top, bottom = first // head_dim * head_dim, _round_up(last, head_dim)
        part = self._table(info, top, bottom, within)
        in_order: Bytes = part[_checkpoint_order(part.shape[0], head_dim)]
        return in_order[first - top : last - top]

    def _table(self, info: TensorInfo, first: int, last: int, within: slice) -> Bytes:
        size = info.row_bytes
        part = self._read(info.offset + first * size, (last - first) * size)
        part = part.reshape(-1, size)[:, within]
        self._count(part.nbytes)
        return part

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.bytes_read += num_bytes

    def _is_permuted(self, name: str) -> bool:
        return self._architecture == "llama" and any(part in name for part in _PERMUTED)

    def _check_heads(self) -> None:
        head_dim = self.config["head_dim"]
        for name, info in self._tensors.items():
            if self._is_permuted(name) and (info.shape[0] % head_dim or head_dim % 2):
                raise SourceError(
                    f"{self._path}: {name} has {info.shape[0]} rows, which are no whole heads of "
                    f"{head_dim}: it is damaged"
                )

    def _rope_factors(self, header: GgufHeader) -> list[float] | None:
        info = header.tensors.get(ROPE_FACTORS)
        if info is None:
            return None
        factors: list[float] = to_dense(self._whole(info), info.type)[0].tolist()
        return factors


def _extent(file: str, info: TensorInfo) -> Extent:
    return Extent(file, info.offset, info.num_bytes)


def _check_types(path: Path, header: GgufHeader) -> None:
    for info in header.tensors.values():
        if info.type not in READABLE_TYPES:
            readable = ", ".join(sorted(known.name for known in READABLE_TYPES))
            raise UnsupportedModel(
                f"{path}: tensor {info.name} has type {info.type.name}; Shoal reads {readable}"
            )
        if len(info.shape) > 2:
            raise UnsupportedModel(f"{path}: tensor {info.name} has {len(info.shape)} dims")


def _bounds(part: slice | None, size: int, name: str) -> tuple[int, int]:
    start, stop, step = (part or slice(None)).indices(size)
    if step != 1:
        raise SourceError(f"{name}: slices have a step of 1, got {step}")
    return start, max(start, stop)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _checkpoint_order(num_rows: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row of the checkpoint lies in the file.

    llama.cpp interleaves the two halves of every head: its row 2 j + i is row i * D / 2 + j.
    """
    return (
        np.arange(num_rows, dtype=np.int64)
        .reshape(-1, head_dim // 2, 2)
        .swapaxes(1, 2)
        .reshape(num_rows)
    )


def _unpermute(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    return values[torch.from_numpy(_checkpoint_order(values.shape[0], head_dim))]
