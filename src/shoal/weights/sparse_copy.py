"""A model's files on a node that holds only some of their bytes: right names and sizes, holes.

An extent is present when the bytes in its place have its SHA-256, and nothing else says so. That
is read anew at every start, so neither a crash nor a damaged disk can leave a wrong mark behind.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from shoal.errors import SourceError
from shoal.weights.cache import Progress
from shoal.weights.digest import sha256_of_part, sha256_of_parts
from shoal.weights.shared_index import SharedExtent, SharedFile, SharedIndex

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class SparseCopy:
    """Open until it is left. For one process at a time: hold a lock.

    Raises SourceError when the files cannot be made.
    """

    def __init__(self, folder: Path, index: SharedIndex) -> None:
        self._folder = folder
        self._index = index
        self._descriptors: list[int] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in index.files:
                self._descriptors.append(_open(folder, file))
        except OSError as error:
            self._close()
            raise SourceError(f"{folder} cannot be written: {error}") from error

    def __enter__(self) -> SparseCopy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def missing(self, numbers: Iterable[int], report: Progress) -> list[int]:
        """Which of these extents are not there, or damaged; sorted."""
        extents = self._index.extents
        candidates = sorted(set(numbers))
        held = [number for number in candidates if not self._is_hole(extents[number])]
        total_bytes = sum(extents[number].num_bytes for number in held)
        done_bytes = 0
        missing = set(candidates) - set(held)
        for number, sha256 in sha256_of_parts(held, self._sha256):
            done_bytes += extents[number].num_bytes
            report("checking what is here", done_bytes, total_bytes)
            if sha256 != extents[number].sha256:
                missing.add(number)
        return sorted(missing)

    def write(self, number: int, start: int, piece: bytes | bytearray) -> None:
        """`start` is within the extent. Raises SourceError when the disk is full or fails."""
        extent = self._index.extents[number]
        try:
            view, offset = memoryview(piece), extent.offset + start
            while view:
                written = os.pwrite(self._descriptors[extent.file], view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise SourceError(
                f"{self._folder} cannot be written: {error}; free space there"
            ) from error

    def _sha256(self, number: int) -> str:
        extent = self._index.extents[number]
        return sha256_of_part(self._descriptors[extent.file], extent.offset, extent.num_bytes)

    def _is_hole(self, extent: SharedExtent) -> bool:
        """Spares hashing zeros; where holes cannot be told from data, the digest decides."""
        if not hasattr(os, "SEEK_DATA") or not extent.num_bytes:
            return False
        try:
            data = os.lseek(self._descriptors[extent.file], extent.offset, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO  # no data up to the end of the file
        return data >= extent.offset + extent.num_bytes

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _open(folder: Path, file: SharedFile) -> int:
    path = folder / file.name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, _FLAGS, 0o600)
    try:
        if os.fstat(descriptor).st_size != file.num_bytes:
            os.ftruncate(descriptor, file.num_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
