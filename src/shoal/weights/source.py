"""The one door to models: a name becomes files on this machine, files become tensors."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import msgspec

from shoal.errors import SourceError
from shoal.weights import manifest
from shoal.weights.cache import Progress, cache_root, silent
from shoal.weights.catalogue import CATALOGUE, Kind
from shoal.weights.catalogue_fetch import fetch_model, fetch_terms
from shoal.weights.gguf_file import GgufFile
from shoal.weights.held_tensors import HeldTensors
from shoal.weights.remote import copy_from_url, snapshot_from_hub
from shoal.weights.safetensors_file import SafetensorsFolder
from shoal.weights.tensors import TensorSource

__all__ = ["ModelFiles", "Progress", "open_source", "resolve", "terms", "terms_of"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine. `path` is the .gguf file or the Hugging Face folder.

    Of a sparse copy `held` names the tensors that are there; None is all of them.
    """

    name: str
    kind: Kind
    path: Path
    licence: str = ""
    terms_path: Path | None = None
    held: frozenset[str] | None = None


def resolve(name: str, *, report: Progress | None = None) -> ModelFiles:
    """The files of a model, fetched into the cache when they are not there yet.

    `name` is a name of the catalogue, a .gguf file, a Hugging Face folder, a folder that holds
    one .gguf file, a Hugging Face id `org/name`, or any fsspec URL. Raises SourceError for what
    is none of these, DownloadError when it does not arrive.
    """
    report = report or silent
    if name in CATALOGUE:
        return _from_cache(name, fetch_model(CATALOGUE[name], cache_root(), report))
    if "://" in name:
        return _from_cache(name, copy_from_url(name, cache_root(), report))
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(name, path)
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise SourceError(f"there is no file or folder {path}")
    if _HUB_NAME.fullmatch(name):
        return _local(name, snapshot_from_hub(name, report))
    raise SourceError(_unknown(name))


def open_source(files: ModelFiles) -> TensorSource:
    """Raises SourceError for damaged files, UnsupportedModel for what Shoal cannot run."""
    source: TensorSource
    source = GgufFile(files.path) if files.kind == "gguf" else SafetensorsFolder(files.path)
    return source if files.held is None else HeldTensors(source, files.held)


def terms(files: ModelFiles) -> str | None:
    """The terms of use that must be shown before the model is used; None when it has none."""
    return files.terms_path.read_text(encoding="utf-8") if files.terms_path else None


def terms_of(name: str, *, report: Progress | None = None) -> str | None:
    """The terms of a model of the catalogue, fetched alone, before the model is. DownloadError."""
    model = CATALOGUE.get(name)
    return fetch_terms(model, cache_root(), report or silent) if model else None


def _from_cache(name: str, folder: Path) -> ModelFiles:
    found = manifest.read(folder)
    if found is None:
        raise SourceError(f"{folder} was changed while it was read: fetch {name} again")
    return ModelFiles(
        name=name,
        kind="gguf" if found.kind == "gguf" else "huggingface",
        path=folder / found.main,
        licence=found.licence,
        terms_path=folder / found.terms if found.terms else None,
    )


def _local(name: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{path} is not a .gguf file; for safetensors give their folder")
        return ModelFiles(name=name, kind="gguf", path=path)
    if (path / "config.json").is_file():
        return ModelFiles(name=name, kind="huggingface", path=path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelFiles(name=name, kind="gguf", path=gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise SourceError(f"{path} holds {len(gguf_files)} GGUF files ({names}): name one of them")
    raise SourceError(f"{path} holds neither a config.json nor a .gguf file")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return (
        f"there is no model '{name}'{hint} The catalogue has {', '.join(CATALOGUE)}. A path, a "
        "Hugging Face id (org/name) or a URL (s3://…) works too"
    ).replace("' The", "'. The")
