"""`shoal token`, and what `shoal head` and `shoal join` say before they start anything."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.fleet import join_service, ray_node
from shoal.fleet.found import found_cluster
from shoal.fleet.join_service import become_node
from shoal.fleet.state import StateFolder
from shoal.fleet.tokens import draw_token


@pytest.fixture
def head(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "head")
    found_cluster(folder, node="a", address="10.0.0.1", port=8470)
    return folder


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_tokens_are_made_listed_and_revoked(head: StateFolder) -> None:
    state = ("--state", str(head.path))
    code, out, err = run("token", "create", "--ttl", "30m", "--uses", "2", *state)
    assert code == 0
    token_id = re.fullmatch(r"shoal join 10\.0\.0\.1 --token shoal-(\w{8})\.\w+\.\w+\n", out)[1]  # type: ignore[index]
    assert "For 2 machines, within 30 m" in err
    _, listed, _ = run("token", "list", *state)
    assert re.search(rf"{token_id}\s+2\s+30 m", listed)
    assert run("token", "revoke", token_id, *state)[0] == 0
    assert token_id not in run("token", "list", *state)[1]
    code, _, err = run("token", "revoke", token_id, *state)
    assert code == 1
    assert "shoal token list" in err


def test_a_wrong_duration_is_wrong_usage(head: StateFolder) -> None:
    code, _, err = run("token", "create", "--ttl", "soon", "--state", str(head.path))
    assert code == 2
    assert "1h or 7d" in err


def test_another_port_is_in_the_line_to_paste(tmp_path: Path) -> None:
    found_cluster(StateFolder(tmp_path), node="a", address="10.0.0.1", port=9000)
    assert (
        "shoal join 10.0.0.1 --port 9000 --token"
        in run("token", "create", "--state", str(tmp_path))[1]
    )


@pytest.mark.parametrize("words", [("create",), ("list",), ("revoke", "x")])
def test_tokens_need_a_cluster(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, _, err = run("token", *words, "--state", str(tmp_path))
    assert code == 1
    assert "in no cluster" in err
    assert "shoal head" in err


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ray were installed: nothing here starts it."""
    monkeypatch.setattr(ray_node, "require_ray", lambda: None)
    monkeypatch.setattr(join_service, "require_ray", lambda: None)


@pytest.mark.usefixtures("with_ray")
def test_joining_needs_a_token(tmp_path: Path) -> None:
    code, _, err = run("join", "127.0.0.1", "--state", str(tmp_path))
    assert code == 1
    assert "needs a token: run 'shoal token create'" in err


@pytest.mark.usefixtures("with_ray")
def test_a_head_does_not_join(head: StateFolder) -> None:
    token = str(draw_token("0" * 64))
    code, _, err = run("join", "127.0.0.1", "--token", token, "--state", str(head.path))
    assert code == 1
    assert "is itself a head" in err


@pytest.mark.usefixtures("with_ray")
def test_half_a_token(tmp_path: Path) -> None:
    code, _, err = run("join", "127.0.0.1", "--token", "shoal-12", "--state", str(tmp_path))
    assert code == 1
    assert "paste all of the line" in err


@pytest.mark.usefixtures("with_ray")
def test_a_node_follows_its_head_to_another_address(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    own = found_cluster(folder, node="b", address="127.0.0.1", port=1)
    folder.save(msgspec.structs.replace(own, head_address="127.0.0.9"))
    said: list[str] = []
    membership = become_node(
        folder,
        head="127.0.0.5",
        port=8470,
        token=None,
        node=None,
        address="127.0.0.1",
        default_name="host",
        report=said.append,
    )
    assert (membership.head_address, membership.port) == ("127.0.0.5", 8470)
    assert folder.load() == membership
    assert said == [f"'b' of '{own.cluster}' has its certificate still"]
