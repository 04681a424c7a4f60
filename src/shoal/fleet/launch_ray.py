"""Workers as Ray actors, each pinned to a node. The only file that imports Ray.

To be imported after `ray_node.use_ray`, with which everything here must agree.
Through Ray go a few strings; workers then dial the head themselves, over TLS of their own.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # from a stub of Ray's that lacks it
from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shoal.errors import PeerLost, PlacementError
from shoal.fleet.ray_node import NODE_LABEL, use_ray
from shoal.fleet.state import StateFolder, state_folder
from shoal.parallel.endpoint import MutualTls, Plaintext, Security
from shoal.parallel.identity import load_identity

log = logging.getLogger(__name__)

RAY_NAMESPACE = "shoal"
_LAST_WORD_S = 2.0

OnExit = Callable[[str, int], None]
"""(worker, exit status)"""


class FleetNode(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the cluster. `memory_bytes` is what Ray found there."""

    name: str
    address: str
    alive: bool
    num_cores: int = 0
    memory_bytes: int = 0
    ray_id: str


class NodeView:
    """The nodes as the head's Ray knows them, seen without taking part in it."""

    def __init__(self, folder: StateFolder) -> None:
        use_ray(folder)
        self._client = GcsClient(address=folder.load().ray_address)

    def fleet(self, *, timeout_s: float = 2.0) -> list[FleetNode]:
        """All nodes by name, those that have gone too. Raises PeerLost."""
        try:
            rows = self._client.get_all_node_info(timeout=timeout_s)
        except RayError as error:
            raise PeerLost(f"the head's Ray does not answer: {error}") from error
        return newest(_fleet_node(row) for row in rows.values())


class RayLauncher:
    """A `Launcher` on the nodes of this machine's cluster. One for each process."""

    def __init__(
        self,
        folder: StateFolder,
        head: str,
        on_exit: OnExit,
        *,
        insecure_plaintext: bool = False,
        hold_s: float = 0.0,
    ) -> None:
        """Workers dial `head`. `on_exit` is called in a thread, once for each worker that ends,
        but for adopted ones. With `hold_s` workers may outlive this process.

        Raises PeerLost if there is no Ray to connect to.
        """
        self._folder = folder
        self._head = head
        self._on_exit = on_exit
        self._scheme = "tcp" if insecure_plaintext else "tls"
        self._outlive_head = hold_s > 0
        self._actors: dict[str, ActorHandle[Any]] = {}
        self._stopped: set[str] = set()
        self._ended: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._own_ray_id = connect(folder)
        self._view = NodeView(folder)
        self._thread = threading.Thread(target=self._watch, name="shoal-ray-workers", daemon=True)
        self._thread.start()

    def nodes(self) -> list[str]:
        return [node.name for node in self._view.fleet() if node.alive]

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        """Raises PlacementError if the node is not there, PeerLost if there is no Ray here."""
        there = {each.name: each for each in self._view.fleet() if each.alive}
        found = there.get(node)
        if found is None:
            raise PlacementError(
                f"worker {worker} is to run on '{node}', which is not there; there are "
                f"{', '.join(there) or 'no nodes'}"
            )
        self._connect_again({each.ray_id for each in there.values()})
        # Bound to this very start of the node: were it to return, the worker would be another.
        strategy = NodeAffinitySchedulingStrategy(node_id=found.ray_id, soft=False)
        actor = (
            ray.remote(_WorkerHost)
            .options(
                num_cpus=0, max_restarts=0, scheduling_strategy=strategy, **self._lifetime(worker)
            )
            .remote()
        )
        self._actors[worker] = actor
        run = actor.run_alone if self._outlive_head else actor.run
        end = run.remote(self._head, worker, self._scheme, num_threads)
        end.future().add_done_callback(lambda future: self._ended.put((worker, _reason(future))))

    def start_spare(self, worker: str, node: str) -> None:
        self.start(worker, node, num_threads=1)

    def place(self, worker: str, num_threads: int) -> tuple[int, ...]:
        """Which cores are free on another machine only its system knows."""
        del worker, num_threads
        return ()

    def adopt(self, worker: str, node: str, pid: int) -> None:
        """By its name: actors that outlive their head have one."""
        try:
            self._actors[worker] = ray.get_actor(self._name(worker), namespace=RAY_NAMESPACE)
        except ValueError as error:
            raise PlacementError(
                f"worker {worker} (process {pid} on '{node}') is not there any more: {error}"
            ) from error

    def stop(self, worker: str) -> None:
        actor = self._actors.get(worker)
        if actor is not None:
            self._stopped.add(worker)
            ray.kill(actor)

    def close(self) -> None:
        for worker in list(self._actors):
            self.stop(worker)
        self._ended.put(None)
        self._thread.join()
        ray.shutdown()

    def _lifetime(self, worker: str) -> dict[str, str]:
        if not self._outlive_head:
            return {}
        return {
            "lifetime": "detached",
            "name": self._name(worker),
            "namespace": RAY_NAMESPACE,
        }

    def _name(self, worker: str) -> str:
        """Other heads of this cluster have workers of the same names, at other addresses; who takes
        them over has this address again."""
        return f"{worker} of {self._head}"

    def _connect_again(self, alive: set[str]) -> None:
        """After this machine's Ray was restarted. All workers started before have ended by then."""
        if self._own_ray_id in alive:
            return
        log.warning("Ray on this machine was restarted: connecting to it anew")
        self._actors.clear()
        ray.shutdown()
        self._own_ray_id = connect(self._folder)

    def _watch(self) -> None:
        while (end := self._ended.get()) is not None:
            worker, reason = end
            on_purpose = worker in self._stopped
            self.stop(worker)
            self._actors.pop(worker, None)
            self._stopped.discard(worker)
            if reason and not on_purpose:
                log.warning("worker %s ended: %s", worker, reason)
            self._on_exit(worker, 1 if reason else 0)


