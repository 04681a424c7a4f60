"""Who sits where and what is done about losses: the brain alone, with a clock set by hand."""

from __future__ import annotations

import itertools

import pytest
from fleet_fakes import DIMS

from shoal.cluster.blame import LONGEST_PAUSE_S, LOSSES_IN_A_ROW, PATIENT_LOSSES, REST_S
from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.cluster.supervisor import (
    CALL_S,
    FORM_S,
    LOAD_S,
    REPLAN_S,
    SETTLE_S,
    Dismiss,
    Form,
    Instruction,
    Load,
    Replan,
    Start,
    Supervisor,
)
from shoal.config import Split


def placement_of(*nodes: str) -> ReplicaPlacement:
    """One stage on each node."""
    return divide(DIMS, Split(pipeline=len(nodes)), list(nodes)).replicas[0]


class Rig:
    """A supervisor whose workers do what they are told at once, except as a test says."""

    def __init__(self, *nodes: str, home: tuple[str, ...] = (), epoch: int = 0) -> None:
        self.now_s = 1000.0
        self.brain = Supervisor(
            placement_of(*nodes), numbers=itertools.count(1), home=home, epoch=epoch
        )

    def next(self) -> list[Instruction]:
        told = self.brain.next(self.now_s)
        self.brain.check()
        return told

    def serve(self, told: list[Instruction] | None = None) -> list[Instruction]:
        """Have workers call, load and form until there is nothing more to do; all that was told."""
        every: list[Instruction] = []
        told = self.next() if told is None else told
        while told or (self.brain.is_manned and not self.brain.is_formed):
            every += told
            for each in told:
                self.obey(each)
            self.now_s += SETTLE_S
            told = self.next()
        return every

    def obey(self, told: Instruction) -> None:
        match told:
            case Start(seat=seat):
                self.brain.called(seat.worker, self.now_s)
            case Load(seat=seat):
                self.brain.loaded(seat.worker)
            case Form(epoch=epoch):
                for worker in self.workers:
                    self.brain.formed(worker, epoch)

    def formed(self) -> Rig:
        self.serve()
        assert self.brain.is_formed
        return self

    def lose(self, index: int = 0, *, silent: bool = False) -> None:
        self.brain.lost(self.workers[index], self.now_s, silent=silent)

    @property
    def workers(self) -> list[str]:
        return [seat.worker for seat in self.brain.placement.seats]

    @property
    def nodes(self) -> list[str]:
        return [seat.node for seat in self.brain.placement.seats]


def kinds(told: list[Instruction]) -> list[type[Instruction]]:
    return [type(each) for each in told]


# ---- getting together -------------------------------------------------------------------------


def test_all_are_started_then_loaded_then_formed() -> None:
    rig = Rig("a", "b", "c")
    assert kinds(rig.serve()) == [Start] * 3 + [Load] * 3 + [Form]
    assert rig.workers == ["r0s0t0-1", "r0s1t0-2", "r0s2t0-3"]
    assert rig.brain.is_formed and rig.brain.epoch == 1
    assert rig.next() == [] and rig.brain.wake_s() is None


def test_only_the_seat_of_a_lost_one_is_filled_and_all_form_anew() -> None:
    rig = Rig("a", "b", "c").formed()
    rig.lose(1)
    assert not rig.brain.is_formed and rig.brain.num_called_for == 1
    start, load, form = rig.serve()
    assert isinstance(start, Start) and start.seat.worker == "r0s1t0-4"
    assert load == Load(start.seat) and form == Form(2)
    assert rig.workers == ["r0s0t0-1", "r0s1t0-4", "r0s2t0-3"]


def test_nobody_forms_while_a_seat_is_empty_or_loading() -> None:
    rig = Rig("a", "b")
    first, second = rig.next()
    rig.obey(first)
    (load,) = rig.next()
    rig.obey(load)
    rig.now_s += 1
    assert rig.next() == [] and not rig.brain.is_manned
    rig.obey(second)
    assert rig.serve()[-1] == Form(1)


