"""Every communicator: the same sums bit for bit, the same parts, and no wait without an end."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from communicator_mesh import (
    connected,
    partials,
    run_ranks,
    socket_exchange,
    sum_in_order,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import FrameError, InternalError, PeerLost

IN_MEMORY = ["memory", "memory without kernels", "memory of both kinds"]
KINDS = [*IN_MEMORY, "sockets", "gloo"]
DTYPES = [torch.float32, torch.bfloat16]
# One row, odd ones, none, and some beyond a slot of 4096 bytes and what a socket sends directly.
SHAPES = [(1, 576), (3, 7), (5, 1001), (0, 8), (2, 1024), (9, 1111), (1, 1)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_in_rank_order_on_every_rank(
    kind: str, num_ranks: int, tmp_path: Path
) -> None:
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    with connected(kind, num_ranks, tmp_path) as ranks:

        def reduce_all(rank: int) -> list[torch.Tensor]:
            return [ranks[rank].all_reduce(partials(num_ranks, *case)[rank]) for case in cases]

        sums_of_ranks = run_ranks(num_ranks, reduce_all)
    for i, case in enumerate(cases):
        expected = sum_in_order(partials(num_ranks, *case))
        for sums in sums_of_ranks:
            assert sums[i].dtype == expected.dtype
            assert torch.equal(sums[i], expected)


def test_the_order_of_these_sums_matters() -> None:
    parts = partials(4, (5, 1001), torch.float32)
    assert not torch.equal(sum_in_order(parts), sum_in_order(parts[::-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_0_gathers_parts_of_unequal_width(kind: str, tmp_path: Path) -> None:
    def part(rank: int) -> torch.Tensor:
        return torch.arange(3.0 * (700 * rank + 5)).view(3, -1) + rank

    with connected(kind, 3, tmp_path) as ranks:
        gathered = run_ranks(3, lambda rank: ranks[rank].gather(part(rank)))
        empty = run_ranks(3, lambda rank: ranks[rank].gather(torch.zeros(0, 4 + rank)))
    assert gathered[1:] == [None, None]
    assert gathered[0] is not None and empty[0] is not None
    assert [torch.equal(each, part(rank)) for rank, each in enumerate(gathered[0])] == [True] * 3
    assert [each.shape for each in empty[0]] == [(0, 4), (0, 5), (0, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_may_be_changed_and_outlives_later_calls(kind: str, tmp_path: Path) -> None:
    with connected(kind, 2, tmp_path) as ranks:

        def keep_first(rank: int) -> torch.Tensor:
            first = ranks[rank].all_reduce(torch.ones(4))
            first += 1
            for _ in range(3):
                ranks[rank].all_reduce(torch.full((4,), 7.0))
            return first

        assert [first.tolist() for first in run_ranks(2, keep_first)] == [[3.0] * 4] * 2


@pytest.mark.parametrize("columns", [3, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_strided_partials(kind: str, columns: int, tmp_path: Path) -> None:
    parts = [torch.randn(columns, 2) for _ in range(2)]
    with connected(kind, 2, tmp_path) as ranks:
        sums = run_ranks(2, lambda rank: ranks[rank].all_reduce(parts[rank].clone().T))
    for each in sums:
        assert torch.equal(each, (parts[0] + parts[1]).T)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    num_ranks=st.integers(2, 4),
    kind=st.sampled_from([*IN_MEMORY, "sockets"]),
    calls=st.lists(
        st.tuples(st.sampled_from(["sum", "gather"]), st.integers(1, 3), st.integers(1, 3000)),
        min_size=1,
        max_size=12,
    ),
)
def test_any_sequence_of_calls_at_any_pace(
    seed: int, num_ranks: int, kind: str, calls: list[tuple[str, int, int]]
) -> None:
    with TemporaryDirectory() as folder, connected(kind, num_ranks, Path(folder)) as ranks:

        def make_calls(rank: int) -> None:
            pace = random.Random(seed + rank)
            for call, num_rows, width in calls:
                time.sleep(pace.choice((0, 0, 0.0002, 0.001)))
                if call == "sum":
                    parts = partials(num_ranks, (num_rows, width), torch.float32)
                    expected = sum_in_order(parts)
                    assert torch.equal(ranks[rank].all_reduce(parts[rank]), expected)
                else:
                    check_gather(rank, num_rows, width)

        def check_gather(rank: int, num_rows: int, width: int) -> None:
            parts = [torch.full((num_rows, width + 500 * other), other) for other in range(4)]
            gathered = ranks[rank].gather(parts[rank])
            if rank == 0:
                assert gathered is not None
                assert all(map(torch.equal, gathered, parts[:num_ranks]))

        run_ranks(num_ranks, make_calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_rank_is_lost_at_the_deadline(kind: str, tmp_path: Path) -> None:
    with connected(kind, 2, tmp_path, timeout_s=0.2) as ranks:
        started_s = time.monotonic()
        with pytest.raises(PeerLost):
            ranks[0].all_reduce(torch.ones(8))
        assert 0.19 < time.monotonic() - started_s < 2


@pytest.mark.parametrize("num_floats", [8, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_close_wakes_a_waiting_call(kind: str, num_floats: int, tmp_path: Path) -> None:
    # A parked gloo call ends by its own timeout, so that one must be short.
    timeout_s = 0.8 if kind == "gloo" else 10.0
    with connected(kind, 2, tmp_path, timeout_s=timeout_s) as ranks:
        closer = threading.Timer(0.05, ranks[0].close)
        closer.start()
        started_s = time.monotonic()
        with pytest.raises(PeerLost):
            ranks[0].all_reduce(torch.ones(num_floats))
        assert time.monotonic() - started_s < 0.7
        with pytest.raises(PeerLost):
            ranks[0].all_reduce(torch.ones(num_floats))
        closer.join()
    for thread in threading.enumerate():
        if thread.name == "shoal-parked-group":
            thread.join(10)
            assert not thread.is_alive()


def test_any_mix_of_modes(tmp_path: Path) -> None:
    with connected("memory", 2, tmp_path) as ranks:

        def both_modes(rank: int) -> torch.Tensor:
            with torch.inference_mode():
                ranks[rank].all_reduce(torch.ones(5, dtype=torch.bfloat16))
            return ranks[rank].all_reduce(torch.ones(5, dtype=torch.bfloat16))

        assert [each.tolist() for each in run_ranks(2, both_modes)] == [[2.0] * 5] * 2


@pytest.mark.parametrize("kind", [*IN_MEMORY, "sockets"])
def test_what_is_sent_is_counted(kind: str, tmp_path: Path) -> None:
    with connected(kind, 3, tmp_path) as ranks:
        run_ranks(3, lambda rank: ranks[rank].all_reduce(torch.ones(100)))
        for rank in ranks:
            assert rank.sent_messages == 2
            assert 800 <= rank.sent_bytes < 1000  # a frame has a prefix besides its body


# ---- what only sockets have ---------------------------------------------------------------


def test_messages_beyond_every_socket_buffer_do_not_deadlock() -> None:
    parts = [torch.randn(64, 32_768) for _ in range(3)]  # 8 MiB each
    ranks = socket_exchange(3)
    sums = run_ranks(3, lambda rank: ranks[rank].all_reduce(parts[rank].clone()))
    assert all(torch.equal(each, parts[0] + parts[1] + parts[2]) for each in sums)
    for rank in ranks:
        rank.close()


def test_a_rank_that_closes_is_lost_at_once() -> None:
    ranks = socket_exchange(2)
    ranks[1].close()
    started_s = time.monotonic()
    with pytest.raises(PeerLost):
        ranks[0].all_reduce(torch.ones(8))
    assert time.monotonic() - started_s < 1
    ranks[0].close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_on_the_wire_is_the_same_on_every_rank(dtype: torch.dtype) -> None:
    parts = [torch.randn(6, 500).to(dtype) for _ in range(3)]
    ranks = socket_exchange(3, wire_format="int8")
    sums = run_ranks(3, lambda rank: ranks[rank].all_reduce(parts[rank]))
    exact = sum_in_order([part.float() for part in parts])
    steps = sum(part.float().abs().amax(dim=1, keepdim=True) / 127 for part in parts)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    assert sums[0].dtype == dtype
    rounding = exact.abs() * 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert bool(((sums[0].float() - exact).abs() <= steps * 0.5 + rounding).all())
    assert not torch.equal(sums[0].float(), exact)
    assert ranks[0].sent_bytes < 2 * (6 * (8 * 4 + 500) + 100)
    for rank in ranks:
        rank.close()


def test_ranks_that_make_different_calls_hear_so() -> None:
    ranks = socket_exchange(2)
    ranks[1].gather(torch.ones(2))
    with pytest.raises(FrameError, match="where a sum is due"):
        ranks[0].all_reduce(torch.ones(2))
    for rank in ranks:
        rank.close()


def test_channels_must_come_in_pairs() -> None:
    ranks = socket_exchange(2)
    with pytest.raises(InternalError, match="one of each"):
        type(ranks[0])(0, [None], [None])
    for rank in ranks:
        rank.close()
