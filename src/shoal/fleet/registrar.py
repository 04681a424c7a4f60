"""Decides who is let into a cluster, under which name, and with what certificate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Annotated

import msgspec

from shoal.errors import PeerRefused
from shoal.fleet.state import NODE_NAME, Membership, StateFolder
from shoal.fleet.token_store import TokenStore
from shoal.fleet.tokens import parse_token
from shoal.parallel.identity import CA_FILE, issue

# Ray's processes on one machine talk over loopback, also with TLS.
LOOPBACK = ("127.0.0.1", "localhost")
# From its certificate until it shows up among the nodes.
ARRIVAL_S = 60.0


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine that wants to join says. `csr` is PEM; its key never leaves that machine.

    Nothing in it can be long, or move the cursor of the terminal that shows it.
    """

    token: Annotated[str, msgspec.Meta(max_length=200)]
    node: Annotated[str, msgspec.Meta(pattern=NODE_NAME)]
    addresses: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.:_-]{1,253}\Z")]],
        msgspec.Meta(min_length=1, max_length=8),
    ]
    csr: Annotated[str, msgspec.Meta(max_length=8192)]


class JoinAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it needs to take part. `certificate` is PEM."""

    cluster: str
    head: str
    certificate: str
    ray_token: str


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    node: str
    addresses: list[str]
    joined_s: float


class Registrar:
    """The head's desk: every certificate goes over it. Thread-safe."""

    def __init__(
        self, folder: StateFolder, head: Membership, present: Callable[[], Collection[str]]
    ) -> None:
        """`present` tells the nodes that are there now: their names and addresses are taken."""
        self._folder = folder
        self._present = present
        self._head = head
        self._tokens = TokenStore(folder)
        self._lock = threading.Lock()

    def authority_pem(self) -> bytes:
        return (self._folder.authority / CA_FILE).read_bytes()

    def admit(self, request: JoinRequest, now_s: float) -> JoinAnswer:
        """Raises PeerRefused, or ConfigError for a name or address that cannot be; then the
        token is as good as before.
        """
        token = parse_token(request.token)
        # One at a time: two must not both find a name or an address free.
        with self._lock, self._tokens.spending(token.token_id, token.secret, now_s):
            nodes = self._nodes()
            self._check(request, self._occupied(nodes, now_s))
            certificate = issue(
                self._folder.authority,
                request.csr.encode(),
                node=request.node,
                addresses=[*request.addresses, *LOOPBACK],
            )
            nodes[request.node] = NodeRecord(
                node=request.node, addresses=request.addresses, joined_s=now_s
            )
            self._folder.write(self._folder.nodes, msgspec.json.encode(list(nodes.values())))
        return JoinAnswer(
            cluster=self._head.cluster,
            head=self._head.node,
            certificate=certificate.decode(),
            ray_token=self._folder.ray_token.read_text(),
        )

    def _check(self, request: JoinRequest, nodes: dict[str, list[str]]) -> None:
        """Nobody may pass for another. `nodes` are the addresses by name."""
        same_machine = set(nodes.get(request.node, request.addresses)) & set(request.addresses)
        if request.node == self._head.node or not same_machine:
            raise PeerRefused(
                f"the name '{request.node}' belongs to the machine at {nodes[request.node][0]}: "
                "choose another with --name"
            )
        owners = {address: name for name, taken in nodes.items() for address in taken}
        for address in request.addresses:
            owner = owners.get(address, request.node)
            if owner != request.node or address in LOOPBACK:
                raise PeerRefused(
                    f"{address} is not this machine's alone: choose another with --address"
                    if address in LOOPBACK
                    else f"{address} is the address of '{owner}': choose another with --address, "
                    f"or join as '{owner}'"
                )

    def _occupied(self, nodes: dict[str, NodeRecord], now_s: float) -> dict[str, list[str]]:
        present = self._present()
        return {self._head.node: [self._head.address]} | {
            name: record.addresses
            for name, record in nodes.items()
            if name in present or now_s < record.joined_s + ARRIVAL_S
        }

    def _nodes(self) -> dict[str, NodeRecord]:
        try:
            records = msgspec.json.decode(self._folder.nodes.read_bytes(), type=list[NodeRecord])
        except FileNotFoundError:
            return {}
        return {record.node: record for record in records}