def test_news_of_strangers_changes_nothing() -> None:
    rig = Rig("a", "b").formed()
    gone = rig.workers[0]
    rig.lose(0)
    rig.serve()
    before = rig.brain.placement
    for worker in (gone, "nobody"):
        rig.brain.called(worker, rig.now_s)
        rig.brain.loaded(worker)
        rig.brain.formed(worker, rig.brain.epoch)
        rig.brain.not_formed(worker, rig.brain.epoch, rig.now_s)
        rig.brain.failed(worker, rig.now_s)
        rig.brain.lost(worker, rig.now_s, silent=True)
    assert rig.next() == []
    assert rig.brain.is_formed and rig.brain.placement == before


# ---- epochs -----------------------------------------------------------------------------------


def test_epochs_grow_whatever_happens() -> None:
    rig = Rig("a", "b")
    epochs = []
    for number in range(4):
        rig.brain.begin(rig.now_s)
        rig.serve()
        epochs.append(rig.brain.epoch)
        rig.lose(number % 2)
        rig.brain.worked()
    assert epochs == [1, 2, 3, 4]


def test_an_epoch_is_later_than_any_that_a_worker_of_an_earlier_head_has_heard_of() -> None:
    rig = Rig("a", "b")
    first, second = rig.next()
    assert isinstance(first, Start)
    rig.brain.called(first.seat.worker, rig.now_s, epoch=7)
    rig.obey(second)
    assert rig.serve()[-1] == Form(8)


def test_an_epoch_is_at_least_the_one_that_is_wanted() -> None:
    rig = Rig("a").formed()
    rig.brain.begin(rig.now_s, epoch=5)
    assert rig.serve() == [Form(5)]
    rig.brain.begin(rig.now_s, epoch=2)
    assert rig.serve() == [Form(6)]


def test_what_was_formed_for_an_epoch_before_does_not_count() -> None:
    rig = Rig("a").formed()
    rig.brain.begin(rig.now_s)
    rig.now_s += SETTLE_S
    assert rig.next() == [Form(2)]
    rig.brain.formed(rig.workers[0], 1)
    assert not rig.brain.is_formed
    rig.brain.formed(rig.workers[0], 2)
    assert rig.brain.is_formed


# ---- deadlines --------------------------------------------------------------------------------


def test_who_does_not_call_is_replaced() -> None:
    rig = Rig("a")
    (start,) = rig.next()
    assert isinstance(start, Start)
    assert rig.brain.wake_s() == rig.now_s + CALL_S
    rig.now_s += CALL_S - 0.1
    assert rig.next() == []
    rig.now_s += 0.1
    dismiss, again = rig.next()
    assert dismiss == Dismiss(start.seat.worker)
    assert isinstance(again, Start) and again.seat.worker != start.seat.worker


def test_who_does_not_load_is_replaced() -> None:
    rig = Rig("a")
    rig.obey(rig.next()[0])
    rig.next()
    late = rig.workers[0]
    assert rig.brain.wake_s() == rig.now_s + LOAD_S
    rig.now_s += LOAD_S
    assert kinds(rig.next()) == [Dismiss, Start]
    assert late not in rig.workers


def test_who_says_nothing_to_a_form_is_replaced_and_nobody_else() -> None:
    rig = Rig("a", "b").formed()
    rig.brain.begin(rig.now_s)
    rig.now_s += SETTLE_S
    assert rig.next() == [Form(2)]
    patient, mute = rig.workers
    rig.brain.formed(patient, 2)
    assert rig.brain.wake_s() == rig.now_s + FORM_S
    rig.now_s += FORM_S
    dismiss, start = rig.next()
    assert dismiss == Dismiss(mute) and isinstance(start, Start)
    assert rig.serve([start])[-1] == Form(3)
    assert rig.workers[0] == patient


def test_a_report_of_a_neighbour_waits_for_the_news_of_its_own_line() -> None:
    rig = Rig("a", "b").formed()
    rig.brain.begin(rig.now_s)
    rig.now_s += SETTLE_S
    rig.next()
    rig.brain.not_formed(rig.workers[0], 2, rig.now_s)
    assert rig.next() == [], "the one that it cannot reach may be lost"
    rig.lose(1)
    assert kinds(rig.serve()) == [Start, Load, Form]


