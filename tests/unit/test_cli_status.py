"""`shoal status`, `shoal drain` and `shoal rebalance` against a fleet of values."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from msgspec import structs
from operator_fakes import FakeFleet, fake_node, fake_status, fake_worker, serving
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.cli.status_rates import WINDOW_S, Rates, RateWindow, WorkerRates
from shoal.fleet.serving_file import register
from shoal.fleet.state import StateFolder
from shoal.fleet.status import FleetStatus

STYLE = re.compile(r"\x1b\[[0-9;]*m")
LONG = "ip-10-20-30-40.rack-7.eu-central-1.compute.internal"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FakeFleet]:
    fleet = FakeFleet()
    with serving(fleet, tmp_path):
        yield fleet


def run(folder: Path, *words: str, columns: int = 80, terminal: bool = False) -> Result:
    environment = {
        "COLUMNS": str(columns),
        "SHOAL_STATE": str(folder / "state"),
        "NO_COLOR": "1",
        "FORCE_COLOR": "1" if terminal else "",
    }
    return CliRunner().invoke(app, list(words), env=environment)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the command has waited; the third time, someone presses Ctrl-C."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("shoal.cli.status.time.sleep", sleep)
    return waited


def test_nodes_workers_and_load_are_shown(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.value = fake_status(
        nodes=(fake_node("a"), fake_node("bb", drained=True), fake_node("ccc", alive=False))
    )
    result = run(tmp_path, "status")
    assert result.exit_code == 0, result.output
    for said in (
        "small at http://127.0.0.1:8000",
        "2 stages of 15 + 15 layers",
        "mutual TLS 1.3",
        "ok, working",
        "0 tokens/s now",
        "predicted 41 tokens/s, measured 38: 7 % less",
        "r0: epoch 3; 0 running, 0 waiting; 0 tokens/s; cache 25% in use",
    ):
        assert said in result.stdout
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "bb 10.0.0.2 cpu, 8 cores 16.0 GiB drained 1" in rows
    assert "ccc 10.0.0.3 cpu, 8 cores 16.0 GiB down 1" in rows
    assert "r0s1t0-2 bb 1 0 15–29 0% 0% 0 B/s" in rows


def test_a_recovery_is_shown_though_all_is_well_so_far(fleet: FakeFleet, tmp_path: Path) -> None:
    status = fake_status()
    reason = "recovering for 3 s: worker r0s1t0-2 is lost"
    fleet.value = structs.replace(
        status, replicas=[structs.replace(status.replicas[0], reason=reason)]
    )
    result = run(tmp_path, "status", columns=160)
    assert result.exit_code == 0
    assert f"ok, r0: {reason}" in result.stdout
    assert f"r0: {reason}; epoch 3" in result.stdout


def test_a_busy_fleet_is_looked_at_twice(
    fleet: FakeFleet, tmp_path: Path, waits: list[float]
) -> None:
    fleet.value = fake_status(num_running=3)
    result = run(tmp_path, "status", "--json")
    assert result.exit_code == 0
    assert waits == [WINDOW_S]


def test_rates_are_differences_of_the_last_seconds() -> None:
    times = iter([0.0, 1.0, 2.0, 4.0])
    window = RateWindow(2.0, now=lambda: next(times))

    def look(tokens: int, busy_s: float, sent: int) -> Rates:
        worker = fake_worker(
            0, "a", busy_seconds=busy_s, bubble_seconds=busy_s / 2, rank_bytes=sent
        )
        return window.add(fake_status(workers=(worker,), generated_tokens=tokens))

    assert look(100, 1.0, 0) == Rates()
    assert look(110, 1.5, 1000).tokens_per_s == {"r0": 10.0}
    assert look(140, 1.5, 1000).tokens_per_s == {"r0": 20.0}
    assert look(340, 2.5, 5000) == Rates(
        tokens_per_s={"r0": 100.0},
        workers={("r0", 0, 0): WorkerRates(busy=0.5, bubble=0.25, sent_bytes_per_s=2000.0)},
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_narrow_terminal_cuts_names_only(
    fleet: FakeFleet, tmp_path: Path, terminal: bool
) -> None:
    fleet.value = fake_status(
        nodes=(fake_node(LONG), fake_node("bb")),
        workers=(fake_worker(0, LONG), fake_worker(1, "bb")),
    )
    result = run(tmp_path, "status", terminal=terminal)
    lines = STYLE.sub("", result.stdout).splitlines()
    rows = [line.split() for line in lines if "ip-10" in line]
    assert [row[-3:] for row in rows] == [["GiB", "up", "1"], ["0%", "0", "B/s"]]
    if terminal:
        assert max(map(len, lines)) <= 80
        assert all("…" in " ".join(row) for row in rows)
    else:
        assert all(LONG in row for row in rows)


def test_json_holds_all_of_it(fleet: FakeFleet, tmp_path: Path) -> None:
    result = run(tmp_path, "status", "--json")
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    assert msgspec.convert(record["fleet"], FleetStatus) == fleet.value
    assert (record["ok"], record["tokens_per_s"], record["health"]) == (True, 0.0, None)
    assert record["serving"]["model"] == "small"


def test_who_cannot_serve_fails(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.value = fake_status(ok=False)
    result = run(tmp_path, "status")
    assert result.exit_code == 1
    assert "not ok: r0: no step has finished for 31 s" in result.stdout


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("terminal", [True, False])
def test_watching_ends_well(tmp_path: Path, waits: list[float], terminal: bool) -> None:
    result = run(tmp_path, "status", "--watch", terminal=terminal)
    assert result.exit_code == 0, result.output
    assert len(waits) == 3
    # The terminal gets the last look once more, to stay.
    assert result.stdout.count("2 stages of 15 + 15 layers") == (4 if terminal else 3)
    assert ("\x1b[?25h" in result.stdout) == terminal  # the cursor is back


def test_watching_a_server_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serving(FakeFleet(), tmp_path)
    running.__enter__()
    monkeypatch.setattr(
        "shoal.cli.status.time.sleep", lambda _seconds: running.__exit__(None, None, None)
    )
    result = run(tmp_path, "status", "--watch", "--json")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    assert "the server is gone or stuck" in result.stderr


def test_a_server_without_workers_says_what_its_health_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    health = {"ok": True, "reason": "working", "running": 2, "waiting": 1}

    def get(url: str, timeout: float) -> httpx.Response:
        del timeout
        asked.append(url)
        return httpx.Response(200, json=health)

    monkeypatch.setattr(httpx, "get", get)
    with register(StateFolder(tmp_path / "state"), model="m", url="http://a:1", control=""):
        result = run(tmp_path, "status")
        as_json = run(tmp_path, "status", "--json")
        drained = run(tmp_path, "drain", "a")
    assert result.exit_code == 0, result.output
    for said in ("m at http://a:1", "whole in this one process", "ok, working", "2 running"):
        assert said in result.stdout
    assert asked == ["http://a:1/health"] * 2
    assert json.loads(as_json.stdout)["health"] == health
    assert drained.exit_code == 1
    assert "there is nothing to move" in drained.stderr


@pytest.mark.parametrize("words", [("status",), ("drain", "a"), ("rebalance",), ("restart",)])
def test_nothing_is_served(tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run(tmp_path, *words)
    assert result.exit_code == 1
    assert "shoal serve MODEL" in result.stderr


def test_a_drain_ends_with_what_was_done(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.may_move.set()
    result = run(tmp_path, "drain", "bb")
    assert (result.exit_code, result.stdout) == (0, "bb is drained\n")


@pytest.mark.parametrize(
    ("words", "number"), [((), "1"), (("--rolling",), "1"), (("--at-once",), "65536")]
)
def test_a_restart_goes_replica_by_replica_or_all_at_once(
    fleet: FakeFleet, tmp_path: Path, words: tuple[str, ...], number: str
) -> None:
    fleet.may_move.set()
    result = run(tmp_path, "restart", *words)
    assert (result.exit_code, result.stdout) == (0, f"restarted, {number} together\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_drain_shows_that_it_goes_on(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    seen = fleet.status

    def status() -> FleetStatus:
        time.sleep(0.05)
        fleet.may_move.set()
        return seen()

    monkeypatch.setattr(fleet, "status", status)
    result = run(tmp_path, "drain", "bb", terminal=terminal)
    assert result.exit_code == 0
    assert "draining bb" in result.stderr
    # A line for each new text, not for each time that it is told.
    assert terminal or result.stderr.count("draining bb\n") == 1


@pytest.mark.usefixtures("fleet")
def test_what_cannot_be_drained(tmp_path: Path) -> None:
    result = run(tmp_path, "drain", "zzz")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: 'zzz' runs no work here" in result.stderr


@pytest.mark.usefixtures("fleet")
def test_a_bug_while_rebalancing(tmp_path: Path) -> None:
    result = run(tmp_path, "rebalance")
    assert result.exit_code == 1
    assert "a bug in Shoal" in result.stderr
