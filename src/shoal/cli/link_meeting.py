"""Two `shoal profile` processes meet to measure the links between their machines."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from shoal.cluster.hardware import Link
from shoal.errors import FrameError, PeerLost, PeerRefused
from shoal.parallel.channel import Channel
from shoal.parallel.endpoint import MutualTls, Security, dial
from shoal.parallel.listener import Listener
from shoal.worker.links import answer_pings, measure_links

_TIMEOUT_S = 5.0
# Whoever opened only one connection of two cannot keep others out.
_MAX_HALF_OPEN = 16


class Introduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame of the asker's two connections, and of the answer. `meeting` pairs the two.

    On the one with `asks` questions travel, on the other answers, against the dialling.
    """

    meeting: str
    node: str
    asks: bool


def measure_links_to(address: str, security: Security, *, here: str) -> tuple[Link, Link]:
    """Dial a process that runs `answer_links`. Raises PeerLost, PeerRefused, ConfigError."""
    meeting = secrets.token_hex(8)
    outgoing = dial(address, security, timeout_s=_TIMEOUT_S)
    try:
        incoming = dial(address, security, timeout_s=_TIMEOUT_S)
        try:
            for channel in (outgoing, incoming):
                _introduce(channel, Introduction(meeting, here, channel is outgoing))
            there = _name(incoming, _read(incoming), security)
            return measure_links(outgoing, incoming, here=here, there=there)
        finally:
            incoming.close()
    finally:
        outgoing.close()


def answer_links(
    listener: Listener, security: Security, *, here: str, report: Callable[[str], None]
) -> None:
    """Answer one asker after the other, until the listener is closed; PeerLost is raised then."""
    half_open: dict[str, tuple[Channel, Introduction]] = {}
    try:
        while True:
            channel = listener.accept()
            try:
                introduction = _read(channel)
            except (PeerLost, PeerRefused) as error:
                channel.close()
                report(error.message)
                continue
            first = half_open.pop(introduction.meeting, None)
            if first is not None:
                _answer(first, (channel, introduction), security, here=here, report=report)
                continue
            half_open[introduction.meeting] = (channel, introduction)
            if len(half_open) > _MAX_HALF_OPEN:
                half_open.pop(next(iter(half_open)))[0].close()
    finally:
        for channel, _ in half_open.values():
            channel.close()


def _answer(
    first: tuple[Channel, Introduction],
    second: tuple[Channel, Introduction],
    security: Security,
    *,
    here: str,
    report: Callable[[str], None],
) -> None:
    (questions, asking), (answers, _) = sorted((first, second), key=lambda one: not one[1].asks)
    try:
        _introduce(answers, Introduction(asking.meeting, here, False))
        answer_pings(questions, answers)
        report(f"answered {_name(questions, asking, security)}")
    except (PeerLost, PeerRefused) as error:
        report(error.message)
    finally:
        questions.close()
        answers.close()


def _introduce(channel: Channel, introduction: Introduction) -> None:
    channel.send(msgspec.msgpack.encode(introduction), timeout_s=_TIMEOUT_S)


def _read(channel: Channel) -> Introduction:
    header, _ = channel.receive(timeout_s=_TIMEOUT_S)
    try:
        return msgspec.msgpack.decode(header, type=Introduction)
    except msgspec.MsgspecError as error:
        raise FrameError(f"{channel.peer} does not measure links: {error}") from error


def _name(channel: Channel, introduction: Introduction, security: Security) -> str:
    """A certificate's name counts, not what the peer says."""
    return channel.peer if isinstance(security, MutualTls) else introduction.node
