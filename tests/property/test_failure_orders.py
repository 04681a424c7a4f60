"""Whatever fails in whatever order, the brains of the head bring every request to its calm end.

And they are seen to be wrong when they are: each mutant is caught within a few orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from failure_orders import Order, OrderFailed, run_many, run_orders, tell

from shoal.cluster.membership import Membership
from shoal.cluster.supervisor import Post, Stand, Supervisor
from shoal.messages import ChunkResult, Event, StepResult
from shoal.schedule.scheduler import Scheduler
from shoal.schedule.sequence import Sequence

Method = Callable[..., Any]


def test_failure_orders() -> None:
    run_orders(range(1_000))


@pytest.mark.slow
def test_a_hundred_thousand_failure_orders() -> None:
    assert run_many(100_000, num_processes=2) > 1_000_000


def test_an_order_can_be_told_again() -> None:
    assert tell(5) == tell(5)
    assert "Form(epoch=1)" in tell(5)
    assert Order(5).run() == Order(5).run()


def _formed_in_any_epoch(original: Method) -> Method:
    def formed(self: Supervisor, worker: str, epoch: int) -> None:
        del epoch
        original(self, worker, self.epoch)

    return formed


def _keeps_the_dead(original: Method) -> Method:
    def lost(self: Supervisor, worker: str, now_s: float, *, silent: bool = False) -> None:
        post = self._post(worker)
        if post is None or post.stand is not Stand.READY:
            original(self, worker, now_s, silent=silent)

    return lost


def _forgets_a_seat(original: Method) -> Method:
    def vacate(self: Supervisor, post: Post, now_s: float) -> None:
        original(self, post, now_s)
        post.deadline_s = float("inf")

    return vacate


def _forms_too_early(original: Method) -> Method:
    def begin_forming(self: Supervisor, now_s: float) -> None:
        before = [post.stand for post in self._all]
        for post in self._all:
            if post.stand is Stand.LOADING:
                post.stand = Stand.READY
        original(self, now_s)
        for post, stand in zip(self._all, before, strict=True):
            post.stand = stand

    return begin_forming


def _keeps_its_epoch(original: Method) -> Method:
    def begin_forming(self: Supervisor, now_s: float) -> None:
        self.epoch -= self.epoch > 1
        original(self, now_s)

    return begin_forming


def _drops_emitted_tokens(original: Method) -> Method:
    def restart(self: Sequence) -> None:
        original(self)
        del self.tokens[self.num_prompt :]

    return restart


def _takes_results_of_any_step(original: Method) -> Method:
    def complete(self: Scheduler, result: StepResult) -> list[Event]:
        step = min(self._flights, default=result.step)
        ids = [part.request_id for part in result.results]
        now = [chunk.request_id for _, chunk in self._flights[step].parts] if self._flights else []
        parts: list[ChunkResult] = result.results if ids == now else []
        return original(self, StepResult(epoch=self._epoch, step=step, results=parts))  # type: ignore[no-any-return]

    return complete


def _spares_nobody(_original: Method) -> Method:
    def spare(self: Membership) -> None:
        pass

    return spare


MUTANTS = [
    (Supervisor, "formed", _formed_in_any_epoch),
    (Supervisor, "lost", _keeps_the_dead),
    (Supervisor, "_vacate", _forgets_a_seat),
    (Supervisor, "_begin_forming", _forms_too_early),
    (Supervisor, "_begin_forming", _keeps_its_epoch),
    (Sequence, "restart", _drops_emitted_tokens),
    (Scheduler, "complete", _takes_results_of_any_step),
    (Membership, "_spare", _spares_nobody),
]


@pytest.mark.parametrize(("brain", "method", "mutate"), MUTANTS)
def test_a_wrong_brain_is_caught(
    brain: type, method: str, mutate: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brain, method, mutate(getattr(brain, method)))
    with pytest.raises(OrderFailed, match="failure order, seed"):
        run_orders(range(1_500))
