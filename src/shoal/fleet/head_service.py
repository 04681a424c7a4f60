"""What `shoal head` runs: the door for new machines, Ray's head, and a watch over the nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from shoal.errors import ConfigError, PeerLost
from shoal.fleet.enrol import route_to
from shoal.fleet.enrolment import EnrolmentDoor
from shoal.fleet.found import found_cluster
from shoal.fleet.ray_node import RayNode, require_ray, use_ray, wait_until_up
from shoal.fleet.registrar import Registrar
from shoal.fleet.state import StateFolder, bracketed

WATCH_S = 0.25
# An address of the documentation networks: only the route to it is looked up.
_ELSEWHERE = "192.0.2.1"


class HeadService:
    def __init__(
        self,
        folder: StateFolder,
        *,
        address: str,
        port: int,
        node: str,
        report: Callable[[str], None],
    ) -> None:
        """Raises ConfigError if Ray is missing, or this machine belongs to another head."""
        require_ray()
        before = folder.find()
        if before is not None and not before.is_head:
            raise ConfigError(
                f"this machine is node '{before.node}' of the cluster of {before.head_address}: "
                f"choose another folder with --state, or remove {folder.path}"
            )
        self._folder = folder
        self._report = report
        self.membership = found_cluster(folder, node=node, address=address, port=port)
        self._ray = RayNode(folder, self.membership)
        self._door: EnrolmentDoor | None = None
        self._present: set[str] = set()

    def start(self, stop: threading.Event) -> bool:
        """False if stopped meanwhile. Raises ConfigError for taken ports, OperatorError."""
        self._ray.start()
        registrar = Registrar(self._folder, self.membership, lambda: self._present)
        self._door = EnrolmentDoor(
            self._folder,
            registrar,
            host=self.membership.address,
            port=self.membership.port,
            report=self._report,
        )
        self._report(f"starting the cluster '{self.membership.cluster}', which takes some seconds")
        if not wait_until_up(self._ray, stop):
            return False
        where = bracketed(self.membership.address, self.membership.port)
        self._report(f"node '{self.membership.node}' is the head, at {where}")
        return True

    def run(self, stop: threading.Event) -> None:
        """Report nodes as they come and go, until stopped. Raises OperatorError."""
        use_ray(self._folder)
        from shoal.fleet.launch_ray import NodeView  # noqa: PLC0415  # after Ray's settings

        view = NodeView(self._folder)
        while not stop.wait(WATCH_S):
            if not self._ray.is_running():
                self._report(f"Ray ended and is started again; {self._ray.last_words()}")
                self._ray.stop()
                self._ray.start()
                wait_until_up(self._ray, stop)
            try:
                nodes = view.fleet()
            except PeerLost as error:
                self._report(error.message)
                continue
            self._compare({node.name: node.address for node in nodes if node.alive})

    def close(self) -> None:
        if self._door is not None:
            self._door.close()
        self._ray.stop()

    def _compare(self, addresses: dict[str, str]) -> None:
        come, gone = addresses.keys() - self._present, self._present - addresses.keys()
        self._present = set(addresses)
        for name in sorted(come):
            self._report(f"+ {name} ({addresses[name]}) is here; {_count(addresses)}")
        for name in sorted(gone):
            self._report(f"- {name} is gone; {_count(addresses)}")


def main_address() -> str:
    """The address that this machine has towards others. Raises ConfigError if it has none."""
    try:
        _, own = route_to(_ELSEWHERE, 9)
    except PeerLost as error:
        raise ConfigError(
            "this machine has no route to others: say with --address where they reach it"
        ) from error
    return own


def _count(nodes: Iterable[str]) -> str:
    number = len(list(nodes))
    return "1 node" if number == 1 else f"{number} nodes"
