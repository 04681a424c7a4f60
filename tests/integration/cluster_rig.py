"""A cluster of three machines, and a fourth host beside it, made with the real commands."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster_commands import Machines, Running, join_words
from namespaces import Host, connected_hosts


@dataclass
class Rig:
    machines: Machines
    hosts: list[Host]
    head: Running
    nodes: dict[str, Running] = field(default_factory=dict)

    def join(self, index: int, name: str, *words: str) -> Running:
        self.nodes[name] = self.machines.start(
            self.hosts[index], *words, "--name", name, state=name
        )
        return self.nodes[name]


@contextmanager
def cluster_of_three() -> Iterator[Rig]:
    # Not pytest's folder: a unix socket's path has room for 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    with connected_hosts(4) as hosts:
        machines = Machines(folder)
        head = machines.start(
            hosts[0], "head", "--address", hosts[0].address, "--name", "a", state="a"
        )
        rig = Rig(machines, hosts, head)
        try:
            words = join_words(head)
            rig.join(1, "b", *words)
            rig.join(2, "c", *words)
            head.wait_for("3 nodes")
            yield rig
        finally:
            running = [*rig.nodes.values(), rig.head]
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)
