"""Has workers measure their nodes and the links between them, and remembers what they found."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal.cluster.hardware import Cluster, Link, NodeProfile
from shoal.config import Quantize
from shoal.fleet.inbox import Inbox
from shoal.fleet.launcher import Launcher
from shoal.fleet.reception import Reception
from shoal.fleet.site import Node
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.control import Measured, MeasureLink, MeasureNode

log = logging.getLogger(__name__)

BUDGET_S = 3.0
_CALL_S = 60.0
_MEASURE_S = 60.0


class Survey:
    """Measures a node once for each precision; `path` keeps the results between starts."""

    def __init__(
        self,
        launcher: Launcher,
        reception: Reception,
        nodes: Callable[[], list[Node]],
        precision: Quantize,
        num_threads: int | None,
        path: Path,
        report: Callable[[str], None],
    ) -> None:
        self._launcher = launcher
        self._reception = reception
        self._nodes = nodes
        self._precision = precision
        self._num_threads = num_threads
        self._path = path
        self._report = report
        self._numbers = itertools.count(1)
        self._known = _read(path)

    def __call__(self, names: Collection[str]) -> Cluster:
        """What was measured of these nodes; those that are new are measured now.

        Raises PlacementError, PeerLost, and what kept a node from measuring.
        """
        known = {node.name for node in self._known.nodes}
        missing = sorted(set(names) - known)
        if missing:
            self._measure(missing, sorted(known & self._present()))
            self._path.write_bytes(msgspec.json.encode(self._known))
        wanted = set(names)
        return msgspec.structs.replace(
            self._known,
            nodes=tuple(node for node in self._known.nodes if node.name in wanted),
            links=tuple(link for link in self._known.links if {link.source, link.target} <= wanted),
        )

    def _present(self) -> set[str]:
        return {node.name for node in self._nodes() if node.alive}

    def _measure(self, missing: Sequence[str], known: Sequence[str]) -> None:
        self._report(f"measuring {', '.join(missing)}, once: about {BUDGET_S + 5:.0f} s")
        with self._surveyors([*missing, *known]) as (lines, inbox):
            profiles = self._profiles({name: lines[name] for name in missing}, inbox)
            pairs = itertools.combinations([*missing, *known], 2)
            new_pairs = [(a, b) for a, b in pairs if a in missing or b in missing]
            links = [
                link
                for number, (here, there) in enumerate(new_pairs)
                for link in self._links(number, lines[here], here, lines[there], there, inbox)
            ]
        self._known = msgspec.structs.replace(
            self._known,
            nodes=(*self._known.nodes, *profiles),
            links=(*self._known.links, *links),
        )

    @contextmanager
    def _surveyors(self, names: Sequence[str]) -> Iterator[tuple[dict[str, WorkerLine], Inbox]]:
        """A worker on each node, for as long as this lasts."""
        workers = {name: f"survey-{name}-{next(self._numbers)}" for name in names}
        cores = {node.name: node.num_cores for node in self._nodes()}
        lines: dict[str, WorkerLine] = {}
        inbox = Inbox()
        calls = {name: Inbox() for name in names}
        try:
            for name, worker in workers.items():
                self._reception.expect(worker, calls[name])
                self._launcher.start(worker, name, num_threads=self._num_threads or cores[name])
            deadline_s = time.monotonic() + _CALL_S
            for name, worker in workers.items():
                lines[name] = self._reception.wait_for(worker, calls[name], deadline_s=deadline_s)
                lines[name].report_to(inbox)
            yield lines, inbox
        finally:
            for line in lines.values():
                line.dismiss()
            for name in workers.keys() - lines.keys():
                self._launcher.stop(workers[name])

    def _profiles(self, lines: dict[str, WorkerLine], inbox: Inbox) -> list[NodeProfile]:
        for name, line in lines.items():
            line.send(MeasureNode(node=name, precision=self._precision, budget_s=BUDGET_S))
        workers = [line.worker for line in lines.values()]
        replies = inbox.replies(Measured, workers, timeout_s=_MEASURE_S)
        return [msgspec.json.decode(reply.content, type=NodeProfile) for reply in replies.values()]

    def _links(
        self,
        number: int,
        asker: WorkerLine,
        here: str,
        answerer: WorkerLine,
        there: str,
        inbox: Inbox,
    ) -> list[Link]:
        """Both directions."""
        for line, other, asks in ((asker, answerer, True), (answerer, asker, False)):
            line.send(
                MeasureLink(number=number, here=here, there=there, address=other.address, asks=asks)
            )
        workers = [asker.worker, answerer.worker]
        replies = inbox.replies(Measured, workers, timeout_s=_MEASURE_S)
        return msgspec.json.decode(replies[asker.worker].content, type=list[Link])


def _read(path: Path) -> Cluster:
    """An unreadable file is no reason to stop: everything can be measured anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cluster)
    except FileNotFoundError:
        pass
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be used (%s): the nodes are measured anew", path, error)
    return Cluster(nodes=())