class _WorkerHost:
    """Runs in a process of the node that it is pinned to."""

    def run_alone(self, head: str, worker: str, scheme: str, num_threads: int) -> str:
        """The same for an actor that nobody may be left to end: its process ends with the worker.

        Whoever has started it, if that is still there, hears why before.
        """
        try:
            return self.run(head, worker, scheme, num_threads)
        finally:
            threading.Timer(_LAST_WORD_S, os._exit, [0]).start()

    def run(self, head: str, worker: str, scheme: str, num_threads: int) -> str:
        """ "" after an end in order, else what went wrong: only text may come back."""
        # Imports torch, which the launcher's process may not need.
        from shoal.worker.process import run  # noqa: PLC0415

        try:
            folder = state_folder()
            address = folder.load().address
            listen = f"{scheme}:[{address}]:0" if ":" in address else f"{scheme}:{address}:0"
            security: Security = (
                MutualTls(load_identity(folder.identity)) if scheme == "tls" else Plaintext()
            )
            run(head, worker, security, listen, num_threads)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def connect(folder: StateFolder) -> str:
    """Make this process a driver of the cluster's Ray; the id of the node it is on.

    Raises PeerLost.
    """
    use_ray(folder)
    membership = folder.load()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            membership.ray_address,
            _node_ip_address=membership.address,
            namespace=RAY_NAMESPACE,
            configure_logging=False,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PeerLost(
            f"cannot connect to the cluster at {membership.ray_address}: {error}; is "
            "'shoal head' or 'shoal join' running on this machine?"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return str(ray.get_runtime_context().get_node_id())


def newest(starts: Iterable[FleetNode]) -> list[FleetNode]:
    """Each node once, by name, of those that were started again and again: the living first."""
    found: dict[str, FleetNode] = {}
    for node in starts:
        if node.name and (node.alive or node.name not in found):
            found[node.name] = node
    return [found[name] for name in sorted(found)]


def _fleet_node(row: GcsNodeInfo) -> FleetNode:
    return FleetNode(
        name=row.labels.get(NODE_LABEL, ""),
        address=row.node_manager_address,
        alive=row.state == GcsNodeInfo.ALIVE,
        num_cores=int(row.resources_total.get("CPU", 0)),
        memory_bytes=int(row.resources_total.get("memory", 0)),
        ray_id=row.node_id.hex(),
    )


def _reason(future: Any) -> str:
    """Why a worker ended; "" if in order."""
    error = future.exception()
    return str(future.result()) if error is None else str(error).strip().splitlines()[0]
