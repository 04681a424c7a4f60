"""The workers of a replica get together: who is told what, and whose answers count."""

from __future__ import annotations

from itertools import repeat

import pytest
from crew_fakes import Notes, crew_over, muster_over
from fleet_fakes import CONFIG, DIMS, LOADED, PLACEMENT, FakeWorkers
from msgspec import structs

from shoal.cluster.placement import ReplicaPlacement, Seat
from shoal.config import EngineConfig, Split
from shoal.errors import OutOfMemory, PeerLost, PlacementError, ShoalError, SourceError
from shoal.fleet.crew import Crew, FirstTrouble
from shoal.fleet.inbox import Lost
from shoal.fleet.transport import transport_of
from shoal.messages import Plan, StepResult
from shoal.parallel.control import Failed, Form, Load, OpenCache
from shoal.parallel.partition import Span, shards_of


def placement_of(*ranks_per_stage: int, nodes: tuple[str, ...] = ("here",)) -> ReplicaPlacement:
    """Stages with so many ranks each, the ranks on the nodes in turn."""
    stages = []
    for index, num_ranks in enumerate(ranks_per_stage):
        shards = shards_of(DIMS, Span(index, index + 1), [1.0] * num_ranks)
        stages.append(
            tuple(
                Seat(worker=f"{index}.{s.rank}", node=nodes[s.rank % len(nodes)], shard=s)
                for s in shards
            )
        )
    return ReplicaPlacement(stages=tuple(stages))


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


def manned(workers: FakeWorkers, placement: ReplicaPlacement = PLACEMENT) -> Crew:
    crew = crew_over(muster_over(workers, placement, home=("here",)), placement)
    crew.man(FirstTrouble())
    return crew


def form_of(crew: Crew, stage: int, rank: int) -> Form:
    return crew.members[crew.stages[stage][rank].worker].line.form  # type: ignore[attr-defined]


def address(crew: Crew, stage: int, rank: int) -> str:
    return f"unix:/{crew.stages[stage][rank].worker}"


# ---- manning ----------------------------------------------------------------------------------


def test_a_worker_is_started_and_loaded_for_every_seat(workers: FakeWorkers) -> None:
    crew = crew_over(muster_over(workers))
    notes = Notes()
    crew.man(notes)
    assert workers.started == ["r0s0t0-1", "r0s1t0-2", "r0s2t0-3"] == list(crew.members)
    load, opened = workers.lines["r0s1t0-2"].told
    assert isinstance(load, Load) and opened == OpenCache(num_blocks=LOADED.num_blocks)
    assert load.path == "/here/model" and load.shard.layers == Span(10, 20)
    assert load.memory_share == pytest.approx(1 / 3) and load.own_cores
    assert (load.num_threads, load.cores) == (2, (0, 1))
    assert notes.phases == ["start", "load"]
    assert notes.decisions[0] == "r0s0t0-1 starts on here"
    assert crew.is_broken, "they have not formed yet"


def test_a_formed_crew_is_whole_until_somebody_is_lost(workers: FakeWorkers) -> None:
    crew = manned(workers)
    assert crew.form(0, FirstTrouble()) == 1
    assert not crew.is_broken
    woken: list[bool] = []
    crew.on_trouble = lambda: woken.append(crew.is_broken)
    workers.lines["r0s1t0-2"].die()
    assert woken == [True]


@pytest.mark.parametrize(
    ("script", "trouble", "raised"),
    [
        ("at_load", Failed(epoch=0, kind="OutOfMemory", message="no room"), OutOfMemory),
        ("at_load", Lost("it hung up"), PeerLost),
        ("at_start", Lost("exit status 3"), PeerLost),
        ("at_start", PlacementError("no such node"), PlacementError),
        ("at_cache", Failed(epoch=0, kind="OutOfMemory", message="no room"), OutOfMemory),
        ("at_cache", Lost("it hung up"), PeerLost),
    ],
    ids=["cannot load", "dies loading", "ends", "cannot start", "no cache", "dies opening it"],
)
def test_the_first_trouble_is_raised_and_nobody_is_left_behind(
    script: str, trouble: object, raised: type[ShoalError], workers: FakeWorkers
) -> None:
    getattr(workers, script)["r0s1t0"] = repeat(trouble)
    crew = crew_over(muster_over(workers))
    with pytest.raises(raised):
        crew.man(FirstTrouble())
    crew.dismiss()
    assert not workers.running and not workers.expected
    assert all(line.dismissed for line in workers.lines.values())


def test_who_is_not_wanted_any_more_leaves_nobody_behind(workers: FakeWorkers) -> None:
    workers.at_start["r0s1t0"] = repeat(Lost("exit status 3"))

    def stop() -> None:
        if len(workers.started) > 4:
            raise SourceError("enough")

    crew = crew_over(muster_over(workers))
    with pytest.raises(SourceError, match="enough"):
        crew.man(Notes(stop))
    crew.dismiss()
    assert not workers.running and not workers.expected


