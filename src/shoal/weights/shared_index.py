"""What a head shares of a model's files: their sizes, and every extent with its SHA-256.

A small tensor is one extent, a large one is several.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import PurePosixPath

import msgspec

from shoal.errors import SourceError
from shoal.weights.catalogue import Kind

_SHA256 = re.compile(r"[0-9a-f]{64}")


class SharedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is a path below the model's folder. Raises SourceError for one that is not."""

    name: str
    num_bytes: int

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if (
            path.as_posix() != self.name
            or path.is_absolute()
            or not path.name
            or ".." in path.parts
            or not self.name.isprintable()
            or "\\" in self.name
        ):
            raise SourceError(
                f"a model's file is named {self.name!r}, which does not stay within the model's "
                "folder: this model is not safe to use"
            )
        if self.num_bytes < 0:
            raise SourceError(f"the file {self.name} is said to have {self.num_bytes} bytes")


class SharedExtent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes `[offset, offset + num_bytes)` of file number `file`."""

    file: int
    offset: int
    num_bytes: int
    sha256: str


class SharedIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`opening` and `tensors` number the extents; `main` is what `ModelFiles.path` points at.

    The index alone decides which bytes may be asked for, and where they are written. Raises
    SourceError when it contradicts itself.
    """

    kind: Kind
    main: str
    """A file's name, or "." for the folder."""
    files: tuple[SharedFile, ...]
    extents: tuple[SharedExtent, ...]
    opening: tuple[int, ...]
    """What must be there before the model can be opened, see `Layout.opening`."""
    tensors: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        names = [file.name for file in self.files]
        if len(set(names)) < len(names) or self.main not in (*names, "."):
            raise SourceError(f"a model's index names its files wrongly: {names}, {self.main!r}")
        for extent in self.extents:
            self._check(extent)
        for number in chain(self.opening, *self.tensors.values()):
            if not 0 <= number < len(self.extents):
                raise SourceError(
                    f"a model's index of {len(self.extents)} extents refers to number {number}"
                )

    def _check(self, extent: SharedExtent) -> None:
        is_inside = (
            0 <= extent.file < len(self.files)
            and extent.offset >= 0
            and extent.num_bytes >= 0
            and extent.offset + extent.num_bytes <= self.files[extent.file].num_bytes
        )
        if not is_inside or not _SHA256.fullmatch(extent.sha256):
            raise SourceError(f"a model's index holds an impossible extent: {extent}")
