"""Models that lie elsewhere, copied into the cache: any fsspec URL, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from shoal.errors import DownloadError, ShoalError, SourceError
from shoal.weights import manifest
from shoal.weights.cache import Progress, locked

MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
)
_COPY_BYTES = 1 << 22


def copy_from_url(url: str, root: Path, report: Progress) -> Path:
    """The cache's folder with the file or the folder at `url`. SourceError, DownloadError."""
    folder = manifest.models_folder(root) / _folder_name(url)
    if manifest.read(folder) is not None:
        return folder
    with locked(root / "locks" / f"{folder.name}.lock", report):
        if manifest.read(folder) is None:
            _copy(url, folder, report)
    return folder


def snapshot_from_hub(repo_id: str, report: Progress) -> Path:
    """The local folder of a Hugging Face model; the hub's own cache keeps it. DownloadError."""
    # Takes 0.2 s to import and is needed for hub names only.
    import huggingface_hub  # noqa: PLC0415

    report(f"fetching {repo_id} from the Hugging Face hub", 0, None)
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(MODEL_FILES)))
    except Exception as error:
        # The hub's errors share no base class with those of the client below it.
        raise DownloadError(
            f"'{repo_id}' could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}). Check the name and the network; for "
            "a gated model log in with 'hf auth login'; or give a local path or an s3:// URL"
        ) from error


def hidden(url: str) -> str:
    """The URL without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def _folder_name(url: str) -> str:
    stem = re.sub(r"[^\w.-]+", "-", PurePosixPath(urlsplit(url).path).name) or "model"
    return f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _copy(url: str, folder: Path, report: Progress) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        filesystem, path = _open_filesystem(url)
        names = _wanted(filesystem, path, url)
        for remote, name in names.items():
            _copy_file(filesystem, remote, folder / name, report)
    except ShoalError:
        raise
    except Exception as error:
        # Every kind of storage brings its own client library and its own errors.
        raise DownloadError(
            f"{hidden(url)} could not be copied to {folder} ({type(error).__name__}: "
            f"{hidden(_first_line(error))}); check the address, your credentials for it and the "
            "free space"
        ) from error
    is_gguf = len(names) == 1 and path.endswith(".gguf")
    manifest.write(
        folder,
        manifest.Manifest(
            name=hidden(url),
            kind="gguf" if is_gguf else "huggingface",
            source=hidden(url),
            fetched_s=time.time(),
            main=next(iter(names.values())) if is_gguf else ".",
            files=manifest.record(folder),
        ),
    )


def _open_filesystem(url: str) -> tuple[Any, str]:
    # Takes 0.1 s to import and is needed for URLs only.
    from fsspec.core import url_to_fs  # noqa: PLC0415

    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise SourceError(
            f"{urlsplit(url).scheme}:// needs a package that is not installed: {error}"
        ) from error
    except ValueError as error:
        raise SourceError(f"{hidden(url)} is no address Shoal can read: {error}") from error
    return filesystem, str(path)


def _wanted(filesystem: Any, path: str, url: str) -> dict[str, str]:
    """Remote path to local name of what makes the model; a folder's files lie side by side."""
    if filesystem.isfile(path):
        return {path: PurePosixPath(path).name}
    files = {file: PurePosixPath(file).name for file in filesystem.ls(path, detail=False)}
    wanted = {
        file: name
        for file, name in files.items()
        if any(fnmatch(name, pattern) for pattern in MODEL_FILES)
    }
    if not any(name.endswith(".safetensors") for name in wanted.values()):
        raise SourceError(
            f"{hidden(url)} holds no .safetensors file; give a Hugging Face folder that does, or "
            "the full address of a .gguf file"
        )
    return wanted


def _copy_file(filesystem: Any, remote: str, local: Path, report: Progress) -> None:
    total = filesystem.size(remote)
    done = 0
    with filesystem.open(remote, "rb") as source, local.open("wb") as target:
        while piece := source.read(_COPY_BYTES):
            target.write(piece)
            done += len(piece)
            report(local.name, done, total)
    if total is not None and done != total:
        raise OSError(f"{remote} has {total} bytes, {done} arrived")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
