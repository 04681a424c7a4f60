"""The head's service for operators: `Reception` gives it each one that calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import msgspec

from shoal.errors import PeerRefused, RetryError, ShoalError
from shoal.fleet.operator_messages import (
    AskStatus,
    Done,
    Drain,
    FromOperator,
    Rebalance,
    Refused,
    Restart,
    StatusReply,
    ToOperator,
    Working,
)
from shoal.fleet.status import FleetStatus
from shoal.parallel.channel import Channel

log = logging.getLogger(__name__)

T = TypeVar("T")

# Operators take a head for lost that says nothing for several times as long.
TICK_S = 1.0


class Operated(Protocol):
    """A fleet, as operators see it. Each call may block, and raises ShoalError."""

    def status(self) -> FleetStatus: ...

    def drain(self, node: str) -> str: ...

    def rebalance(self) -> str: ...

    def restart(self, num_together: int) -> str: ...


class OperatorService:
    """Answers operators, any number at a time; one of them at a time may move work."""

    def __init__(self, fleet: Operated, *, tick_s: float = TICK_S) -> None:
        self._fleet = fleet
        self._tick_s = tick_s
        self._lock = threading.Lock()
        self._under_way = ""

    def serve(self, down: Channel, up: Channel) -> None:
        """Until the operator leaves, which raises PeerLost; a move it began goes on."""
        while True:
            header, _ = up.receive()
            try:
                request = msgspec.msgpack.decode(header, type=FromOperator)
            except msgspec.MsgspecError as error:
                _send(down, _refusal(PeerRefused(f"not a request of this version: {error}")))
                continue
            _send(down, self._answer(request, down))

    def _answer(self, request: FromOperator, down: Channel) -> ToOperator:
        """Says Working all the time that it takes."""
        answer = _aside(lambda: self._settled(request))
        look: Future[FleetStatus] | None = None
        while not wait([answer], self._tick_s).done:
            text = "waiting for the fleet's status"
            if not isinstance(request, AskStatus):
                text = _name(request)
                if look is not None and look.done() and look.exception() is None:
                    text = f"{text}: {_progress(look.result(), request)}"
                if look is None or look.done():
                    look = _aside(self._fleet.status)
            _send(down, Working(text=text))
        return answer.result()

    def _settled(self, request: FromOperator) -> ToOperator:
        try:
            return self._settle(request)
        except ShoalError as error:
            log.info("%s: refused: %s", _name(request), error)
            return _refusal(error)
        except Exception as error:
            log.exception("%s failed", _name(request))
            return Refused(kind="InternalError", message=f"{type(error).__name__}: {error}")

    def _settle(self, request: FromOperator) -> ToOperator:
        if isinstance(request, AskStatus):
            return StatusReply(status=self._fleet.status())
        with self._alone(_name(request)):
            text = self._move(request)
        # Also here: who asked may have left.
        log.info("%s: %s", _name(request), text)
        return Done(text=text)

    def _move(self, request: Drain | Rebalance | Restart) -> str:
        match request:
            case Drain(node=node):
                return self._fleet.drain(node)
            case Rebalance():
                return self._fleet.rebalance()
            case Restart(num_together=number):
                return self._fleet.restart(number)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._lock:
            if self._under_way:
                raise RetryError(f"{self._under_way} is under way: try again when it has ended")
            self._under_way = name
        try:
            yield
        finally:
            with self._lock:
                self._under_way = ""


def _aside(work: Callable[[], T]) -> Future[T]:
    """Do it in a thread that the end of the process does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="shoal-operated", daemon=True).start()
    return future


def _send(down: Channel, message: ToOperator) -> None:
    down.send(msgspec.msgpack.encode(message))


def _refusal(error: ShoalError) -> Refused:
    return Refused(kind=type(error).__name__, message=error.message)


def _name(request: FromOperator) -> str:
    match request:
        case AskStatus():
            return "status"
        case Drain(node=node):
            return f"draining {node}"
        case Rebalance():
            return "rebalancing"
        case Restart():
            return "restarting"


def _progress(status: FleetStatus, request: FromOperator) -> str:
    """Such as `workers still on b: 2; r0 at epoch 1: 3 running, 0 waiting`."""
    left = [
        f"workers still on {node.name}: {node.num_workers}"
        for node in status.nodes
        if isinstance(request, Drain) and node.name == request.node
    ]
    serving = [
        f"{replica.name} at epoch {replica.stats.epoch}: {replica.stats.num_running} running, "
        f"{replica.stats.num_waiting} waiting"
        for replica in status.replicas
    ]
    return "; ".join([*left, *serving])
