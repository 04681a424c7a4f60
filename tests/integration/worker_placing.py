"""Run on the head's host: places a worker on each node, ends one, and prints what came of it."""

from __future__ import annotations

import queue
import sys
import time
from pathlib import Path

import msgspec

from shoal.errors import PlacementError
from shoal.fleet.inbox import Inbox
from shoal.fleet.ray_node import use_ray
from shoal.fleet.reception import Reception
from shoal.fleet.state import StateFolder
from shoal.parallel.control import Stop
from shoal.parallel.endpoint import MutualTls, listen
from shoal.parallel.identity import load_identity

CALL_S = 50.0


def main(folder: StateFolder) -> dict[str, object]:
    use_ray(folder)
    from shoal.fleet.launch_ray import RayLauncher  # noqa: PLC0415  # after Ray's settings

    security = MutualTls(load_identity(folder.identity))
    reception = Reception(listen(f"tls:{folder.load().address}:0", security), {})
    ends: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    launcher = RayLauncher(folder, reception.address, lambda *end: ends.put(end))
    try:
        nodes = launcher.nodes()
        inboxes = {node: Inbox() for node in nodes}
        for node, inbox in inboxes.items():
            reception.expect(f"on-{node}", inbox)
            launcher.start(f"on-{node}", node, num_threads=1)
        deadline_s = time.monotonic() + CALL_S
        lines = {
            node: reception.wait_for(f"on-{node}", inbox, deadline_s=deadline_s)
            for node, inbox in inboxes.items()
        }
        launcher.stop(f"on-{nodes[0]}")
        killed = ends.get(timeout=10)
        lines[nodes[1]].send(Stop())
        stopped = ends.get(timeout=10)
        return {
            "addresses": {node: line.address for node, line in lines.items()},
            "killed": killed,
            "stopped": stopped,
            "nowhere": _refusal(launcher),
        }
    finally:
        launcher.close()
        reception.close()


def _refusal(launcher: object) -> str:
    try:
        launcher.start("x", "nowhere", num_threads=1)  # type: ignore[attr-defined]
    except PlacementError as error:
        return error.message
    return ""


if __name__ == "__main__":
    print(msgspec.json.encode(main(StateFolder(Path(sys.argv[1])))).decode())
