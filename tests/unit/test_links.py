"""Links measured over real channels: a unix socket whose answers are late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cli.link_meeting import answer_links, measure_links_to
from shoal.errors import FrameError, PeerLost
from shoal.parallel.endpoint import LocalOnly, MutualTls, dial, listen
from shoal.parallel.identity import create_authority, install, issue, make_request
from shoal.parallel.listener import Listener
from shoal.worker import links

LOCAL = LocalOnly()


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_NUM_PINGS", 20)
    monkeypatch.setattr(links, "_LONG_S", 0.001)


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def listener(tmp_path: Path, reports: list[str]) -> Iterator[Listener]:
    """A process that answers as the node "there"."""
    folder = tmp_path / "sockets"
    folder.mkdir(mode=0o700)
    listener = listen(f"unix:{folder}/links", LOCAL)

    def answer() -> None:
        with pytest.raises(PeerLost, match="closed"):
            answer_links(listener, LOCAL, here="there", report=reports.append)

    thread = threading.Thread(target=answer)
    thread.start()
    yield listener
    listener.close()
    thread.join()


def test_links_of_both_directions(listener: Listener, reports: list[str]) -> None:
    out, back = measure_links_to(listener.address, LOCAL, here="here")
    assert (out.source, out.target) == ("here", "there")
    assert (back.source, back.target) == ("there", "here")
    for link in (out, back):
        assert 1e-6 < link.latency_s < 0.1
        assert 1e6 < link.bytes_per_s < 1e12
    deadline_s = time.monotonic() + 5
    while not reports and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert reports == ["answered here"]


def test_a_slow_link_measures_slow(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking costs 2 ms a frame, and 10 ns a byte: 0.1 GB/s."""
    ask = links._Asker._ask

    def slow(asker: links._Asker, kind: bytes, body: bytes, answer_bytes: int) -> float:
        return ask(asker, kind, body, answer_bytes) + 2e-3 + 1e-8 * max(len(body), answer_bytes)

    monkeypatch.setattr(links._Asker, "_ask", slow)
    monkeypatch.setattr(links, "_LONG_S", 0.01)
    for link in measure_links_to(listener.address, LOCAL, here="here"):
        assert 1e-3 < link.latency_s < 3e-3
        assert 2e7 < link.bytes_per_s < 1.1e8


def test_a_certificate_names_its_node_whatever_it_says(tmp_path: Path, reports: list[str]) -> None:
    authority_pem = create_authority(tmp_path / "authority")

    def member(node: str) -> MutualTls:
        request = make_request(tmp_path / node, node)
        issued = issue(tmp_path / "authority", request, node=node, addresses=["127.0.0.1"])
        return MutualTls(install(tmp_path / node, issued, authority_pem))

    listener = listen("tls:127.0.0.1:0", member("beta"))

    def answer() -> None:
        with pytest.raises(PeerLost, match="closed"):
            answer_links(listener, member("beta"), here="liar", report=reports.append)

    thread = threading.Thread(target=answer)
    thread.start()
    out, _ = measure_links_to(listener.address, member("alpha"), here="alpha")
    deadline_s = time.monotonic() + 5
    while not reports and time.monotonic() < deadline_s:
        time.sleep(0.001)
    listener.close()
    thread.join()
    assert (out.source, out.target) == ("alpha", "beta")
    assert reports == ["answered alpha"]


def test_who_says_something_else_is_sent_away(listener: Listener, reports: list[str]) -> None:
    stranger = dial(listener.address, LOCAL, timeout_s=5)
    stranger.send(b"\xc1 no introduction")
    with pytest.raises(PeerLost):
        stranger.receive(timeout_s=5)
    stranger.close()
    measure_links_to(listener.address, LOCAL, here="here")
    assert "does not measure links" in reports[0]


def test_nobody_makes_the_answerer_send_gigabytes() -> None:
    with pytest.raises(FrameError, match="more than"):
        links._wanted(bytearray((2**33).to_bytes(8, "big")))
