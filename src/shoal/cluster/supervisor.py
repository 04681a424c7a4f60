"""Who sits in which seat of a replica, and what is done when somebody is lost.

Events and the time come in, instructions go out. A worker that is lost leaves its seat for good:
whatever it still says is said by a stranger. Every attempt to form has an epoch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import msgspec
from msgspec import structs

from shoal.cluster.blame import Blame
from shoal.cluster.placement import ReplicaPlacement, Seat

CALL_S = 60.0
"""For a process to start and call; importing torch takes seconds on a small machine."""
LOAD_S = 3600.0
FORM_S = 25.0
"""More than a worker waits for its neighbours, so that those who wait are not blamed."""
REPLAN_S = 1.0
"""When no node could take a seat, others are looked for so often."""
SETTLE_S = 0.02
"""A worker may report that a neighbour broke off before we hear that from the neighbour's line."""
_FORMATIONS_BEFORE_BLAME = 3
_CUTS_BEFORE_BLAME = 2


class Start(msgspec.Struct, frozen=True):
    """Have a worker of that name in the seat: a spare, or a new process on the seat's node."""

    seat: Seat


class Load(msgspec.Struct, frozen=True):
    """Tell the worker in a seat to hold its shard."""

    seat: Seat


class Form(msgspec.Struct, frozen=True):
    """Have all workers of `placement` connect for an epoch."""

    epoch: int


class Dismiss(msgspec.Struct, frozen=True):
    """A worker that has no seat any more."""

    worker: str


class Replan(msgspec.Struct, frozen=True):
    """Place the replica anew, if possible without some nodes: `placed` or `unplaceable`."""

    without: frozenset[str]


Instruction = Start | Load | Form | Dismiss | Replan


class Stand(Enum):
    EMPTY = "empty"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True)
class Post:
    """A seat and how far the worker in it is; `seat.worker` is the last one if it is empty."""

    seat: Seat
    stand: Stand
    deadline_s: float = 0.0
    """For those who start or load; when an empty seat may be filled again."""