def test_who_cannot_form_three_times_is_replaced() -> None:
    rig = Rig("a", "b").formed()
    reporter = rig.workers[0]
    rig.brain.begin(rig.now_s)
    for epoch in (2, 3, 4):
        rig.now_s += SETTLE_S
        assert rig.next() == [Form(epoch)]
        rig.brain.not_formed(reporter, epoch, rig.now_s)
        rig.brain.not_formed(rig.workers[1], epoch - 1, rig.now_s)
    told = rig.serve()
    assert kinds(told) == [Dismiss, Start, Load, Form]
    assert told[0] == Dismiss(reporter)


def test_failures_to_form_are_forgotten_when_all_have_formed() -> None:
    rig = Rig("a", "b").formed()
    reporter = rig.workers[0]
    for _ in range(4):
        rig.brain.begin(rig.now_s)
        rig.now_s += SETTLE_S
        (form,) = rig.next()
        assert isinstance(form, Form)
        rig.brain.not_formed(reporter, form.epoch, rig.now_s)
        assert kinds(rig.serve()) == [Form]
    assert reporter in rig.workers


# ---- losses in a row --------------------------------------------------------------------------


def pauses(rig: Rig, number: int) -> list[float]:
    """How long the seat stays empty after each of so many losses."""
    found = []
    for _ in range(number):
        rig.now_s += 1
        rig.lose()
        began_s = rig.now_s
        while not (told := rig.next()):
            wake_s = rig.brain.wake_s()
            assert wake_s is not None and wake_s > rig.now_s
            rig.now_s = wake_s
        if Replan in kinds(told):
            return found
        found.append(rig.now_s - began_s)
        rig.serve(told)
    return found


def test_after_losses_in_a_row_there_is_ever_more_time_between_attempts() -> None:
    found = pauses(Rig("a", home=("a",)).formed(), LOSSES_IN_A_ROW - 1)
    assert found[:PATIENT_LOSSES] == [0] * PATIENT_LOSSES
    rest = found[PATIENT_LOSSES:]
    assert rest == pytest.approx([0.5, 1.0, 2.0]) and max(rest) <= LONGEST_PAUSE_S


def test_workers_of_a_node_that_are_lost_together_are_one_loss() -> None:
    rig = Rig(*"aaaaaaaa", home=("a",)).formed()
    for index in range(8):
        rig.now_s += 0.05
        rig.lose(index)
    assert kinds(rig.next()) == [Start] * 8


def test_a_step_that_finishes_ends_the_row() -> None:
    rig = Rig("a", home=("a",)).formed()
    assert pauses(rig, 5)[-1] > 0
    rig.brain.worked()
    assert pauses(rig, 1) == [0]


def test_a_node_with_too_many_losses_in_a_row_is_left_out() -> None:
    rig = Rig("a", "b", home=("a",)).formed()
    assert len(pauses(rig, 10)) == LOSSES_IN_A_ROW - 1
    rig.brain.placed(placement_of("b", "b"), rig.now_s)
    rig.serve()
    assert rig.brain.is_formed and rig.nodes == ["b", "b"]


def test_losses_within_a_minute_leave_a_node_out_even_if_steps_finish_in_between() -> None:
    rig = Rig("a", "b").formed()
    for _ in range(5):
        rig.lose()
        rig.formed()
        rig.brain.worked()
        rig.now_s += 5
    rig.lose()
    assert rig.next() == [Replan(frozenset("a"))]


def test_losses_that_are_far_apart_do_not_leave_a_node_out() -> None:
    rig = Rig("a", "b").formed()
    for _ in range(20):
        rig.lose()
        assert Replan not in kinds(rig.serve())
        rig.brain.worked()
        rig.now_s += 15


# ---- nodes that are left out ------------------------------------------------------------------


def test_a_silent_node_is_left_out_at_once() -> None:
    rig = Rig("a", "b").formed()
    rig.lose(silent=True)
    assert rig.next() == [Replan(frozenset("a"))]
    assert rig.next() == [], "it waits for the answer"


def test_a_node_that_lost_a_worker_with_its_connection_is_used_again() -> None:
    rig = Rig("a", "b").formed()
    rig.lose()
    assert kinds(rig.serve()) == [Start, Load, Form]
    assert rig.nodes == ["a", "b"]