# ---- forming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1, 9)])
def test_every_rank_receives_hidden_states_from_exactly_one(
    ranks: tuple[int, ...], workers: FakeWorkers
) -> None:
    crew = manned(workers, placement_of(*ranks))
    crew.form(5, FirstTrouble())
    for index, num_ranks in enumerate(ranks):
        for rank in range(num_ranks):
            form = form_of(crew, index, rank)
            assert form.ranks == [address(crew, index, each) for each in range(num_ranks)]
            if index == 0:
                assert form.previous_rank is None
                continue
            own = address(crew, index, rank)
            before = range(ranks[index - 1])
            senders = [r for r in before if own in form_of(crew, index - 1, r).next_stage]
            assert senders == [form.previous_rank]
    last = len(ranks) - 1
    assert all(form_of(crew, last, rank).next_stage == [] for rank in range(ranks[-1]))


def test_ranks_of_a_stage_share_a_session_that_no_other_has(workers: FakeWorkers) -> None:
    crew = manned(workers, placement_of(2, 2))
    sessions = []
    for epoch in (1, 2):
        assert crew.form(epoch, FirstTrouble()) == epoch
        for stage in range(2):
            (session,) = {form_of(crew, stage, rank).session for rank in range(2)}
            sessions.append(session)
    assert len(set(sessions)) == 4


def test_a_crew_has_the_blocks_of_its_least_member(workers: FakeWorkers) -> None:
    workers.at_load["1.0"] = iter([structs.replace(LOADED, num_blocks=4)])
    crew = manned(workers, placement_of(1, 1))
    crew.form(1, FirstTrouble())
    assert crew.num_blocks == 4
    assert {line.form.num_blocks for line in workers.lines.values()} == {4}


def test_shared_memory_is_for_ranks_of_one_node() -> None:
    here, apart = placement_of(2).stages[0], placement_of(2, nodes=("here", "there")).stages[0]
    assert transport_of(here, CONFIG) == "shared-memory"
    assert transport_of(apart, CONFIG) == "sockets"
    forced = EngineConfig(model="any", split=Split(transport="gloo"))
    assert transport_of(here, forced) == "gloo"


# ---- steps ------------------------------------------------------------------------------------


def test_a_plan_goes_to_all(workers: FakeWorkers) -> None:
    crew = manned(workers)
    crew.broadcast(Plan(epoch=1, step=0, chunks=[]))
    assert [line.num_plans for line in workers.lines.values()] == [1, 1, 1]
    workers.lines["r0s1t0-2"].die()
    with pytest.raises(PeerLost):
        crew.broadcast(Plan(epoch=1, step=1, chunks=[]))


def test_a_crew_takes_no_result_of_an_epoch_before(workers: FakeWorkers) -> None:
    crew = manned(workers)
    crew.form(2, FirstTrouble())
    last = workers.lines["r0s2t0-3"]
    last.say(Failed(epoch=1, step=9, kind="PeerLost", message="old"))
    for epoch in (1, 2):
        last.say(StepResult(epoch=epoch, step=epoch, results=[]))
    assert crew.next_result(2, timeout_s=1).step == 2
    last.say(Failed(epoch=2, step=3, kind="SourceError", message="new"))
    with pytest.raises(SourceError, match="new"):
        crew.next_result(2, timeout_s=1)
    with pytest.raises(PeerLost, match="no step has finished within 0 s") as raised:
        crew.next_result(2, timeout_s=0.01)
    assert raised.value.noticed_by == "step deadline"


def test_how_a_loss_was_noticed_is_told(workers: FakeWorkers) -> None:
    crew = manned(workers)
    crew.form(1, FirstTrouble())
    first, second, third = workers.lines.values()
    third.say(Failed(epoch=1, step=0, kind="PeerLost", message="stage 0 is silent"))
    with pytest.raises(PeerLost) as raised:
        crew.next_result(1, timeout_s=1)
    assert raised.value.noticed_by == "report"
    first.lose(Lost("silent for 1.30 s", noticed_by="heartbeat", silence_s=1.3))
    second.die()
    noticed = []
    for _ in range(2):
        with pytest.raises(PeerLost) as raised:
            crew.next_result(1, timeout_s=1)
        noticed.append(raised.value.noticed_by)
    assert noticed == ["heartbeat", "connection"]
    notes = Notes()
    crew.form(2, notes)
    assert notes.losses == [
        ("r0s0t0-1", "heartbeat", 1.3),
        ("r0s1t0-2", "connection", 0.0),
    ]
