"""How a step's time is told apart, and the limit that is set beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from bench.frames import Frames, framed
from bench.roofline import Limit, Load, Rates, Shape, limit_of
from bench.step import Account, limits_table, parts_table, record
from bench.step_log import Step, load_of, periods_s, quicker_half
from shoal.messages import Chunk, Plan, Sampling


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_frame_does_not_count_the_frames_inside() -> None:
    clock = Clock()
    frames = Frames(clock)

    def work(seconds: float) -> None:
        clock.now_s += seconds

    def layer() -> None:
        work(1.0)
        frames.run("linear", work, 4.0)
        frames.run("layer", work, 0.5)

    frames.begin("rest")
    work(0.25)
    frames.run("layer", layer)
    frames.end()
    assert frames.seconds == {"rest": 0.25, "layer": 1.5, "linear": 4.0}
    assert frames.calls == {"layer": 1, "linear": 1}
    assert sum(frames.seconds.values()) == clock.now_s


def test_nothing_is_counted_outside_a_step() -> None:
    frames = Frames(Clock())
    assert frames.run("linear", lambda: 5) == 5
    assert frames.seconds == {}


@pytest.fixture
def packages() -> Iterator[tuple[ModuleType, ModuleType]]:
    """A module, and another one that has imported a function of it."""
    home, user = ModuleType("framedpkg.home"), ModuleType("framedpkg.user")

    def attend() -> str:
        return "attended"

    class Layer:
        def __call__(self) -> str:
            return "called"

    home.attend = user.attend = attend  # type: ignore[attr-defined]
    home.Layer = Layer  # type: ignore[attr-defined]
    modules = {"framedpkg": ModuleType("framedpkg"), home.__name__: home, user.__name__: user}
    sys.modules.update(modules)
    yield home, user
    for name in modules:
        del sys.modules[name]


def test_wrappers_go_wherever_a_name_went_and_come_off(
    packages: tuple[ModuleType, ModuleType],
) -> None:
    home, user = packages
    before = user.attend, home.Layer.__call__
    sites = {
        "attention": ("framedpkg.home:attend", "framedpkg.home:not_there"),
        "layer": ("framedpkg.home:Layer.__call__", "framedpkg.gone:Layer.__call__"),
    }
    frames = Frames()
    with framed(frames, sites):
        frames.begin("rest")
        assert (user.attend(), home.attend(), home.Layer()()) == ("attended", "attended", "called")
        frames.end()
    assert frames.calls == {"attention": 2, "layer": 1}
    assert (user.attend, home.Layer.__call__) == before


def test_the_load_of_a_plan() -> None:
    def chunk(start: int, num: int) -> Chunk:
        sampling = Sampling(seed=1, position=start, temperature=0.0) if num == 1 else None
        return Chunk(
            request_id=start, start=start, tokens=[1] * num, block_ids=[0], sampling=sampling
        )

    load = load_of(Plan(epoch=0, step=0, chunks=[chunk(9, 1), chunk(0, 3)]))
    # Ten keys for the one query; 1, 2 and 3 for the three.
    assert load == Load(rows=4, head_rows=1, keys=13, pairs=16)


def test_the_limit_is_what_takes_longer() -> None:
    shape = Shape(
        weight_bytes=900,
        layer_weights=1000,
        head_weights=100,
        attention_operations_per_key=10,
        kv_bytes_per_token=5.0,
    )
    rates = Rates(bytes_per_s=1e6, operations_per_s=1e7)
    one = limit_of(shape, Load(rows=1, head_rows=1, keys=20, pairs=20), rates)
    assert (one.memory_ms, one.arithmetic_ms) == pytest.approx((1.0, 0.24))
    assert (one.ms, one.binds) == (one.memory_ms, "memory")
    many = limit_of(shape, Load(rows=32, head_rows=32, keys=20, pairs=20), rates)
    assert many.binds == "arithmetic"


def step(started_s: float, ended_s: float) -> Step:
    load = Load(rows=1, head_rows=1, keys=1, pairs=1)
    return Step(
        num_chunks=1,
        load=load,
        started_s=started_s,
        ended_s=ended_s,
        cpu_s=0.0,
        seconds={},
        calls={},
    )


def test_periods_and_the_quicker_half() -> None:
    steps = [step(0.0, 3.0), step(4.0, 5.0), step(6.0, 8.0)]
    assert periods_s(steps) == [4.0, 2.0]
    assert [one.s for one in quicker_half(steps)] == [1.0, 2.0]
    with pytest.raises(ValueError, match="no such step"):
        quicker_half([])


@pytest.fixture
def account() -> Account:
    return Account(
        work="decode-32",
        num_steps=1,
        step_ms=9.0,
        framed_ms=10.0,
        waiting_ms=0.0,
        period_ms=10.0,
        parts={"batch assembly": 2.0, "linear layers": 8.0},
        calls={"batch assembly": 1.0, "linear layers": 120.0},
        limit=Limit(memory_ms=4.0, arithmetic_ms=6.0),
    )


def test_python_is_what_no_kernel_and_no_step_takes(account: Account) -> None:
    assert account.between_share == pytest.approx(0.1)
    # A fifth of nine tenths, and the tenth between.
    assert account.python_share == pytest.approx(0.28)
    assert record(account)["python_share"] == account.python_share


def test_tables_of_a_step(account: Account) -> None:
    names, ms, shares, calls = (list(column.cells) for column in parts_table([account]).columns)
    assert names == ["linear layers", "Python: batch assembly", "all"]
    assert (ms, shares[:2], calls[:2]) == (
        ["8.00", "2.00", "10.00"],
        ["80.0%", "20.0%"],
        ["120", "1"],
    )
    limits = dict(zip(*(column.cells for column in limits_table([account]).columns), strict=True))
    assert limits["of the limit reached"] == "60% (arithmetic)"
    assert limits["outside kernels, of a period"] == "28.0%"
