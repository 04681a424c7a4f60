"""Connects a worker, for one epoch, with the other ranks of its stage and with other stages."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import msgspec

from shoal.cluster.hardware import Link
from shoal.errors import ConfigError, PeerLost
from shoal.parallel.address import HostAddress, parse_address
from shoal.parallel.channel import Channel
from shoal.parallel.collective import TorchCollective
from shoal.parallel.communicator import Communicator, Solo
from shoal.parallel.control import Form, Greeting, MeasureLink, Meeting, Role
from shoal.parallel.endpoint import MutualTls, Security, dial
from shoal.parallel.partition import Shard
from shoal.parallel.shared_memory import SharedMemory
from shoal.parallel.socket_exchange import SocketExchange
from shoal.worker.hidden_states import Inlet, Outlet
from shoal.worker.links import answer_pings, measure_links
from shoal.worker.peers import Peers

# One that is awaited may have to finish a step first; one that is dialled answers at once.
CONNECT_S = 20.0
DIAL_S = 5.0
# How long a rank looks for the others' sums before it sleeps; on shared cores it is in the way.
_POLL_S = 0.002
_SHARED_POLL_S = 0.0001
_LOOPBACK = "127.0.0.1"


class Unreachable(PeerLost):
    """The worker at `address` cannot be dialled: it is gone, frozen, or the way to it is cut."""

    def __init__(self, address: str, message: str) -> None:
        super().__init__(message)
        self.address = address


class Neighbours:
    """Dials and awaits as a Form says. Every call raises PeerLost when a neighbour is missing."""

    def __init__(
        self, form: Form, shard: Shard, peers: Peers, security: Security, *, patience_s: float
    ) -> None:
        self._form = form
        self._patience_s = patience_s
        self._shard = shard
        self._peers = peers
        self._security = security

    def communicator(self, *, own_cores: bool) -> Communicator:
        form, shard = self._form, self._shard
        if shard.num_ranks == 1:
            return Solo()
        if form.transport == "shared-memory":
            poll_s = _POLL_S if own_cores else _SHARED_POLL_S
            return SharedMemory(
                shard.rank,
                shard.num_ranks,
                form.session,
                timeout_s=self._patience_s,
                poll_s=poll_s,
                is_over=lambda: self._peers.is_over(form.epoch),
            )
        if form.transport in ("gloo", "nccl"):
            return self._collective(form.transport)
        others = [rank for rank in range(shard.num_ranks) if rank != shard.rank]
        with ExitStack() as opened:
            senders = self._dial_all("rank", [form.ranks[other] for other in others], opened)
            receivers = []
            for other in others:
                receivers.append(self._await("rank", other))
                opened.callback(receivers[-1].close)
            opened.pop_all()
        return SocketExchange(
            shard.rank,
            senders,
            receivers,
            wire_format=form.wire_format,
            timeout_s=self._patience_s,
        )

    def _collective(self, backend: Literal["gloo", "nccl"]) -> Communicator:
        """Rank 0 tells the others where to meet."""
        if isinstance(self._security, MutualTls):
            raise ConfigError(
                f"{backend} cannot encrypt: use --transport auto, or --insecure-plaintext if "
                "everybody on the network may read and change what the model computes"
            )
        form, shard = self._form, self._shard
        own = parse_address(self._peers.address)
        own_host = own.host if isinstance(own, HostAddress) else _LOOPBACK
        if shard.rank == 0:
            meeting = Meeting(host=own_host, port=_free_port(own_host))
            for address in form.ranks[1:]:
                channel = self._dial("rank", address)
                channel.send(msgspec.msgpack.encode(meeting))
                channel.close()
        else:
            header, _ = self._await("rank", 0).receive(CONNECT_S)
            meeting = msgspec.msgpack.decode(header, type=Meeting)
        return TorchCollective(
            backend,
            shard.rank,
            shard.num_ranks,
            meeting.host,
            meeting.port,
            form.epoch,
            own_address=own_host,
            timeout_s=self._patience_s,
        )

    def outlet(self) -> Outlet | None:
        if not self._form.next_stage:
            return None
        with ExitStack() as opened:
            channels = self._dial_all("stage", self._form.next_stage, opened)
            opened.pop_all()
        return Outlet(channels, self._form.wire_format)

    def inlet(self, *, width: int) -> Inlet | None:
        form = self._form
        if form.previous_rank is None:
            return None
        channel = self._await("stage", form.previous_rank)
        return Inlet(channel, form.wire_format, width=width)

    def _await(self, role: Role, rank: int) -> Channel:
        return self._peers.wait_for(role, self._form.epoch, rank, timeout_s=CONNECT_S)

    def _dial_all(self, role: Role, addresses: Sequence[str], opened: ExitStack) -> list[Channel]:
        channels = []
        for address in addresses:
            channels.append(self._dial(role, address))
            opened.callback(channels[-1].close)
        return channels

    def _dial(self, role: Role, address: str) -> Channel:
        try:
            channel = dial(address, self._security, timeout_s=DIAL_S)
        except PeerLost as error:
            raise Unreachable(address, f"a neighbour is out of reach: {error.message}") from error
        greeting = Greeting(role=role, epoch=self._form.epoch, sender=self._shard.rank)
        # A busy neighbour may leave its data unread for a while; the head hears of dead ones.
        channel.set_patience(self._patience_s)
        channel.send(msgspec.msgpack.encode(greeting))
        return channel


def measure_link(order: MeasureLink, peers: Peers, security: Security) -> list[Link]:
    """Ask the other worker, or answer it, over a channel for each direction. Raises PeerLost."""
    outgoing = dial(order.address, security, timeout_s=CONNECT_S)
    try:
        greeting = Greeting(role="link", epoch=order.number, sender=int(order.asks))
        outgoing.send(msgspec.msgpack.encode(greeting))
        other = int(not order.asks)
        incoming = peers.wait_for("link", order.number, other, timeout_s=CONNECT_S)
        try:
            if order.asks:
                return list(measure_links(outgoing, incoming, here=order.here, there=order.there))
            answer_pings(incoming, outgoing)
            return []
        finally:
            incoming.close()
    finally:
        outgoing.close()


def _free_port(host: str) -> int:
    """torch's store wants a number; the system hands out others before it gives this one again."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port
