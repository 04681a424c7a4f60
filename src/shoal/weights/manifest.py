"""What the cache holds: one manifest beside each model, written when the model is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from shoal.errors import SourceError
from shoal.weights.cache import cache_root, sha256_of

FILE_NAME = "shoal-manifest.json"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`main` is the file, or "." for the folder, that `ModelFiles.path` points at."""

    name: str
    kind: str
    source: str
    fetched_s: float
    main: str
    files: dict[str, FileRecord]
    licence: str = ""
    terms: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())


def record(folder: Path) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file under `folder`."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            num_bytes=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME
    }


def write(folder: Path, manifest: Manifest) -> None:
    part = folder / f"{FILE_NAME}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    part.replace(folder / FILE_NAME)


def read(folder: Path) -> Manifest | None:
    """None when the model is not there, or is not all there."""
    try:
        manifest = msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise SourceError(
            f"{folder / FILE_NAME} is damaged ({error}): delete {folder} and fetch the model again"
        ) from error
    return manifest if _sizes_match(folder, manifest) else None


def models_folder(root: Path | None = None) -> Path:
    return (root or cache_root()) / "models"


def list_models(root: Path | None = None) -> list[tuple[Path, Manifest]]:
    """The complete models of the cache, by name."""
    found = []
    for path in sorted(models_folder(root).glob(f"*/{FILE_NAME}")):
        manifest = read(path.parent)
        if manifest is not None:
            found.append((path.parent, manifest))
    return found


def verify(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files of a model, read and hashed again; empty when all is well."""
    problems = []
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected.num_bytes or sha256_of(path) != expected.sha256:
            problems.append(f"{name} is not what was fetched")
    return problems


def remove(folder: Path) -> None:
    """The manifest first, so that a removal cut short leaves no model that looks complete."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sizes_match(folder: Path, manifest: Manifest) -> bool:
    def size(name: str) -> int | None:
        try:
            return os.stat(folder / name).st_size  # noqa: PTH116
        except OSError:
            return None

    return all(size(name) == entry.num_bytes for name, entry in manifest.files.items())
