"""An operator's side of the line to the head of a running model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from shoal import errors
from shoal.errors import InternalError, PeerLost, PeerRefused, ShoalError
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
from shoal.fleet.state import StateFolder
from shoal.fleet.status import FleetStatus
from shoal.parallel.address import parse_address
from shoal.parallel.control import Hello
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security
from shoal.parallel.head_call import call_head
from shoal.parallel.identity import load_identity

# The head says something every second.
SILENT_S = 10.0

Report = Callable[[str], None]
"""Hears what goes on while an answer is awaited."""

Reply = TypeVar("Reply", StatusReply, Done)


def _unheard(_text: str) -> None:
    pass


class OperatorClient:
    """One thread uses it; close it when done.

    Each call raises PeerLost when the head is gone or silent, and what the head refuses with.
    """

    def __init__(self, address: str, security: Security, *, silent_s: float = SILENT_S) -> None:
        """Raises as `call_head` does."""
        # Two of one name would be paired with each other's connections.
        caller = f"operator-{secrets.token_hex(4)}"
        hello = Hello(service="operator", direction="down", caller=caller)
        self._silent_s = silent_s
        with _broken_line():
            self._down, self._up = call_head(address, security, hello, timeout_s=silent_s)

    def status(self, report: Report = _unheard) -> FleetStatus:
        return self._ask(AskStatus(), StatusReply, report).status

    def drain(self, node: str, report: Report = _unheard) -> str:
        """Move the work away from a node. Returns what has moved; raises PlacementError."""
        return self._ask(Drain(node=node), Done, report).text

    def rebalance(self, report: Report = _unheard) -> str:
        """Place the model anew. Returns what has moved; raises PlacementError."""
        return self._ask(Rebalance(), Done, report).text

    def restart(self, num_together: int, report: Report = _unheard) -> str:
        """Replace all workers, so many replicas at a time. Returns what was done.

        Raises OutOfMemory, and what else keeps the new ones from loading; the old ones go on then.
        """
        return self._ask(Restart(num_together=num_together), Done, report).text

    def close(self) -> None:
        self._down.close()
        self._up.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: FromOperator, kind: type[Reply], report: Report) -> Reply:
        with _broken_line():
            self._up.send(msgspec.msgpack.encode(request))
        while True:
            answer = self._receive()
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, Refused):
                raise _error_of(answer)
            if not isinstance(answer, Working):
                raise PeerRefused(f"the server answers with {type(answer).__name__}")
            report(answer.text)

    def _receive(self) -> ToOperator:
        with _broken_line():
            header, _ = self._down.receive(self._silent_s)
        try:
            answer: ToOperator = msgspec.msgpack.decode(header, type=ToOperator)
            return answer
        except msgspec.MsgspecError as error:
            raise PeerRefused(
                f"the server's answer cannot be read ({error}): run the Shoal that serves"
            ) from error


def security_for(address: str, state: StateFolder) -> Security:
    """What an address needs; between machines, this one's certificate.

    Raises ConfigError if there is none, PeerRefused if it is not valid.
    """
    match parse_address(address).scheme:
        case "unix":
            return LocalOnly()
        case "tls":
            return MutualTls(load_identity(state.identity))
        case _:
            return Plaintext()


@contextmanager
def _broken_line() -> Iterator[None]:
    """Not to be taken for the loss of a worker, of which the head may tell."""
    try:
        yield
    except PeerLost as error:
        raise PeerLost(f"the server is gone or stuck: {error.message}") from error


def _error_of(refused: Refused) -> ShoalError:
    """The head's error again, of the class it had there."""
    kind = getattr(errors, refused.kind, None)
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(refused.message)
    return InternalError(f"{refused.message} ({refused.kind})")
