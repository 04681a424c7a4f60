"""What `shoal join` runs: enrolment if it is needed, then this machine's Ray, again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from shoal.errors import ConfigError, PeerLost, PeerRefused
from shoal.fleet.enrol import answers, authority_fingerprint, enrol, route_to
from shoal.fleet.ray_node import RayNode, require_ray, wait_until_up
from shoal.fleet.state import Membership, StateFolder
from shoal.fleet.tokens import parse_token
from shoal.parallel.identity import load_identity

POLL_S = 0.25
RETRY_S = 2.0


def become_node(
    folder: StateFolder,
    *,
    head: str,
    port: int,
    token: str | None,
    node: str | None,
    address: str | None,
    default_name: str,
    report: Callable[[str], None],
) -> Membership:
    """This machine's membership: the one it has if that still holds, else a new one for `token`.

    Raises ConfigError when a token is needed or this machine is a head, PeerLost, PeerRefused.
    """
    require_ray()
    folder.create()
    head_address, own_address = route_to(head, port)
    wanted = address or own_address
    before = folder.find()
    if before is not None and before.is_head:
        raise ConfigError(f"this machine is itself a head ({folder.path}): choose another --state")
    text = parse_token(token) if token else None
    is_same = before is not None and (before.node, before.address) == (node or before.node, wanted)
    if before and is_same and _still_holds(folder, before, text.fingerprint if text else None):
        report(f"'{before.node}' of '{before.cluster}' has its certificate still")
        return moved(folder, before, head_address, port)
    if text is None:
        raise ConfigError(
            "joining this head under this name and address needs a token: run 'shoal token "
            "create' on the head's machine, and give what it prints",
            param="token",
        )
    name = node or (before.node if before else default_name)
    report(f"asking {head_address} for a certificate for '{name}' ({wanted})")
    return enrol(folder, text, head_address=head_address, port=port, node=name, address=wanted)


def _still_holds(folder: StateFolder, before: Membership, fingerprint: str | None) -> bool:
    """Raises PeerRefused for a certificate that has expired, if there is no token to renew it."""
    if fingerprint is not None and authority_fingerprint(folder.identity) != fingerprint:
        return False
    try:
        return load_identity(folder.identity).node == before.node
    except PeerRefused:
        if fingerprint is None:
            raise
        return False


def moved(folder: StateFolder, before: Membership, head_address: str, port: int) -> Membership:
    """The same membership, with the head elsewhere. Its certificate must still prove it."""
    if (before.head_address, before.port) == (head_address, port):
        return before
    membership = msgspec.structs.replace(before, head_address=head_address, port=port)
    folder.save(membership)
    return membership


class JoinService:
    def __init__(
        self,
        folder: StateFolder,
        membership: Membership,
        *,
        head: str,
        report: Callable[[str], None],
    ) -> None:
        """`head` is a name or address; a name is looked up again when the head is gone."""
        self._folder = folder
        self._membership = membership
        self._head = head
        self._report = report
        self._ray = RayNode(folder, membership)

    def run(self, stop: threading.Event) -> None:
        """Be a node until stopped, and again whenever the head returns. Raises OperatorError."""
        while self._wait_for_head(stop):
            self._ray = RayNode(self._folder, self._membership)
            self._ray.start()
            if not wait_until_up(self._ray, stop):
                return
            self._report(f"'{self._membership.node}' is in the cluster; Ctrl-C leaves it")
            while self._ray.is_running():
                if stop.wait(POLL_S):
                    return
            self._report(f"no longer in the cluster; {self._ray.last_words()}")
            self._ray.stop()
            stop.wait(RETRY_S)

    def close(self) -> None:
        self._ray.stop()

    def _wait_for_head(self, stop: threading.Event) -> bool:
        """False if stopped meanwhile. Raises PeerRefused if another head is there."""
        is_told = False
        while not stop.is_set():
            if answers(self._folder, self._membership):
                return True
            if not is_told:
                self._report(f"waiting for the head, {self._membership.head_address}")
                is_told = True
            stop.wait(RETRY_S)
            self._look_up_head()
        return False

    def _look_up_head(self) -> None:
        with suppress(PeerLost):
            address, _ = route_to(self._head, self._membership.port)
            self._membership = moved(self._folder, self._membership, address, self._membership.port)
