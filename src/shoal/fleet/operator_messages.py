"""What an operator and the head of a running model say to each other, as msgpack."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.fleet.status import FleetStatus

# ---- operator to head ---------------------------------------------------------------------


class AskStatus(
    msgspec.Struct, frozen=True, kw_only=True, tag="ask_status", forbid_unknown_fields=True
):
    """Answered by StatusReply."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain", forbid_unknown_fields=True):
    """Move the work away from a node. Answered by Done."""

    node: str


class Rebalance(
    msgspec.Struct, frozen=True, kw_only=True, tag="rebalance", forbid_unknown_fields=True
):
    """Place the model anew over the nodes that there are. Answered by Done."""


class Restart(msgspec.Struct, frozen=True, kw_only=True, tag="restart", forbid_unknown_fields=True):
    """Replace all workers by new ones, `num_together` replicas at a time. Answered by Done."""

    num_together: Annotated[int, msgspec.Meta(ge=1)]


# ---- head to operator ---------------------------------------------------------------------


class StatusReply(
    msgspec.Struct, frozen=True, kw_only=True, tag="status_reply", forbid_unknown_fields=True
):
    status: FleetStatus


class Working(msgspec.Struct, frozen=True, kw_only=True, tag="working", forbid_unknown_fields=True):
    """Sent about once a second until the answer: what goes on."""

    text: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done", forbid_unknown_fields=True):
    text: str


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", forbid_unknown_fields=True):
    """In place of any answer. `kind` is the error's class name."""

    kind: str
    message: str


FromOperator = AskStatus | Drain | Rebalance | Restart
ToOperator = StatusReply | Working | Done | Refused
