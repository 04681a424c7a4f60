"""How Ray is started under Shoal; that it then works is the namespaces' test."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from shoal.errors import ConfigError, InternalError, OperatorError
from shoal.fleet import ray_node
from shoal.fleet.ray_node import RayNode, check_port, ray_environment, start_command, use_ray
from shoal.fleet.state import Membership, StateFolder, bracketed, check_node_name, state_folder

HEAD = Membership(cluster="x", node="a", address="10.0.0.1", head_address="10.0.0.1", port=8470)
NODE = msgspec.structs.replace(HEAD, node="b", address="10.0.0.2")


def test_the_head_and_the_others_start_differently(tmp_path: Path) -> None:
    head, node = start_command(HEAD, tmp_path, 4), start_command(NODE, tmp_path, 2)
    assert "--head" in head
    assert "--port=8471" in head
    assert "--labels=shoal.dev/node=a" in head
    assert "--head" not in node
    assert "--address=10.0.0.1:8471" in node
    assert "--labels=shoal.dev/node=b" in node
    assert "--num-cpus=2" in node


def test_ray_is_never_open(tmp_path: Path) -> None:
    settings = ray_environment(StateFolder(tmp_path))
    assert settings["RAY_USE_TLS"] == "1"
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["RAY_TLS_CA_CERT"] == str(tmp_path / "identity/ca.pem")
    assert settings["RAY_USAGE_STATS_ENABLED"] == "0"


def test_without_ray_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[cluster\]'"):
        RayNode(StateFolder(tmp_path), HEAD).start()


def test_ray_must_not_be_imported_before_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_node, "require_ray", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(InternalError, match="before its settings"):
        use_ray(StateFolder(tmp_path))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.2.*N, N[+]1 and N[+]2"):
            check_port("127.0.0.2", port)
    check_port("127.0.0.2", port)


def test_a_start_that_fails_shows_what_ray_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_node, "require_ray", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing = [sys.executable, "-c", "print('no memory'); raise SystemExit(1)"]
    monkeypatch.setattr(ray_node, "start_command", lambda *_: failing)
    node = RayNode(StateFolder(tmp_path), NODE)
    node.start()
    with pytest.raises(OperatorError, match=r"ray\.log ends with:\nno memory"):
        ray_node.wait_until_up(node, threading.Event())
    node.stop()


# ---- the state folder ---------------------------------------------------------------------


def test_where_the_state_lies(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    assert state_folder(chosen, {"SHOAL_STATE": "/x"}).path == chosen
    assert state_folder(None, {"SHOAL_STATE": "/x"}).path == Path("/x")
    assert state_folder(None, {"XDG_STATE_HOME": "/s"}).path == Path("/s/shoal/cluster")
    assert state_folder(None, {}).path.parts[-2:] == ("shoal", "cluster")


def test_state_survives(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "new")
    assert folder.find() is None
    with pytest.raises(ConfigError, match="in no cluster"):
        folder.load()
    folder.save(NODE)
    assert folder.load() == NODE
    assert folder.path.stat().st_mode & 0o077 == 0


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"cluster": 1}')
    with pytest.raises(ConfigError, match="repair or remove it"):
        StateFolder(tmp_path).find()


def test_one_node_runs_once(tmp_path: Path) -> None:
    with (
        StateFolder(tmp_path).held(),
        pytest.raises(ConfigError, match=r"runs with .* already"),
        StateFolder(tmp_path).held(),
    ):
        pytest.fail("must not come here")
    with StateFolder(tmp_path).held():
        pass


def test_scratch_is_short_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = StateFolder(tmp_path / ("long" * 40))
    scratch = folder.scratch()
    assert len(str(scratch)) <= len(str(tmp_path)) + 25
    assert scratch.parent.stat().st_mode & 0o077 == 0
    scratch.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="not this user's alone"):
        folder.scratch()


@pytest.mark.parametrize("name", ["", "-a", "a-", "a b", "a\n", "x" * 64, "../x", "\x1b[2J"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a node"):
        check_node_name(name)
    for good in ("a", "rack1.node_2", "x" * 63):
        check_node_name(good)


def test_addresses_with_ports() -> None:
    assert bracketed("10.0.0.1", 1) == "10.0.0.1:1"
    assert bracketed("fd00::1", 1) == "[fd00::1]:1"
