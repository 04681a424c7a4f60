"""Makes the index of a model's local files, and remembers it, so that they are hashed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec

from shoal.errors import SourceError
from shoal.weights.cache import Progress, locked, silent
from shoal.weights.digest import sha256_of_part, sha256_of_parts
from shoal.weights.shared_index import SharedExtent, SharedFile, SharedIndex
from shoal.weights.source import ModelFiles, open_source
from shoal.weights.tensors import Extent, Layout

MAX_EXTENT_BYTES = 1 << 24


class FileState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By what a file is taken to be the one that was hashed."""

    num_bytes: int
    modified_ns: int


class HashedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`states` are those of the index's files, taken before they were hashed."""

    index: SharedIndex
    states: tuple[FileState, ...]


def hashed_model(files: ModelFiles, cache: Path, report: Progress = silent) -> HashedModel:
    """The index of these files; they are hashed again only if a size or a time has changed.

    Raises SourceError (damaged files), UnsupportedModel, and whatever `report` raises.
    """
    path = files.path.resolve()
    key = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    record = cache / "digests" / f"{key}.json"
    with locked(record.with_suffix(".lock"), report):
        hashed = _recall(record, model_folder(files))
        if hashed is None:
            hashed = _hash(files, report)
            part = record.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(hashed))
            part.replace(record)
    return hashed


def model_folder(files: ModelFiles) -> Path:
    """What the names in an index are relative to."""
    return files.path.parent if files.kind == "gguf" else files.path


def file_states(folder: Path, files: Iterable[SharedFile]) -> tuple[FileState, ...]:
    """Raises SourceError for a file that is gone."""
    return tuple(_state(folder / file.name) for file in files)


def _state(path: Path) -> FileState:
    try:
        found = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    return FileState(found.st_size, found.st_mtime_ns)


def _recall(record: Path, folder: Path) -> HashedModel | None:
    try:
        hashed = msgspec.json.decode(record.read_bytes(), type=HashedModel)
        is_current = hashed.states == file_states(folder, hashed.index.files)
    except (OSError, SourceError, msgspec.MsgspecError):
        return None  # what cannot be read or does not fit is made anew
    return hashed if is_current else None


def _hash(files: ModelFiles, report: Progress) -> HashedModel:
    with closing(open_source(files)) as source:
        layout = source.layout()
    folder = model_folder(files)
    names = sorted(_file_names(layout))
    shared_files = tuple(SharedFile(name, _state(folder / name).num_bytes) for name in names)
    states = file_states(folder, shared_files)
    cuts = {whole: _cut(whole) for whole in (*layout.opening, *layout.tensors.values())}
    extents = sorted({extent for cut in cuts.values() for extent in cut})
    number_of = {extent: number for number, extent in enumerate(extents)}
    digests = _digests(folder, extents, files.name, report)

    def numbers(whole: Extent) -> tuple[int, ...]:
        return tuple(number_of[extent] for extent in cuts[whole])

    index = SharedIndex(
        kind=files.kind,
        main=files.path.name if files.kind == "gguf" else ".",
        files=shared_files,
        extents=tuple(
            SharedExtent(names.index(extent.file), extent.offset, extent.num_bytes, digest)
            for extent, digest in zip(extents, digests, strict=True)
        ),
        opening=tuple(number for whole in layout.opening for number in numbers(whole)),
        tensors={name: numbers(layout.tensors[name]) for name in sorted(layout.tensors)},
    )
    return HashedModel(index=index, states=states)


def _cut(whole: Extent) -> list[Extent]:
    """So that no more than MAX_EXTENT_BYTES are fetched in vain or hashed by one thread."""
    end = whole.offset + whole.num_bytes
    return [
        Extent(whole.file, start, min(MAX_EXTENT_BYTES, end - start))
        for start in range(whole.offset, end, MAX_EXTENT_BYTES)
    ]


def _file_names(layout: Layout) -> set[str]:
    return {extent.file for extent in (*layout.opening, *layout.tensors.values())}


def _digests(folder: Path, extents: list[Extent], model: str, report: Progress) -> list[str]:
    digests, done_bytes = [], 0
    total_bytes = sum(extent.num_bytes for extent in extents)
    with ExitStack() as stack:
        descriptors = {
            name: stack.enter_context((folder / name).open("rb")).fileno()
            for name in {extent.file for extent in extents}
        }

        def digest(extent: Extent) -> str:
            return sha256_of_part(descriptors[extent.file], extent.offset, extent.num_bytes)

        for extent, sha256 in sha256_of_parts(extents, digest):
            digests.append(sha256)
            done_bytes += extent.num_bytes
            report(f"hashing {model}", done_bytes, total_bytes)
    return digests
