"""SHA-256 of parts of files, on several cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")

_READ_BYTES = 1 << 20
_MAX_THREADS = 8


def sha256_of_part(descriptor: int, offset: int, num_bytes: int) -> str:
    """Of what is there: a file that ends before is hashed up to its end."""
    digest = hashlib.sha256()
    end = offset + num_bytes
    while offset < end and (piece := os.pread(descriptor, min(_READ_BYTES, end - offset), offset)):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def sha256_of_parts(
    parts: Iterable[Part], digest: Callable[[Part], str]
) -> Iterator[tuple[Part, str]]:
    """Each part with its digest, in order; reading and hashing release Python's lock."""
    listed = list(parts)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from zip(listed, pool.map(digest, listed), strict=True)
