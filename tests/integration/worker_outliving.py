"""Run on the head's host: a worker on another node loads a model, and its head is killed.

Run again with the address that the first run has printed, it is the next head.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec
from scripted_head import ScriptedLine, load_of
from shared_models import ALL

from shoal.errors import PlacementError
from shoal.fleet.ray_node import use_ray
from shoal.fleet.state import StateFolder
from shoal.parallel.control import Loaded
from shoal.parallel.endpoint import MutualTls, listen
from shoal.parallel.identity import load_identity

CALL_S = 50.0
HOLD_S = 60.0
NODE = "b"


def main(folder: StateFolder, model: Path, address: str) -> None:
    use_ray(folder)
    from shoal.fleet.launch_ray import RayLauncher  # noqa: PLC0415  # after Ray's settings

    is_next = bool(address)
    address = address or f"tls:{folder.load().address}:0"
    listener = listen(address, MutualTls(load_identity(folder.identity)))
    launcher = RayLauncher(folder, listener.address, print, hold_s=HOLD_S)
    if not is_next:
        launcher.start("held", NODE, num_threads=1)
        launcher.start_spare("empty", NODE)
    lines = {}
    for _ in range(1 if is_next else 2):
        line = ScriptedLine()
        line.welcome(listener.accept(CALL_S), listener.accept(CALL_S))
        lines[line.hellos[0].caller] = line
    line = lines["held"]
    started_s = time.monotonic()
    line.say(load_of(model, ALL, hold_s=HOLD_S))
    read_bytes = line.hear(Loaded).num_read_bytes
    told = {
        "address": listener.address,
        "pids": {name: each.hellos[0].pid for name, each in lines.items()},
        "read_bytes": read_bytes,
        "load_s": time.monotonic() - started_s,
        "shards": len(line.hellos[0].shards),
    }
    if not is_next:
        print(msgspec.json.encode(told).decode(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    launcher.adopt("held", NODE, line.hellos[0].pid)
    try:
        launcher.adopt("empty", NODE, 1)
    except PlacementError as error:
        told["refused"] = error.message
    line.hang_up()
    launcher.close()
    listener.close()
    print(msgspec.json.encode(told).decode(), flush=True)


if __name__ == "__main__":
    main(StateFolder(Path(sys.argv[1])), Path(sys.argv[2]), *sys.argv[3:] or [""])
