"""`shoal events` against a fleet of values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from operator_fakes import FakeFleet, fake_incident, fake_status, serving
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.engine.api import Incident
from shoal.engine.story import told
from shoal.fleet.serving_file import register
from shoal.fleet.state import StateFolder

STYLE = re.compile(r"\x1b\[[0-9;]*m")
WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FakeFleet]:
    fleet = FakeFleet()
    with serving(fleet, tmp_path):
        yield fleet


def run(folder: Path, *words: str, terminal: bool = False) -> Result:
    environment = {
        "COLUMNS": "80",
        "SHOAL_STATE": str(folder / "state"),
        "NO_COLOR": "1",
        "FORCE_COLOR": "1" if terminal else "",
    }
    return CliRunner().invoke(app, ["events", *words], env=environment)


def numbered(*numbers: int) -> tuple[Incident, ...]:
    return tuple(fake_incident(number=number, began_s=1e9 + number) for number in numbers)


def test_each_incident_is_a_line_when_piped(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.value = fake_status(incidents=numbered(1, 2))
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert re.fullmatch(f"{WHEN}  {re.escape(told(fake_incident()))}", first)
    assert first < second


def test_a_terminal_of_80_columns_folds_the_story(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.value = fake_status(incidents=(fake_incident(decisions=["[red]w7 starts on a"]),))
    lines = STYLE.sub("", run(tmp_path, terminal=True).stdout).splitlines()
    assert max(map(len, lines)) <= 80
    assert re.match(WHEN, lines[0])
    assert all(line.startswith(" " * 21) for line in lines[1:])
    told_words = " ".join(" ".join(line[21:] for line in lines).split())
    assert "[red]w7 starts on a" in told_words
    assert "(start 0.02, load 0.31, form 0.04, recompute 0.25)" in told_words


def test_json_holds_all_of_it(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.value = fake_status(incidents=numbered(4, 5, 6))
    lines = run(tmp_path, "--json", "--last", "2").stdout.splitlines()
    told_as = [msgspec.convert(json.loads(line), Incident) for line in lines]
    assert told_as == list(numbered(5, 6))


@pytest.mark.usefixtures("fleet")
def test_no_incident_is_said_beside_the_answer(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing has happened since the server started" in result.stderr


def test_following_shows_beginnings_and_ends_once(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, begun = numbered(1)[0], fake_incident(number=2, outcome="under way", phases={})
    ended = fake_incident(number=2)
    looks = iter([(old,), (old, begun), (old, begun), (old, ended), (old, ended)])
    fleet.value = fake_status(incidents=(old,))

    def sleep(_seconds: float) -> None:
        incidents = next(looks, None)
        if incidents is None:
            raise KeyboardInterrupt
        fleet.value = fake_status(incidents=incidents)

    monkeypatch.setattr("shoal.cli.events.time.sleep", sleep)
    result = run(tmp_path, "--follow", "--last", "0", "--json")
    assert result.exit_code == 0, result.output
    outcomes = [json.loads(line)["outcome"] for line in result.stdout.splitlines()]
    assert outcomes == ["under way", "recovered"]


def test_a_server_without_workers_has_none_to_lose(tmp_path: Path) -> None:
    with register(StateFolder(tmp_path / "state"), model="m", url="http://x:1", control=""):
        result = run(tmp_path)
    assert result.exit_code == 1
    assert "runs whole in one process: it has no workers to lose" in " ".join(result.output.split())
