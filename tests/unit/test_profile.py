"""Measuring a node: sane figures in little time, noise told, files that merge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from shoal.cluster.hardware import Cluster, Link, MatrixRate, NodeProfile
from shoal.cluster.merge import merge_clusters
from shoal.compute import native
from shoal.errors import ConfigError
from shoal.worker import node_memory, profile_layer, profile_matrices, stopwatch
from shoal.worker.profile import profile_node, usable_precisions
from shoal.worker.stopwatch import Timing, time_in_turn


def node(name: str, rate: float = 1e9) -> NodeProfile:
    rates = (MatrixRate(rows=1, weights_per_s=rate),)
    return NodeProfile(
        name=name,
        num_cores=2,
        memory_bytes=2**30,
        read_bytes_per_s=1e10,
        matrix_rates={"auto": rates},
    )


@pytest.fixture(scope="module")
def measured() -> Iterator[NodeProfile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_matrices, "_SIZE", 512)
        patch.setattr(profile_matrices, "_READ_BYTES", 2**22)
        yield profile_node(
            "here", precisions=("none", "auto"), rows=(64, 1), budget_s=0.3, num_threads=1
        )


def test_every_figure_is_measured(measured: NodeProfile) -> None:
    assert measured.name == "here" and measured.num_cores == 1
    assert measured.memory_bytes > 2**20
    assert measured.read_bytes_per_s > 1e7
    assert list(measured.matrix_rates) == ["none", "auto"]
    for rates in measured.matrix_rates.values():
        assert [rate.rows for rate in rates] == [1, 64]
        assert all(rate.weights_per_s > 1e5 for rate in rates)
    assert 0 < measured.layer_overhead_s < 1
    assert set(measured.spreads) == {
        "read_bytes_per_s",
        "layer_overhead_s",
        "activations_per_s",
        "cache_bytes_per_s",
    }


def test_more_rows_share_the_reading_of_a_weight(measured: NodeProfile) -> None:
    """A pass of 64 rows takes longer than one of 1 row, but far less than 64 of them."""
    for one, many in measured.matrix_rates.values():
        assert one.weights_per_s / 64 < many.weights_per_s < one.weights_per_s


def test_a_profile_survives_its_file(measured: NodeProfile) -> None:
    data = msgspec.json.encode(Cluster(nodes=(measured,)))
    assert msgspec.json.decode(data, type=Cluster) == Cluster(nodes=(measured,))


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match="CUDA"):
        profile_node("here", device="cuda")
    assert torch.get_num_threads() == before


def test_what_this_torch_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = SimpleNamespace(supported_engines=["none"])
    monkeypatch.setattr(torch.backends, "quantized", bare)
    monkeypatch.setattr(native, "kernels", None)
    assert usable_precisions() == ("auto", "none")
    with pytest.raises(ConfigError, match="FBGEMM"):
        profile_matrices.measure_matrices(
            "int8", (1,), budget_s=0.0, device="cpu", memory_bytes=2**30
        )


def test_calls_take_turns_and_disturbed_ones_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A series goes on where it stopped; one call in nine takes a hundred times as long."""
    clock = itertools.count()
    now_s = 0.0

    def call(name: str, seconds: float) -> None:
        nonlocal now_s
        now_s += seconds * (100 if next(clock) % 9 == 4 else 1)
        order.append(name)

    order: list[str] = []
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now_s)
    series = [
        [lambda name=name: call(name, 0.5) for name in "abcdef"],
        [lambda: call("x", 2.0)],
    ]
    quick, slow = time_in_turn(series, budget_s=2000.0)
    assert quick.seconds == pytest.approx(0.5) and slow.seconds == pytest.approx(2.0)
    assert "".join(order[:14]) == "ax" + "bcde" + "xxxx" + "fabc"


def test_spread_is_the_interquartile_range() -> None:
    assert stopwatch._summary([1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(3.0, 2 / 3)


def test_layer_sizes_are_those_of_its_matrices() -> None:
    """SmolLM2-135M: qkv 960 x 576, o 576 x 576, gate-up 3072 x 576, down 576 x 1536."""
    config = profile_layer._config(576, 9, 3, 64, 1536)
    shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
    assert profile_layer.layer_weights(config) == sum(n * k for n, k in shapes)
    assert profile_layer.layer_activations(config) == sum(n + k for n, k in shapes)


@pytest.mark.slow
def test_a_layer_lies_wholly_on_its_device() -> None:
    """The meta device computes shapes only, and refuses to mix; loading it takes seconds."""
    config = profile_layer._config(64, 2, 1, 32, 128)
    free = profile_layer._free_linears(torch.float32)
    types = profile_layer._Types(torch.float32, torch.float32)
    for call in profile_layer._calls(config, free, types, "meta", 4, 20):
        y_TE = call()
        assert isinstance(y_TE, torch.Tensor)
        assert (y_TE.shape, y_TE.device.type) == ((4, 64), "meta")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    assert node_memory._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\nactive_file 7\n")
    assert node_memory._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert node_memory._left_in_container(tmp_path) == 800


def test_merging_keeps_every_node_and_the_last_measurement_of_a_link() -> None:
    def link(source: str, target: str, latency_s: float) -> Link:
        return Link(source=source, target=target, latency_s=latency_s, bytes_per_s=1e8)

    first = Cluster(nodes=(node("a"),), links=(link("a", "b", 1.0),), default_latency_s=0.5)
    second = Cluster(nodes=(node("b"), node("a")), links=(link("b", "a", 2.0), link("a", "b", 3.0)))
    merged = merge_clusters([first, second])
    assert [one.name for one in merged.nodes] == ["a", "b"]
    assert {(one.source, one.latency_s) for one in merged.links} == {("a", 3.0), ("b", 2.0)}
    assert merged.default_latency_s == 0.5


def test_two_machines_of_one_name_do_not_merge() -> None:
    parts = [Cluster(nodes=(node("a"),)), Cluster(nodes=(node("a", rate=2e9),))]
    with pytest.raises(ConfigError, match="'a'"):
        merge_clusters(parts)
