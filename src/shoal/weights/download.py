"""One file from one URL into one place: resumed where it broke off, checked, then moved in."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx

from shoal.errors import DownloadError
from shoal.weights.cache import Progress, locked, sha256_of, silent

_TIMEOUT_S = 60.0
_ATTEMPTS = 3
_PARTIAL, _RANGE_REFUSED = 206, 416


def fetch(url: str, target: Path, sha256: str, report: Progress = silent) -> None:
    """Make `target` the file at `url` (http, https or file) with this SHA-256.

    Does nothing when `target` exists. What has arrived waits in `target` + ".part", so that a
    second call goes on from there; one process at a time works on it. Raises DownloadError.
    """
    with locked(target.with_name(target.name + ".lock"), report):
        if target.exists():
            return
        part = target.with_name(target.name + ".part")
        try:
            _fill(url, part, target.name, report)
            _check(part, target.name, sha256)
            part.replace(target)
        except OSError as error:
            raise DownloadError(f"{target} cannot be written: {error}; free space there") from error


def _fill(url: str, part: Path, name: str, report: Progress) -> None:
    if urlsplit(url).scheme == "file":
        _copy_local(Path(url2pathname(unquote(urlsplit(url).path))), part, name)
        return
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _download(url, part, name, report)
            return
        except httpx.InvalidURL as error:
            raise DownloadError(f"{name}: the address it lies at is malformed: {error}") from error
        except httpx.HTTPStatusError as error:
            raise DownloadError(
                f"{name}: {urlsplit(url).hostname} answered "
                f"{error.response.status_code} {error.response.reason_phrase}"
            ) from error
        except httpx.HTTPError as error:
            if attempt == _ATTEMPTS:
                raise DownloadError(
                    f"{name}: {urlsplit(url).hostname} broke off or cannot be reached "
                    f"({type(error).__name__}: {error}); {_size(part)} bytes are kept, run it "
                    "again to go on from there"
                ) from error


def _copy_local(source: Path, part: Path, name: str) -> None:
    if not source.is_file():
        raise DownloadError(f"{name}: there is no file {source}")
    shutil.copyfile(source, part)


def _download(url: str, part: Path, name: str, report: Progress) -> None:
    start = _size(part)
    # Compressed on the way, a range would count other bytes than the file's.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with httpx.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
    ) as response:
        if response.status_code == _RANGE_REFUSED:
            # Nothing is left to send: it is complete, or it is not that file; the sum will tell.
            return
        response.raise_for_status()
        if response.status_code != _PARTIAL or not _continues(response, start):
            start = 0
        _append(response, part, start, name, report)


def _continues(response: httpx.Response, start: int) -> bool:
    content_range: str = response.headers.get("Content-Range", "")
    return content_range.startswith(f"bytes {start}-")


def _append(response: httpx.Response, part: Path, start: int, name: str, report: Progress) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdigit() else None
    done = start
    with part.open("ab" if start else "wb") as file:
        report(name, done, total)
        for piece in response.iter_raw():
            file.write(piece)
            done += len(piece)
            report(name, done, total)


def _check(part: Path, name: str, sha256: str) -> None:
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DownloadError(
            f"{name}: its SHA-256 is {found[:16]}…, not {sha256[:16]}…: the bytes that arrived "
            "are not the right ones and were deleted; run it again, and if it happens again the "
            "place they come from is wrong"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