class Supervisor:
    """Of one replica. Call `next` after every event and at `wake_s`, and do what it says.

    `home` are nodes that cannot be out of reach. `numbers` make names that are used only once.
    """

    def __init__(
        self,
        placement: ReplicaPlacement,
        *,
        numbers: Iterator[int],
        home: Iterable[str] = (),
        epoch: int = 0,
    ) -> None:
        """All seats are empty. The first formation has a later epoch than `epoch`."""
        self.epoch = epoch
        self._numbers = numbers
        self._blame = Blame(frozenset(home))
        self._take_posts(
            [[Post(seat, Stand.EMPTY) for seat in stage] for stage in placement.stages]
        )
        self._pending: list[Instruction] = []
        self._is_forming = False
        self._unformed: set[str] = set()
        self._form_s = 0.0
        """Not to be formed before, or the deadline of the formation under way."""
        self._num_failed_formations = 0
        self._replan_s: float | None = None
        self._awaits_plan = False

    # ---- what is so -----------------------------------------------------------------------

    @property
    def placement(self) -> ReplicaPlacement:
        return ReplicaPlacement(
            stages=tuple(tuple(post.seat for post in stage) for stage in self._posts)
        )

    @property
    def is_manned(self) -> bool:
        """Everybody holds their shard."""
        return all(post.stand is Stand.READY for post in self._all)

    @property
    def is_formed(self) -> bool:
        return self._is_forming and not self._unformed

    @property
    def num_called_for(self) -> int:
        """Seats whose worker has not called yet."""
        return sum(post.stand in (Stand.EMPTY, Stand.STARTING) for post in self._all)

    def wake_s(self) -> float | None:
        """When something is to be done even if nothing happens."""
        idle = (Stand.READY,) if self._replan_s is None else (Stand.READY, Stand.EMPTY)
        times = [post.deadline_s for post in self._all if post.stand not in idle]
        if self._replan_s is not None:
            times.append(self._replan_s)
        if self._unformed or (not self._is_forming and self.is_manned):
            times.append(self._form_s)
        return min(times, default=None)

    # ---- what happens ---------------------------------------------------------------------

    def begin(self, now_s: float, *, epoch: int = 0) -> None:
        """A formation is wanted, with an epoch of at least `epoch`."""
        self.epoch = max(self.epoch, epoch - 1)
        self._unform(now_s)

    def called(self, worker: str, now_s: float, *, epoch: int = 0) -> None:
        """`epoch` is the newest that the worker has heard of, from an earlier head."""
        post = self._post(worker)
        if post is None or post.stand is not Stand.STARTING:
            return
        self.epoch = max(self.epoch, epoch)
        self._load(post, now_s)

    def loaded(self, worker: str) -> None:
        post = self._post(worker)
        if post is not None and post.stand is Stand.LOADING:
            post.stand = Stand.READY

    def formed(self, worker: str, epoch: int) -> None:
        if epoch == self.epoch and self._is_forming:
            self._unformed.discard(worker)
            if not self._unformed:
                self._num_failed_formations = 0

    def worked(self) -> None:
        """A step has finished: whoever was replaced has proved to be of use."""
        self._blame.forgive()

    def lost(self, worker: str, now_s: float, *, silent: bool = False) -> None:
        """The worker is gone; `silent` if its node may be, since nothing is heard of it."""
        post = self._post(worker)
        if post is not None and post.stand is not Stand.EMPTY:
            self._blame.lost(post.seat.node, now_s, silent=silent)
            self._vacate(post, now_s)

    def failed(self, worker: str, now_s: float) -> None:
        """It is there and could not load, or is not to be used for another reason."""
        if self._post(worker) is not None:
            self._pending.append(Dismiss(worker))
            self.lost(worker, now_s)

    def not_formed(
        self, worker: str, epoch: int, now_s: float, *, unreachable: str | None = None
    ) -> None:
        """It could not connect with a neighbour: that one may be lost, or the way between them.

        `unreachable` is the neighbour, if it could not even be dialled.
        """
        post = self._post(worker)
        if epoch != self.epoch or not self._is_forming or post is None:
            return
        self._num_failed_formations += 1
        other = self._post(unreachable) if unreachable is not None else None
        is_cut = other is not None and other.seat.node != post.seat.node
        if is_cut and self._num_failed_formations >= _CUTS_BEFORE_BLAME:
            assert other is not None
            self._num_failed_formations = 0
            self._part(post, other, now_s)
        elif self._num_failed_formations >= _FORMATIONS_BEFORE_BLAME:
            self._num_failed_formations = 0
            self.failed(worker, now_s)
        self._unform(now_s)

    def _part(self, one: Post, other: Post, now_s: float) -> None:
        """We hear both, but they do not reach each other: one of the nodes must do without."""
        node = one.seat.node if self._blame.is_home(other.seat.node) else other.seat.node
        for post in self._all:
            if post.seat.node == node:
                self.failed(post.seat.worker, now_s)
        self._blame.gone(node, now_s)

    def gone(self, node: str, now_s: float) -> None:
        """No worker can be started there."""
        for post in self._all:
            if post.seat.node == node and post.stand is Stand.STARTING:
                self._pending.append(Dismiss(post.seat.worker))
                self._vacate(post, now_s)
        self._blame.gone(node, now_s)

    def placed(self, placement: ReplicaPlacement, now_s: float) -> None:
        """Survivors keep their seat, or get another on their node and load what they lack."""
        self._awaits_plan = False
        self._replan_s = None
        old = [post for post in self._all if post.stand is not Stand.EMPTY]
        stages = []
        for stage in placement.stages:
            stages.append([self._same(seat, old) or self._empty(seat, now_s) for seat in stage])
        self._take_posts(stages)
        for post in self._all:
            if post.stand is Stand.EMPTY and (other := _on_node(post.seat, old)) is not None:
                old.remove(other)
                post.seat = structs.replace(post.seat, worker=other.seat.worker)
                self._load(post, now_s)
        self._pending += [Dismiss(post.seat.worker) for post in old]
        self._unform(now_s)

    def unplaceable(self, now_s: float) -> None:
        """Then nobody is left out any more, and the next look may find a node that came back."""
        self._awaits_plan = False
        self._replan_s = now_s + REPLAN_S
        self._blame.pardon()

    # ---- what to do -----------------------------------------------------------------------

    def next(self, now_s: float) -> list[Instruction]:
        self._check_deadlines(now_s)
        self._ask_for_plan(now_s)
        if not self._awaits_plan and self._replan_s is None:
            self._fill_seats(now_s)
            self._begin_forming(now_s)
        instructions, self._pending = self._pending, []
        return instructions

    def _check_deadlines(self, now_s: float) -> None:
        for post in self._all:
            late = post.stand in (Stand.STARTING, Stand.LOADING) and now_s >= post.deadline_s
            if late:
                self.failed(post.seat.worker, now_s)
        if self._unformed and now_s >= self._form_s:
            for worker in sorted(self._unformed):
                self.failed(worker, now_s)
            self._unform(now_s)

    def _ask_for_plan(self, now_s: float) -> None:
        if self._awaits_plan:
            return
        out = self._blame.left_out(now_s)
        is_due = self._replan_s is not None and now_s >= self._replan_s
        may_lack_node = len(out) > 0 and self._replan_s is None
        lacks_node = may_lack_node and any(
            post.seat.node in out for post in self._all if post.stand is Stand.EMPTY
        )
        if is_due or lacks_node:
            self._awaits_plan = True
            self._pending.append(Replan(out))

    def _fill_seats(self, now_s: float) -> None:
        for post in self._all:
            if post.stand is Stand.EMPTY and now_s >= post.deadline_s:
                name = f"{post.seat.worker.partition('-')[0]}-{next(self._numbers)}"
                post.seat = structs.replace(post.seat, worker=name)
                post.stand, post.deadline_s = Stand.STARTING, now_s + CALL_S
                self._pending.append(Start(post.seat))

    def _begin_forming(self, now_s: float) -> None:
        if self._is_forming or now_s < self._form_s or not self.is_manned:
            return
        self.epoch += 1
        self._is_forming = True
        self._unformed = {post.seat.worker for post in self._all}
        self._form_s = now_s + FORM_S
        self._pending.append(Form(self.epoch))

    # ---- bookkeeping ----------------------------------------------------------------------

    def _take_posts(self, stages: list[list[Post]]) -> None:
        self._posts = stages
        self._all = [post for stage in stages for post in stage]

    def _post(self, worker: str) -> Post | None:
        return next((post for post in self._all if post.seat.worker == worker), None)

    def _empty(self, seat: Seat, now_s: float) -> Post:
        return Post(seat, Stand.EMPTY, now_s + self._blame.pause_s(seat.node))

    def _vacate(self, post: Post, now_s: float) -> None:
        post.stand = Stand.EMPTY
        post.deadline_s = now_s + self._blame.pause_s(post.seat.node)
        self._unform(now_s)

    def _unform(self, now_s: float) -> None:
        self._is_forming = False
        self._unformed = set()
        self._form_s = now_s + SETTLE_S

    def _load(self, post: Post, now_s: float) -> None:
        post.stand, post.deadline_s = Stand.LOADING, now_s + LOAD_S
        self._pending.append(Load(post.seat))

    def _same(self, seat: Seat, old: list[Post]) -> Post | None:
        """Who holds that shard on that node already, taken out of `old`."""
        for post in old:
            if (post.seat.node, post.seat.shard) == (seat.node, seat.shard):
                old.remove(post)
                return post
        return None

    def check(self) -> None:
        """Assert what must always hold; for tests."""
        names = [post.seat.worker for post in self._all]
        assert len(set(names)) == len(names), f"a worker has two seats: {names}"
        assert self._unformed <= set(names), "somebody without a seat is to form"
        assert not self._is_forming or self.is_manned, "formed without everybody"


def _on_node(seat: Seat, old: list[Post]) -> Post | None:
    """The loaded worker on the seat's node that lacks the fewest of its layers."""
    there = [p for p in old if p.seat.node == seat.node and p.stand is Stand.READY]
    return max(there, key=lambda post: _overlap(post.seat, seat), default=None)


def _overlap(one: Seat, other: Seat) -> int:
    if one.shard.slice != other.shard.slice:
        return 0
    a, b = one.shard.layers, other.shard.layers
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))
