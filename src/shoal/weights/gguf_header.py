"""The header of a GGUF file: its metadata and its table of tensors, checked against its size.

gguf's own GGUFReader makes a numpy array of every vocabulary entry: 3 s for SmolLM2 and 18 s for
Gemma 3. This walks past the vocabulary instead, in 0.1 s.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shoal.errors import SourceError, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, slots=True)
class StringArray:
    """Stands for an array of strings, which is walked past: only its length is kept."""

    num_strings: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` in torch order, `offset` and `num_bytes` in the whole file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def block(self) -> tuple[int, int]:
        """The number of values in a block and the number of bytes it takes."""
        block_values, block_bytes = GGML_QUANT_SIZES[self.type]
        return block_values, block_bytes

    @property
    def row_bytes(self) -> int:
        block_values, block_bytes = self.block
        return self.shape[-1] // block_values * block_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`num_bytes` is the length of the header itself, without the padding behind it."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    num_bytes: int


def read_header(path: Path) -> GgufHeader:
    """Raises SourceError for a file that is no GGUF file, is truncated or contradicts itself."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header()
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as a GGUF file: {error}") from error
    except (struct.error, OverflowError) as error:
        raise SourceError(
            f"{path} has a header that runs past its end ({path.stat().st_size} bytes): "
            "it is truncated or damaged, fetch it again"
        ) from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != MAGIC:
            raise SourceError(f"{self._path} is not a GGUF file: it does not start with 'GGUF'")
        self._position = 4
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            raise UnsupportedModel(
                f"{self._path} is GGUF version {version}; Shoal reads versions 2 and 3, "
                "little-endian"
            )
        num_tensors, num_fields = self._unpack("QQ")
        metadata = dict(self._field() for _ in range(num_fields))
        entries = [self._entry() for _ in range(num_tensors)]
        num_bytes = self._position
        start = self._data_start(metadata)
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise SourceError(f"{self._path} holds two tensors named {name}: it is damaged")
            tensors[name] = self._tensor(name, shape, type_id, start + offset)
        return GgufHeader(metadata, tensors, num_bytes)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._position)
        self._position += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if length > self._size - self._position:
            raise struct.error("a string runs past the end")
        text = self._data[self._position : self._position + length]
        self._position += length
        return text.decode("utf-8", errors="replace")

    def _field(self) -> tuple[str, Any]:
        key = self._string()
        (type_id,) = self._unpack("I")
        return key, self._value(type_id)

    def _value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self._unpack(_SCALARS[type_id])[0]
        if type_id == _STRING:
            return self._string()
        if type_id == _ARRAY:
            return self._array()
        raise SourceError(f"{self._path}: unknown type {type_id} in the metadata: it is damaged")

    def _array(self) -> StringArray | list[Any]:
        element_type, count = self._unpack("IQ")
        if element_type in _SCALARS:
            if count > self._size:
                raise struct.error("an array runs past the end")
            return list(self._unpack(f"{count}{_SCALARS[element_type]}"))
        if element_type != _STRING:
            raise SourceError(f"{self._path}: array of type {element_type} in the metadata")
        self._skip_strings(count)
        return StringArray(count)

    def _skip_strings(self, count: int) -> None:
        unpack_length = struct.Struct("<Q").unpack_from
        data, position = self._data, self._position
        for _ in range(count):
            position += 8 + unpack_length(data, position)[0]
        self._position = position

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if num_dims > MAX_DIMS:
            raise SourceError(f"{self._path}: tensor {name} has {num_dims} dims: it is damaged")
        dims = self._unpack(f"{num_dims}Q")
        type_id, offset = self._unpack("IQ")
        return name, tuple(reversed(dims)), type_id, offset

    def _data_start(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise SourceError(f"{self._path}: general.alignment is {alignment}: it is damaged")
        return -(-self._position // alignment) * alignment

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        try:
            tensor_type = GGMLQuantizationType(type_id)
        except ValueError:
            raise UnsupportedModel(
                f"{self._path}: tensor {name} has the unknown type {type_id}"
            ) from None
        block_values, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if not shape or shape[-1] % block_values:
            raise SourceError(
                f"{self._path}: tensor {name} of shape {shape} does not divide into "
                f"{tensor_type.name} blocks of {block_values}: it is damaged"
            )
        num_bytes = prod(shape) // block_values * block_bytes
        if offset + num_bytes > self._size:
            raise SourceError(
                f"{self._path} has {self._size} bytes, but tensor {name} ends at byte "
                f"{offset + num_bytes}: it is truncated, fetch it again"
            )
        return TensorInfo(name, shape, tensor_type, offset, num_bytes)