def test_home_is_never_left_out_for_silence() -> None:
    rig = Rig("a", "b", home=("a",)).formed()
    for _ in range(20):
        rig.lose(silent=True)
        assert Replan not in kinds(rig.serve())
        rig.brain.worked()
        rig.now_s += 1


def test_a_node_is_used_again_after_its_rest() -> None:
    rig = Rig("a", "b").formed()
    rig.lose(silent=True)
    rig.next()
    rig.brain.placed(placement_of("b", "c"), rig.now_s)
    rig.serve()
    rig.now_s += REST_S - 1
    rig.lose(1, silent=True)
    assert rig.next() == [Replan(frozenset("ac"))]
    rig.brain.unplaceable(rig.now_s)
    rig.now_s += REPLAN_S
    assert rig.next() == [Replan(frozenset())]


def test_when_nothing_else_is_left_all_are_pardoned_and_it_goes_on_asking() -> None:
    rig = Rig("a").formed()
    rig.lose(silent=True)
    assert rig.next() == [Replan(frozenset("a"))]
    for _ in range(3):
        rig.brain.unplaceable(rig.now_s)
        assert rig.next() == []
        assert rig.brain.wake_s() == rig.now_s + REPLAN_S
        rig.now_s += REPLAN_S
        assert rig.next() == [Replan(frozenset())], "nobody is left out any more"
    rig.brain.placed(placement_of("a"), rig.now_s)
    rig.serve()
    assert rig.brain.is_formed


def test_when_a_node_is_gone_those_on_their_way_there_are_given_up() -> None:
    rig = Rig("a", "a", "b")
    first, second, third = rig.next()
    assert isinstance(first, Start) and isinstance(second, Start)
    rig.obey(third)
    rig.brain.gone("a", rig.now_s)
    told = rig.next()
    assert Dismiss(first.seat.worker) in told and Dismiss(second.seat.worker) in told
    assert Replan(frozenset("a")) in told
    rig.brain.called(first.seat.worker, rig.now_s)
    assert Load not in kinds(rig.next()), "a late call is a stranger's"


# ---- another placement ------------------------------------------------------------------------


def test_survivors_keep_their_seats_and_load_nothing() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "d", "c"), rig.now_s)
    told = rig.serve()
    assert kinds(told) == [Start, Load, Form]
    assert [rig.workers[0], rig.workers[2]] == [first, last]
    assert rig.nodes == ["a", "d", "c"]


def test_survivors_with_another_shard_load_what_they_lack() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "c"), rig.now_s)
    told = rig.serve()
    assert kinds(told) == [Load, Load, Form]
    assert rig.workers == [first, last]
    assert [len(each.seat.shard.layers) for each in told[:2]] == [15, 15]


def test_who_has_no_seat_any_more_is_dismissed() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("c"), rig.now_s)
    told = rig.serve()
    assert told[0] == Load(rig.brain.placement.seats[0]) and told[1] == Dismiss(first)
    assert rig.workers == [last]


def test_a_node_gives_a_seat_to_the_worker_that_lacks_least() -> None:
    rig = Rig("a", "a", "b").formed()
    first, second, _ = rig.workers
    rig.lose(2, silent=True)
    rig.next()
    # Layers 8 to 30: the second has 10 to 20, the first only 8 and 9.
    two = divide(DIMS, Split(pipeline=2, layers=(8, 22)), ["c", "a"]).replicas[0]
    rig.brain.placed(two, rig.now_s)
    told = rig.serve()
    assert Dismiss(first) in told
    assert rig.workers[1] == second


def test_who_is_still_loading_is_kept_for_the_same_shard_only() -> None:
    rig = Rig("a", "b", "c").formed()
    rig.lose(0)
    (start,) = rig.next()
    rig.obey(start)
    rig.next()
    loading = rig.workers[0]
    rig.lose(2, silent=True)
    assert rig.next() == [Replan(frozenset("c"))]
    rig.brain.placed(placement_of("a", "b", "d"), rig.now_s)
    assert kinds(rig.next()) == [Start]
    assert rig.workers[0] == loading
    rig.brain.lost(rig.workers[2], rig.now_s, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "b"), rig.now_s)
    assert Dismiss(loading) in rig.next()
