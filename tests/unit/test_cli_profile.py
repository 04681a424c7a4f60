"""`shoal profile`: what is printed, kept, merged and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from shoal.cli.app import app
from shoal.cluster.hardware import Cluster, Link, MatrixRate, NodeProfile
from shoal.errors import PeerLost
from shoal.parallel.endpoint import LocalOnly, Plaintext
from shoal.worker import profile as worker_profile


def make_node(name: str, *, spread: float = 0.02) -> NodeProfile:
    return NodeProfile(
        name=name,
        num_cores=2,
        memory_bytes=3 * 2**30,
        read_bytes_per_s=20.5e9,
        matrix_rates={
            "auto": (
                MatrixRate(rows=1, weights_per_s=11.25e9, spread=spread),
                MatrixRate(rows=64, weights_per_s=1.5e9),
            ),
            "none": (MatrixRate(rows=1, weights_per_s=5e9),),
        },
        layer_overhead_s=321e-6,
        cache_bytes_per_s=7e9,
        spreads={"read_bytes_per_s": 0.06},
    )


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Instead of measuring, remember what was asked for."""
    calls: list[dict[str, Any]] = []

    def profile_node(name: str, **options: Any) -> NodeProfile:
        calls.append(options)
        return make_node(name)

    monkeypatch.setenv("SHOAL_STATE", str(tmp_path / "no-cluster"))
    monkeypatch.setattr(worker_profile, "profile_node", profile_node)
    return calls


def run(*arguments: str) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["profile", *arguments], env=environment)


def keep(path: Path, *nodes: NodeProfile) -> Path:
    path.write_bytes(msgspec.json.encode(Cluster(nodes=nodes)))
    return path


def test_a_table_for_people(asked: list[dict[str, Any]]) -> None:
    result = run("--name", "box", "--threads", "3", "--seconds", "5", "--quantize", "int8")
    assert result.exit_code == 0
    for figure in ("box", "3.0 GiB", "20.50 GB/s", "± 3%", "321 µs", "11.25", "1.50", "too quick"):
        assert figure in result.stdout
    options = asked[0]
    assert (options["num_threads"], options["budget_s"]) == (3, 5.0)
    assert options["precisions"] == ("int8",)


def test_a_file_that_plan_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    result = run("--json", "--name", "box", "-o", str(path))
    assert result.exit_code == 0
    expected = Cluster(nodes=(make_node("box"),))
    assert msgspec.json.decode(path.read_bytes(), type=Cluster) == expected
    assert msgspec.json.decode(result.stdout, type=Cluster) == expected


def test_noise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = make_node("box", spread=0.5)
    monkeypatch.setattr(worker_profile, "profile_node", lambda *_, **__: noisy)
    result = run()
    assert "noisy" in result.stderr and "auto at 1 rows" in result.stderr


def test_two_machines_become_a_cluster(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    parts = [keep(tmp_path / f"{name}.json", make_node(name)) for name in "ab"]
    merged = tmp_path / "cluster.json"
    result = run("--merge", *map(str, parts), "-o", str(merged))
    assert result.exit_code == 0 and asked == []
    assert [node.name for node in msgspec.json.decode(merged.read_bytes(), type=Cluster).nodes] == [
        "a",
        "b",
    ]


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"model": "x"}')
    result = run("--merge", str(path))
    assert result.exit_code == 1
    assert "is no result of 'shoal profile'" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--merge",), ("--answer", "tls:0.0.0.0:1", "--link-to", "tls:10.0.0.2:1"), ("setup.cfg",)],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_links_need_a_cluster(asked: list[dict[str, Any]]) -> None:
    result = run("--link-to", "tls:127.0.0.1:8480")
    assert result.exit_code == 1 and asked == []
    assert "shoal head" in result.stderr


def test_links_are_measured_first_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    def measure(address: str, security: object, *, here: str) -> tuple[Link, ...]:
        assert (address, here, asked) == ("unix:/s", "box", [])
        assert isinstance(security, LocalOnly)
        return (Link(source=here, target="there", latency_s=50e-6, bytes_per_s=1e9),)

    monkeypatch.setattr("shoal.cli.link_meeting.measure_links_to", measure)
    path = tmp_path / "a.json"
    result = run("--name", "box", "--link-to", "unix:/s", "-o", str(path))
    assert result.exit_code == 0
    assert "50 µs" in result.stdout and "1,000.0 MB/s" in result.stdout
    (link,) = msgspec.json.decode(path.read_bytes(), type=Cluster).links
    assert (link.source, link.target) == ("box", "there")


def test_plaintext_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(address: str, security: object, *, here: str) -> tuple[Link, ...]:
        del address, here
        assert isinstance(security, Plaintext)
        raise PeerLost("nobody there")

    monkeypatch.setattr("shoal.cli.link_meeting.measure_links_to", measure)
    result = run("--link-to", "tcp:10.0.0.2:8480", "--insecure-plaintext")
    assert result.exit_code == 1
    assert "INSECURE" in result.stderr and "nobody there" in result.stderr
