"""Downloads over real sockets: resumed, checked, shared by two processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, serving

from shoal.errors import DownloadError
from shoal.weights.download import fetch

BODY = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer({"/model.bin": BODY})) as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model.bin"


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def test_a_file_arrives_with_progress(server: FileServer, target: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    fetch(f"{server.url}/model.bin", target, SHA256, lambda *what: seen.append(what))
    assert target.read_bytes() == BODY
    assert seen[0] == ("model.bin", 0, len(BODY))
    assert seen[-1] == ("model.bin", len(BODY), len(BODY))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert not part_of(target).exists()


def test_a_second_call_asks_for_nothing(server: FileServer, target: Path) -> None:
    for _ in range(2):
        fetch(f"{server.url}/model.bin", target, SHA256)
    assert server.bytes_sent == len(BODY)


def test_it_goes_on_where_it_broke_off(server: FileServer, target: Path) -> None:
    server.break_after = 100_000
    with pytest.raises(DownloadError, match="300000 bytes are kept"):
        fetch(f"{server.url}/model.bin", target, SHA256)
    server.break_after = None
    fetch(f"{server.url}/model.bin", target, SHA256)
    assert target.read_bytes() == BODY
    assert server.seen_ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert server.bytes_sent == len(BODY)


def test_without_ranges_it_starts_again(server: FileServer, target: Path) -> None:
    server.ranges = False
    target.parent.mkdir()
    part_of(target).write_bytes(BODY[:5000])
    fetch(f"{server.url}/model.bin", target, SHA256)
    assert target.read_bytes() == BODY


def test_a_complete_part_is_only_checked(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(BODY)
    fetch(f"{server.url}/model.bin", target, SHA256)
    assert target.read_bytes() == BODY
    assert server.bytes_sent == 0


@pytest.mark.parametrize("start", [b"", b"wrong", BODY + b"too long"])
def test_wrong_bytes_are_thrown_away(start: bytes, server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(start)
    wrong = SHA256 if start else "0" * 64
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(f"{server.url}/model.bin", target, wrong)
    assert not target.exists()
    assert not part_of(target).exists()


def test_refusals_and_dead_hosts_are_explained(server: FileServer, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 answered 404"):
        fetch(f"{server.url}/nothing", target, SHA256)
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/model.bin", target, SHA256)


def test_a_local_file(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "a file.bin"
    source.write_bytes(BODY)
    fetch(source.as_uri(), target, SHA256)
    assert target.read_bytes() == BODY
    with pytest.raises(DownloadError, match="there is no file"):
        fetch((tmp_path / "none").as_uri(), target.with_name("other"), SHA256)


def test_two_processes_download_once(server: FileServer, target: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shoal.weights.download import fetch; "
        "fetch(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, f"{server.url}/model.bin", str(target), SHA256]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert target.read_bytes() == BODY
    assert server.bytes_sent == len(BODY)
