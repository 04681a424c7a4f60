"""Machines that join a cluster with the real commands; network namespaces stand in for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import scripted_head
from cluster_rig import Rig
from namespaces import why_not
from shared_models import make_model

pytest.importorskip("ray", reason="needs the extra shoal[cluster]", exc_type=ImportError)

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

# How soon a node that went, in order or not, is seen to be gone.
GONE_S = 3.0


def new_token(rig: Rig, *words: str) -> str:
    said = rig.machines.say(rig.hosts[0], "token", "create", *words, state="a")
    return re.search(r"--token (\S+)", said)[1]  # type: ignore[index]


def try_to_join(rig: Rig, *words: str) -> str:
    said = rig.machines.say(rig.hosts[3], "join", rig.hosts[0].address, *words, state="stranger")
    assert "is in the cluster" not in said
    return said


def test_nothing_joins_without_a_good_token(rig: Rig) -> None:
    assert "needs a token: run 'shoal token create'" in try_to_join(rig)
    short = new_token(rig, "--ttl", "1s")
    foreign = short[:-8] + "00000000"
    assert "not the head that this token is for" in try_to_join(rig, "--token", foreign)
    forged = re.sub(r"\.\w{32}\.", f".{'0' * 32}.", short)
    assert "knows no such token" in try_to_join(rig, "--token", forged)
    time.sleep(1)
    assert "expired" in try_to_join(rig, "--token", short)
    rig.head.wait_for(rf"refused {rig.hosts[3].address}.*expired")


def test_a_worker_runs_on_the_node_it_is_placed_on(rig: Rig) -> None:
    script = Path(__file__).with_name("worker_placing.py")
    ran = subprocess.run(
        rig.hosts[0].command(sys.executable, str(script), str(rig.head.state)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    found = msgspec.json.decode(ran.stdout.splitlines()[-1])
    hosts = {node: address.split(":")[1] for node, address in found["addresses"].items()}
    assert hosts == {name: rig.hosts[i].address for i, name in enumerate("abc")}
    assert found["killed"] == ["on-a", 1]
    assert found["stopped"] == ["on-b", 0]
    assert "'nowhere', which is not there; there are a, b, c" in found["nowhere"]


def outliving(rig: Rig, *words: str) -> dict[str, Any]:
    script = Path(__file__).with_name("worker_outliving.py")
    unit = Path(scripted_head.__file__).parent
    ran = subprocess.run(
        rig.hosts[0].command(sys.executable, str(script), str(rig.head.state), *words),
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(unit)},
    )
    # How a worker ended may be printed before that or after.
    told = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 1, ran.stderr
    return json.loads(told[0])


def alive_of(pids: Iterable[int]) -> list[psutil.Process]:
    """Those that 15 s do not end."""
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=15
    )
    return list(alive)


def test_a_worker_outlives_its_head_and_ends_with_the_next(rig: Rig, tmp_path: Path) -> None:
    model = str(make_model("single", tmp_path / "model").path)
    first = outliving(rig, model)
    assert first["read_bytes"] > 0 and first["pids"].keys() == {"held", "empty"}
    # Who holds nothing ends with its head, by itself: on a fast machine after the next one asks.
    assert alive_of([first["pids"]["empty"]]) == []
    second = outliving(rig, model, first["address"])
    assert (second["shards"], second["read_bytes"]) == (1, 0)
    assert second["pids"] == {"held": first["pids"]["held"]}
    assert "worker empty (process 1 on 'b') is not there any more" in second["refused"]
    assert alive_of(first["pids"].values()) == []


def test_a_node_that_is_stopped_goes_and_comes_back_without_a_token(rig: Rig) -> None:
    token = new_token(rig)
    join = ["join", rig.hosts[0].address]
    node = rig.join(3, "d", *join, "--token", token)
    rig.head.wait_for(r"\+ d \(\S+\) is here; 4 nodes")
    ghosts = node.descendants()
    assert len(ghosts) >= 3
    assert node.stop() == 0
    rig.head.wait_for("- d is gone; 3 nodes", GONE_S)
    assert [ghost for ghost in ghosts if ghost.is_running()] == []

    assert "used up" in try_to_join(rig, "--name", "e", "--token", token)

    rig.head.log.write_text("")
    again = rig.join(3, "d", *join)
    again.wait_for("has its certificate still")
    rig.head.wait_for(r"\+ d")

    # Killed, not stopped: nothing of it stays behind either.
    ghosts = again.descendants()
    again.process.kill()
    rig.head.wait_for("- d is gone", GONE_S)
    _, alive = psutil.wait_procs(ghosts, timeout=15)
    assert alive == []
