"""The head's side of weights: gives workers what they ask for of a model's files.

Only extents of the index can be asked for, by number: nothing else of this machine can be read.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec

from shoal.errors import EngineStopped, FrameError, PeerLost, ShoalError, SourceError
from shoal.parallel.channel import Channel
from shoal.weights.cache import Progress, silent
from shoal.weights.shared_build import HashedModel, file_states, hashed_model, model_folder
from shoal.weights.shared_index import SharedIndex
from shoal.weights.shared_messages import (
    PIECE_BYTES,
    AskIndex,
    FromFetcher,
    FromProvider,
    Index,
    Piece,
    Preparing,
    Refused,
)
from shoal.weights.source import ModelFiles

log = logging.getLogger(__name__)

_KEEPALIVE_S = 2.0
# A worker stops reading while its disk is busy.
_PATIENCE_S = 60.0


class WeightsProvider:
    """Serves one model to any number of workers at once, each in the thread that calls `serve`."""

    def __init__(self, files: ModelFiles, cache: Path, report: Progress = silent) -> None:
        """Nothing is read before a worker asks; then the files are hashed once, see `report`."""
        self._files = files
        self._digests = _Digests(files, cache, report)

    def serve(self, down: Channel, up: Channel) -> None:
        """Answer what comes up, until the worker leaves: raises PeerLost.

        A request that cannot be answered is refused with the reason, and ends the service.
        """
        down.set_patience(_PATIENCE_S)
        while True:
            header, _ = up.receive()
            try:
                self._answer(_decoded(header), down)
            except PeerLost:
                raise
            except (ShoalError, OSError) as error:
                log.warning("weights for %s: %s", up.peer, error)
                _send(down, Refused(reason=str(error)))
                return

    def close(self) -> None:
        """Breaks off the hashing. Whoever made the channels closes them."""
        self._digests.close()

    def _answer(self, message: FromFetcher, down: Channel) -> None:
        hashed = self._digests.ready(down)
        index = hashed.index
        if isinstance(message, AskIndex):
            _send(down, Index(model=self._files.name), msgspec.msgpack.encode(index))
            return
        for number in message.extents:
            if not 0 <= number < len(index.extents):
                raise FrameError(f"there are {len(index.extents)} extents, not a number {number}")
        self._check_unchanged(hashed)
        for number in message.extents:
            self._send_extent(index, number, down)

    def _check_unchanged(self, hashed: HashedModel) -> None:
        folder = model_folder(self._files)
        now = file_states(folder, hashed.index.files)
        for file, state, hashed_state in zip(hashed.index.files, now, hashed.states, strict=True):
            if state != hashed_state:
                raise SourceError(f"{folder / file.name} changed while in use: restart the head")

    def _send_extent(self, index: SharedIndex, number: int, down: Channel) -> None:
        extent = index.extents[number]
        path = model_folder(self._files) / index.files[extent.file].name
        with path.open("rb") as file:
            file.seek(extent.offset)
            for start in range(0, extent.num_bytes, PIECE_BYTES):
                piece = file.read(min(PIECE_BYTES, extent.num_bytes - start))
                _send(down, Piece(extent=number, start=start), piece)


class _Digests:
    """The index, made in a thread of its own when it is first asked for."""

    def __init__(self, files: ModelFiles, cache: Path, report: Progress) -> None:
        self._files = files
        self._cache = cache
        self._report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shoal-hash")
        self._lock = threading.Lock()
        self._future: Future[HashedModel] | None = None
        self._progress: tuple[int, int | None] = (0, None)
        self._is_closed = False

    def ready(self, down: Channel) -> HashedModel:
        """Tells the worker now and then that it has not been forgotten."""
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the head is stopping")
            if self._future is None or (self._future.done() and self._future.exception()):
                self._future = self._pool.submit(self._make)
            future = self._future
        while not wait([future], timeout=_KEEPALIVE_S).done:
            done_bytes, total_bytes = self._progress
            _send(down, Preparing(done_bytes=done_bytes, total_bytes=total_bytes))
        return future.result()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(cancel_futures=True)

    def _make(self) -> HashedModel:
        return hashed_model(self._files, self._cache, self._note)

    def _note(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        if self._is_closed:
            raise EngineStopped("the head is stopping")
        self._progress = (done_bytes, total_bytes)
        self._report(what, done_bytes, total_bytes)


def _decoded(header: bytes) -> FromFetcher:
    try:
        message: FromFetcher = msgspec.msgpack.decode(header, type=FromFetcher)
    except msgspec.MsgspecError as error:
        raise FrameError(f"no request for weights: {error}") from error
    return message


def _send(down: Channel, message: FromProvider, body: bytes = b"") -> None:
    down.send(msgspec.msgpack.encode(message), body)
