"""Who sits where and when all form: the brain alone, with a clock set by hand."""

from __future__ import annotations

from supervisor_rig import Rig, kinds

from shoal.cluster.supervisor import (
    CALL_S,
    FORM_S,
    LOAD_S,
    SETTLE_S,
    Dismiss,
    Form,
    Load,
    Start,
)

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
