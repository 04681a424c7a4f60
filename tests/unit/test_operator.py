"""Operators and the head's service for them, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from operator_fakes import TICK_S, FakeFleet, serving
from small_cluster import SmallCluster

from shoal.errors import ConfigError, InternalError, PeerLost, PlacementError, RetryError
from shoal.fleet.operator import OperatorService
from shoal.fleet.operator_client import OperatorClient, security_for
from shoal.fleet.operator_messages import Refused, ToOperator
from shoal.fleet.reception import Reception
from shoal.fleet.state import StateFolder
from shoal.parallel.control import Hello
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, listen
from shoal.parallel.head_call import call_head

WAIT_S = 10.0


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def address(fleet: FakeFleet, tmp_path: Path) -> Iterator[str]:
    with serving(fleet, tmp_path) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[OperatorClient]:
    with OperatorClient(address, LocalOnly(), silent_s=WAIT_S) as client:
        yield client


def test_the_status_arrives_as_it_is(client: OperatorClient, fleet: FakeFleet) -> None:
    assert client.status() == fleet.value
    assert client.status() == fleet.value


def test_a_drain_tells_how_far_it_is(client: OperatorClient, fleet: FakeFleet) -> None:
    texts: list[str] = []

    def report(text: str) -> None:
        texts.append(text)
        if "workers still on bb: 1; r0 at epoch 3: 0 running, 0 waiting" in text:
            fleet.may_move.set()

    assert client.drain("bb", report) == "bb is drained"
    assert texts[0] == "draining bb"


def test_what_the_fleet_refuses_is_raised_here(client: OperatorClient, fleet: FakeFleet) -> None:
    with pytest.raises(PlacementError, match="'c' runs no work here"):
        client.drain("c")
    assert client.status() == fleet.value


def test_a_restart_tells_how_far_it_is(client: OperatorClient, fleet: FakeFleet) -> None:
    texts: list[str] = []

    def report(text: str) -> None:
        texts.append(text)
        if "restarting: r0 at epoch 3" in text:
            fleet.may_move.set()

    assert client.restart(2, report) == "restarted, 2 together"
    assert texts[0] == "restarting"


def test_a_bug_is_called_one_and_logged(
    client: OperatorClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalError, match="ZeroDivisionError: a bug"):
        client.rebalance()
    assert "rebalancing failed" in caplog.text


def test_one_moves_at_a_time_and_all_may_look(
    address: str, client: OperatorClient, fleet: FakeFleet
) -> None:
    first = threading.Thread(target=client.drain, args=("bb",))
    first.start()
    assert fleet.moving.wait(WAIT_S)
    with OperatorClient(address, LocalOnly()) as other:
        assert other.status() == fleet.value
        with pytest.raises(RetryError, match="draining bb is under way"):
            other.drain("a")
        fleet.may_move.set()
        first.join(WAIT_S)
        assert other.drain("a") == "a is drained"


def test_a_drain_goes_on_when_the_operator_leaves(address: str, fleet: FakeFleet) -> None:
    def leave(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OperatorClient(address, LocalOnly()) as client:
        client.drain("bb", leave)
    assert not fleet.drained.is_set()
    fleet.may_move.set()
    assert fleet.drained.wait(WAIT_S)
    with OperatorClient(address, LocalOnly()) as client:
        client.status()


def test_a_slow_answer_is_not_silence(address: str, fleet: FakeFleet) -> None:
    fleet.may_tell.clear()
    heard: list[str] = []

    def report(text: str) -> None:
        heard.append(text)
        if len(heard) == 5:
            fleet.may_tell.set()

    with OperatorClient(address, LocalOnly(), silent_s=WAIT_S) as client:
        assert client.status(report) == fleet.value
    assert set(heard) == {"waiting for the fleet's status"}


def test_a_head_that_says_nothing_is_given_up(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.may_tell.clear()
    with (
        serving(fleet, tmp_path, tick_s=60) as address,
        OperatorClient(address, LocalOnly(), silent_s=0.1) as client,
        pytest.raises(PeerLost, match="gone or stuck"),
    ):
        client.status()
    fleet.may_tell.set()


def test_a_head_that_ends_is_noticed(fleet: FakeFleet, tmp_path: Path) -> None:
    with serving(fleet, tmp_path) as address:
        client = OperatorClient(address, LocalOnly())
        client.status()
    with client, pytest.raises(PeerLost, match="gone or stuck"):
        client.status()
    with pytest.raises(PeerLost, match="gone or stuck"):
        OperatorClient(address, LocalOnly())


def test_what_is_no_request_is_refused(address: str) -> None:
    hello = Hello(service="operator", direction="down", caller="stranger")
    down, up = call_head(address, LocalOnly(), hello)
    for request in (b"\xc1", msgspec.msgpack.encode({"type": "drain", "node": "a", "force": 1})):
        up.send(request)
        header, _ = down.receive(WAIT_S)
        refused = msgspec.msgpack.decode(header, type=ToOperator)
        assert isinstance(refused, Refused)
        assert refused.kind == "PeerRefused"
    down.close()
    up.close()


def test_a_node_of_the_cluster_calls_over_tls(fleet: FakeFleet, tmp_path: Path) -> None:
    cluster = SmallCluster(tmp_path)
    head = MutualTls(cluster.join("head"))
    state = StateFolder(tmp_path / "state")
    cluster.join("b")
    (tmp_path / "state").mkdir()
    (tmp_path / "b").rename(state.identity)
    service = OperatorService(fleet, tick_s=TICK_S)
    reception = Reception(listen("tls:127.0.0.1:0", head), {"operator": service.serve})
    try:
        security = security_for(reception.address, state)
        with OperatorClient(reception.address, security) as client:
            assert client.status() == fleet.value
    finally:
        reception.close()


def test_what_an_address_needs(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    assert security_for("unix:/run/head.sock", state) == LocalOnly()
    assert security_for("tcp:10.0.0.1:80", state) == Plaintext()
    with pytest.raises(ConfigError, match="shoal join"):
        security_for("tls:10.0.0.1:80", state)
