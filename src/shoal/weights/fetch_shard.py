"""A shard's tensors from the head, for a node that has no files of the model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from shoal.errors import DownloadError, FrameError
from shoal.parallel.channel import Channel
from shoal.parallel.partition import Shard
from shoal.weights.cache import Progress, locked, silent
from shoal.weights.needed import needed_tensors
from shoal.weights.shared_index import SharedIndex
from shoal.weights.shared_messages import (
    PIECE_BYTES,
    AskExtents,
    AskIndex,
    FromFetcher,
    FromProvider,
    Index,
    Piece,
    Preparing,
    Refused,
)
from shoal.weights.source import ModelFiles, open_source
from shoal.weights.sparse_copy import SparseCopy

_MAX_EXTENTS_PER_REQUEST = 256


def fetch_shard(
    down: Channel,
    up: Channel,
    shard: Shard,
    cache: Path,
    report: Progress = silent,
    *,
    timeout_s: float = 60.0,
) -> ModelFiles:
    """The model's files, sparse: only the bytes that the shard reads are sure to be there.

    `down` and `up` are a call of the head's service "weights", which `WeightsProvider` answers.

    What lies in the cache already is checked and not fetched again; a call cut short goes on
    where it was, to the last whole extent. A tensor rank gets the whole tensors of its layers,
    which its stage's other ranks on this node then share, and reads its slice locally.

    Raises DownloadError (wrong bytes, the head refuses), SourceError (the cache cannot be
    written, the index is unsafe), UnsupportedModel, PeerLost (gone, or silent for `timeout_s`),
    FrameError.
    """
    fetcher = _Fetcher(down, up, timeout_s)
    model, index, version = fetcher.index(report)
    folder = cache / "shards" / f"{_safe(model)}-{version[:12]}"
    files = ModelFiles(
        name=model, kind=index.kind, path=folder if index.main == "." else folder / index.main
    )
    with (
        locked(cache / "locks" / f"shard-{folder.name}.lock", report),
        SparseCopy(folder, index) as copy,
    ):
        fetcher.fill(copy, index, index.opening, model, report)
        with closing(open_source(files)) as source:
            held = needed_tensors(source, shard)
        # What the model should have and has not is listed by whoever loads it.
        numbers = [number for name in held for number in index.tensors.get(name, ())]
        fetcher.fill(copy, index, numbers, model, report)
    return msgspec.structs.replace(files, held=held)


def model_version(
    down: Channel, up: Channel, report: Progress = silent, *, timeout_s: float = 60.0
) -> str:
    """What tells the head's copy of the model from any other. Raises as `fetch_shard` does."""
    _, _, version = _Fetcher(down, up, timeout_s).index(report)
    return version


class _Fetcher:
    def __init__(self, down: Channel, up: Channel, timeout_s: float) -> None:
        self._down = down
        self._up = up
        self._timeout_s = timeout_s

    def index(self, report: Progress) -> tuple[str, SharedIndex, str]:
        """The model's name, its index, and the SHA-256 of the index."""
        self._send(AskIndex())
        message, body = self._receive()
        while isinstance(message, Preparing):
            report("waiting for the head to hash", message.done_bytes, message.total_bytes)
            message, body = self._receive()
        if not isinstance(message, Index):
            raise self._unexpected(message)
        try:
            index = msgspec.msgpack.decode(body, type=SharedIndex)
        except msgspec.MsgspecError as error:
            raise FrameError(f"{self._down.peer} sent an index that is none: {error}") from error
        return message.model, index, hashlib.sha256(body).hexdigest()

    def fill(
        self,
        copy: SparseCopy,
        index: SharedIndex,
        numbers: Sequence[int],
        model: str,
        report: Progress,
    ) -> None:
        """Make these extents present."""
        missing = copy.missing(numbers, report)
        total_bytes = sum(index.extents[number].num_bytes for number in missing)
        done_bytes = 0
        for first in range(0, len(missing), _MAX_EXTENTS_PER_REQUEST):
            batch = tuple(missing[first : first + _MAX_EXTENTS_PER_REQUEST])
            self._send(AskExtents(extents=batch))
            for number in batch:
                for num_bytes in self._extent(copy, index, number):
                    done_bytes += num_bytes
                    report(f"fetching {model} from the head", done_bytes, total_bytes)

    def _extent(self, copy: SparseCopy, index: SharedIndex, number: int) -> Iterator[int]:
        """Yields how many bytes have come, piece by piece."""
        extent, start, digest = index.extents[number], 0, hashlib.sha256()
        while start < extent.num_bytes:
            message, body = self._receive()
            expected = min(PIECE_BYTES, extent.num_bytes - start)
            if message != Piece(extent=number, start=start) or len(body) != expected:
                raise self._unexpected(message)
            digest.update(body)
            copy.write(number, start, body)
            start += len(body)
            yield len(body)
        if digest.hexdigest() != extent.sha256:
            name = index.files[extent.file].name
            raise DownloadError(
                f"{self._down.peer} sent wrong bytes {extent.offset} to "
                f"{extent.offset + extent.num_bytes} of {name}: their SHA-256 is "
                f"{digest.hexdigest()[:16]}…, not {extent.sha256[:16]}…; its copy of the model was "
                "damaged or changed: fetch the model there again, then restart it"
            )

    def _send(self, message: FromFetcher) -> None:
        self._up.send(msgspec.msgpack.encode(message))

    def _receive(self) -> tuple[FromProvider, bytearray]:
        header, body = self._down.receive(timeout_s=self._timeout_s)
        try:
            message = msgspec.msgpack.decode(header, type=FromProvider)
        except msgspec.MsgspecError as error:
            raise FrameError(f"{self._down.peer} sent no message about weights: {error}") from error
        if isinstance(message, Refused):
            raise DownloadError(f"{self._down.peer} does not send the weights: {message.reason}")
        return message, body

    def _unexpected(self, message: FromProvider) -> FrameError:
        return FrameError(f"{self._down.peer} sent {message} instead of what was asked for")


def _safe(model: str) -> str:
    """A model's name, which may be a path or a URL, as the name of a folder."""
    return re.sub(r"[^\w-]+", "-", model.rstrip("/").rpartition("/")[2])[:80] or "model"
