"""The head of a replica as a shell around the real brains, in simulated time.

It does what Engine and Crew do, and asserts all the while what must always hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from replica_model import calm_run, guess_well
from simulated_cluster import BLOCK_SIZE, NEVER_S, Cluster, Timeline

from shoal.cluster.membership import Membership
from shoal.cluster.placement import ReplicaPlacement
from shoal.cluster.supervisor import Dismiss, Form, Load, Replan, Start, Supervisor
from shoal.messages import Event, StepResult
from shoal.parallel.partition import Shard
from shoal.request import FinishReason, Request
from shoal.schedule.scheduler import Scheduler

DEAD_AFTER_S = 1.25
TICK_S = 0.25
RECOVERY_TIMEOUT_S = 12.0
STEP_TIMEOUT_S = 30.0
MOST_ROUNDS = 40
_LONG = (Shard, StepResult)

Planner = Callable[[ReplicaPlacement, frozenset[str]], ReplicaPlacement | None]
"""Where the replica goes, if possible without some nodes; None if there are no nodes."""


@dataclass(slots=True)
class Client:
    """What was asked for and has come. `stop_after`: a stop string ends there, if not before."""

    request: Request
    stop_after: int | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    told_to_come_again: bool = False
    calm_tokens: list[int] = field(init=False)
    calm_reason: FinishReason = field(init=False)

    def __post_init__(self) -> None:
        self.calm_tokens, self.calm_reason = calm_run(self.request)
        if self.stop_after is not None and len(self.calm_tokens) > self.stop_after:
            self.calm_tokens = self.calm_tokens[: self.stop_after]
            self.calm_reason = FinishReason.STOP

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.told_to_come_again

    def check_so_far(self) -> None:
        number = len(self.tokens)
        assert self.tokens == self.calm_tokens[:number], f"{self.tokens}, not {self.calm_tokens}"
        if self.finish_reason is not None:
            assert number == len(self.calm_tokens), "ended early"
            assert self.finish_reason is self.calm_reason


class Head:
    def __init__(
        self,
        timeline: Timeline,
        cluster_of: Callable[[Callable[[str, str, Any], None]], Cluster],
        supervisor: Supervisor,
        planner: Planner,
        *,
        num_spares: dict[str, int],
        log: Callable[..., None],
        **limits: Any,
    ) -> None:
        self.timeline = timeline
        self.cluster = cluster_of(self.hear)
        self.supervisor = supervisor
        self.membership = Membership(DEAD_AFTER_S, TICK_S)
        self.scheduler = Scheduler(block_size=BLOCK_SIZE, max_context=64, max_waiting=16, **limits)
        self.clients: dict[int, Client] = {}
        self.is_recovering = True
        self.epoch = 0
        self.paused_until_s = 0.0
        self.due_s = 0.0
        """When it acts without being spoken to."""
        self._reads_s = 0.0
        self._froze_s = 0.0
        self.num_open = 0
        self._planner = planner
        self._num_spares = num_spares
        self._log = log
        self._num_blocks = limits["num_blocks"]
        self._max_in_flight = limits["max_in_flight"]
        self._began_s = 0.0
        self._last_result_s = 0.0
        self._num_in_flight = 0
        self._told_supervisor = False
        self._look_s = NEVER_S
        self._looked_s = 0.0
        # What must hold is checked against these, not against what the supervisor says of itself.
        self._formed_by: set[str] = set()
        self._called: set[str] = set()
        self._names: set[str] = set()
        self._given_up: set[str] = set()
        self._holds: dict[str, Shard] = {}
        self._last_form = 0

    # ---- from outside ---------------------------------------------------------------------

    def submit(self, clients: list[Client]) -> None:
        requests = [client.request for client in clients]
        self.scheduler.add_all(requests)
        guess_well(self.scheduler, requests)
        self.clients |= {client.request.request_id: client for client in clients}
        self.num_open += len(clients)
        self._go_on()

    def pause(self, duration_s: float, *, reads_late: bool) -> None:
        """The head is frozen or starved; then it looks first, and reads what has come later."""
        if self.timeline.now_s < self._reads_s:
            return  # whoever is alive runs now and then
        self._froze_s = self.timeline.now_s
        self.paused_until_s = self._look_s = self.timeline.now_s + duration_s
        self._reads_s = self.paused_until_s + (0.05 if reads_late else 0.0)
        self.due_s = self._find_due_s()

    def watch_closely(self) -> None:
        """Looks that find everybody well are left out of the simulation, all but the last."""
        if self._look_s == NEVER_S:
            self._look()
            self.due_s = self._find_due_s()

    def _find_due_s(self) -> float:
        due_s = self._look_s
        if self.is_recovering:
            if (wake_s := self.supervisor.wake_s()) is not None:
                due_s = min(due_s, wake_s)
            if self.num_open:
                due_s = min(due_s, self._began_s + RECOVERY_TIMEOUT_S)
        elif self._num_in_flight:
            due_s = min(due_s, self._last_result_s + STEP_TIMEOUT_S)
        return max(due_s, self.paused_until_s)

    def act(self) -> None:
        now_s = self.timeline.now_s
        if now_s >= self._look_s:
            self._look()
        if self._num_in_flight and now_s >= self._last_result_s + STEP_TIMEOUT_S:
            self._log("no step has finished in time")
            self.begin()
        self._go_on()

    def hear(self, worker: str, word: str, value: Any) -> None:
        if self.timeline.now_s < self._reads_s:
            self.timeline.at(self._reads_s, self.hear, worker, word, value)
            return
        self._log(worker, word, "" if isinstance(value, _LONG) else value)
        before = self._fingerprint() if self._is_stale(worker, word, value) else None
        self._take_in(worker, word, value)
        if before is not None:
            assert self._fingerprint() == before, f"{worker}, a stranger, changed something: {word}"
        self._go_on()

    # ---- what is heard --------------------------------------------------------------------

    def _take_in(self, worker: str, word: str, value: Any) -> None:
        now_s, supervisor = self.timeline.now_s, self.supervisor
        if word == "result":
            self._publish(value)
        elif word == "lost":
            self._note_loss(worker, silent=False)
        elif word == "called":
            self._called.add(worker)
            if worker not in self._given_up:
                self.membership.join(worker, now_s)
                if self.cluster.workers[worker].is_mute:
                    self.watch_closely()
            supervisor.called(worker, now_s)
        elif word == "loaded":
            self._holds[worker] = value
            supervisor.loaded(worker)
        elif word == "load failed":
            supervisor.failed(worker, now_s)
        elif word == "formed":
            if value == self._last_form:
                self._formed_by.add(worker)
            supervisor.formed(worker, value)
        else:
            assert word == "not formed"
            supervisor.not_formed(worker, value, now_s)

    def _is_stale(self, worker: str, word: str, value: Any) -> bool:
        if word == "result":
            return value.epoch != self.epoch or self.is_recovering
        if word in ("formed", "not formed") and value != self._last_form:
            return True
        return worker in self._given_up

    def _fingerprint(self) -> tuple[Any, ...]:
        supervisor, counts = self.supervisor, self.scheduler.counts()
        stands = [(p.seat, p.stand, p.deadline_s) for stage in supervisor._posts for p in stage]
        return (
            stands,
            supervisor.epoch,
            supervisor.is_formed,
            supervisor.wake_s(),
            counts,
            [len(client.tokens) for client in self.clients.values()],
        )

    def _look(self) -> None:
        """As often as the membership wants to, as long as anybody is mute."""
        now_s, cluster = self.timeline.now_s, self.cluster
        watched = [name for name in self._called if name in self.membership]
        for name in watched:
            heard_s = cluster.last_heartbeat_s(name)
            if self._froze_s < heard_s < self._reads_s:
                heard_s = self._reads_s
            if self._looked_s < heard_s <= now_s:
                self.membership.heard(name, heard_s)
        self._looked_s = now_s
        for name, silence_s in self.membership.silent(now_s):
            self._log(name, f"silent for {silence_s:.2f} s")
            really_s = now_s - cluster.last_heartbeat_s(name)
            assert really_s > DEAD_AFTER_S - TICK_S, f"{name} was heard {really_s:.2f} s ago"
            self._note_loss(name, silent=True)
        mute = [n for n in watched if n in self.membership and cluster.workers[n].is_mute]
        wake_s = self.membership.wake_s(now_s)
        self._look_s = wake_s if mute and wake_s is not None else NEVER_S

    def _note_loss(self, worker: str, *, silent: bool) -> None:
        self.supervisor.lost(worker, self.timeline.now_s, silent=silent)
        has_seat = worker not in self._given_up
        self._give_up(worker)
        if has_seat and not self.is_recovering:
            self.begin()

    def _publish(self, result: StepResult) -> None:
        events = self.scheduler.complete(result)
        if result.epoch == self.epoch and not self.is_recovering and self._num_in_flight:
            self._last_result_s = self.timeline.now_s
            self.supervisor.worked()
        self._num_in_flight = len(self.scheduler._flights)
        over = {i for i, client in self.clients.items() if client.is_over}
        for event in events:
            client = self.clients[event.request_id]
            # Of several tokens of one step those behind a stop string are dropped.
            if event.request_id in over or not client.is_over:
                self._tell(client, event)

    def _tell(self, client: Client, event: Event) -> None:
        assert not client.is_over, f"{event} after the end"
        if event.token_id is not None:
            client.tokens.append(event.token_id)
        client.finish_reason = event.finish_reason
        if event.finish_reason is None and len(client.tokens) == client.stop_after:
            self.scheduler.finish(event.request_id)
            client.finish_reason = FinishReason.STOP
        self.num_open -= client.finish_reason is not None
        client.check_so_far()

    # ---- what is done ---------------------------------------------------------------------

    def begin(self) -> None:
        """Form anew, with those replaced that are lost."""
        self.epoch += 1
        self._num_in_flight = 0
        self.scheduler.new_epoch(self.epoch, cache_lost=True)
        self.scheduler.check()
        self.supervisor.begin(self.timeline.now_s, epoch=self.epoch)
        self.is_recovering, self._began_s = True, self.timeline.now_s

    def _go_on(self) -> None:
        if self.is_recovering:
            self._recover()
        if not self.is_recovering:
            self._send_plans()
        self.due_s = self._find_due_s()

    def _recover(self) -> None:
        supervisor, now_s = self.supervisor, self.timeline.now_s
        for _ in range(MOST_ROUNDS):
            self._told_supervisor = False
            for instruction in supervisor.next(now_s):
                self._carry_out(instruction)
            if not self._told_supervisor:
                break
        else:
            raise AssertionError("the supervisor never rests")
        supervisor.check()
        if supervisor.is_formed:
            self._resume()
        elif now_s >= self._began_s + RECOVERY_TIMEOUT_S:
            self._send_away()

    def _resume(self) -> None:
        assert supervisor_has_all(self.supervisor, self._formed_by), "formed without everybody"
        assert self.supervisor.epoch == self._last_form >= self.epoch
        self.epoch = self.supervisor.epoch
        too_long = self.scheduler.resize(
            num_blocks=self._num_blocks, max_in_flight=self._max_in_flight, epoch=self.epoch
        )
        assert too_long == []
        self.is_recovering, self._last_result_s = False, self.timeline.now_s
        self._log("goes on in epoch", self.epoch)

    def _send_away(self) -> None:
        for client in self.clients.values():
            if not client.is_over:
                assert self.scheduler.cancel(client.request.request_id) is not None
                client.told_to_come_again = True
                self.num_open -= 1
                self._log("request", client.request.request_id, "is to come again later")

    def _send_plans(self) -> None:
        while (plan := self.scheduler.plan(self.timeline.now_s)) is not None:
            assert plan.epoch == self.epoch == self._last_form
            assert supervisor_has_all(self.supervisor, self._formed_by), "a plan for the unformed"
            if not self._num_in_flight:
                self._last_result_s = self.timeline.now_s
            self._num_in_flight += 1
            self.cluster.compute(plan)

    def _carry_out(self, instruction: object) -> None:
        self._log(instruction)
        match instruction:
            case Start(seat=seat):
                self._start(seat)
            case Load(seat=seat):
                assert seat.worker in self._called and seat.worker not in self._given_up
                self._holds.pop(seat.worker, None)
                self.cluster.load(seat)
            case Form(epoch=epoch):
                self._form(epoch)
            case Dismiss(worker=worker):
                self._give_up(worker)
                self.cluster.dismiss(worker)
            case Replan(without=without):
                self._told_supervisor = True
                placement = self._planner(self.supervisor.placement, without)
                if placement is None:
                    self.supervisor.unplaceable(self.timeline.now_s)
                else:
                    self.supervisor.placed(placement, self.timeline.now_s)

    def _start(self, seat: Any) -> None:
        assert seat.worker not in self._names, f"{seat.worker} is started twice"
        self._names.add(seat.worker)
        spare = self._num_spares.get(seat.node, 0) > 0
        if seat.node not in self.cluster.nodes_up:
            self._given_up.add(seat.worker)
            self._told_supervisor = True
            self.supervisor.gone(seat.node, self.timeline.now_s)
            return
        self._num_spares[seat.node] = self._num_spares.get(seat.node, 0) - spare
        self.cluster.start(seat, spare=spare)

    def _form(self, epoch: int) -> None:
        assert epoch > self._last_form, f"epoch {epoch} after epoch {self._last_form}"
        self._last_form, self._formed_by = epoch, set()
        seats = self.supervisor.placement.seats
        for seat in seats:
            assert seat.worker not in self._given_up, f"{seat.worker} was given up"
            assert self._holds.get(seat.worker) == seat.shard, f"{seat.worker} holds another shard"
        assert len({seat.worker for seat in seats}) == len(seats), "a worker in two seats"
        self.cluster.form(epoch, self.supervisor.placement)

    def _give_up(self, worker: str) -> None:
        self._given_up.add(worker)
        self.membership.leave(worker)


def supervisor_has_all(supervisor: Supervisor, formed_by: set[str]) -> bool:
    return {post.seat.worker for post in supervisor._all} == formed_by


def fresh_supervisor(placement: ReplicaPlacement, home: frozenset[str]) -> Supervisor:
    return Supervisor(placement, numbers=count(1), home=home)
