"""A model over three machines joined with the real commands: one drained, one added, no stream
breaks; the others have their weights from the head.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_commands import Running
from cluster_rig import Rig
from namespaces import cut, mend, why_not

from shoal import LLM, SamplingParams

pytest.importorskip("ray", reason="needs the extra shoal[cluster]", exc_type=ImportError)

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

MODEL = "smollm2-135m"
PROMPT = "Once upon a time"
NUM_TOKENS = 160
MOST_SILENCE_S = 1.5
STRAY_S = 30.0
URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def calm_text() -> str:
    with LLM(MODEL, dtype="float32", kv_memory="256MiB") as llm:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
        (output,) = llm.generate(PROMPT, params)
        return output.samples[0].text


@pytest.fixture(scope="module")
def served(rig: Rig) -> Iterator[Running]:
    words = ["--pipeline", "3", "--threads", "1", "--dtype", "float32", "--kv-memory", "128MiB"]
    serve = rig.machines.start(rig.hosts[0], "serve", MODEL, "--cluster", *words, state="a")
    try:
        serve.wait_for("serving", 120)
        yield serve
    finally:
        assert serve.stop() == 0


class Stream:
    """One completion under way on the head's host."""

    def __init__(self, rig: Rig) -> None:
        script = Path(__file__).with_name("stream_client.py")
        words = [sys.executable, str(script), URL, MODEL, PROMPT, str(NUM_TOKENS)]
        self._process = subprocess.Popen(
            rig.hosts[0].command(*words), stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        assert self._lines.readline() == "streaming\n"

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0
        return json.loads(out.splitlines()[-1])


def operate(rig: Rig, *words: str) -> str:
    return rig.machines.say(rig.hosts[0], *words, state="a")


def stats(rig: Rig) -> dict[str, Any]:
    """Of the only replica, as `shoal status` tells it."""
    status = json.loads(operate(rig, "status", "--json"))
    (replica,) = status["fleet"]["replicas"]
    return replica["stats"]


def seats(rig: Rig) -> list[str]:
    """The nodes of the stages."""
    return [worker["node"] for worker in stats(rig)["workers"]]


def test_the_text_is_that_of_one_process(rig: Rig, served: Running, calm_text: str) -> None:
    del served
    assert Stream(rig).end()["text"] == calm_text
    assert seats(rig) == ["a", "b", "c"]
    assert "mutual TLS" in operate(rig, "status")


def test_other_nodes_have_only_their_shards(rig: Rig, served: Running) -> None:
    del served
    for name in "bc":
        (file,) = rig.machines.cache(name).glob("shoal/shards/*/*.gguf")
        held_bytes = file.stat().st_blocks * 512
        assert 0.1 < held_bytes / file.stat().st_size < 0.75


def test_a_drained_node_takes_no_stream_with_it(rig: Rig, served: Running, calm_text: str) -> None:
    del served
    stream = Stream(rig)
    assert "b is drained" in operate(rig, "drain", "b")
    assert "b" not in seats(rig)
    rig.nodes["b"].stop()
    end = stream.end()
    print(f"drained: longest gap {end['gap_s']:.2f} s")
    assert end["text"] == calm_text


def test_an_added_node_is_used_after_a_rebalance(rig: Rig, served: Running, calm_text: str) -> None:
    del served
    token = operate(rig, "token", "create").split("--token ")[1].split()[0]
    rig.join(3, "e", "join", rig.hosts[0].address, "--token", token)
    rig.head.wait_for(r"\+ e")
    stream = Stream(rig)
    assert "1 replica moved" in operate(rig, "rebalance")
    assert seats(rig) == ["a", "c", "e"]
    assert stream.end()["text"] == calm_text


def test_a_node_that_is_killed_takes_no_stream_with_it(
    rig: Rig, served: Running, calm_text: str
) -> None:
    del served
    stream = Stream(rig)
    rig.nodes["e"].process.kill()
    end = stream.end()
    print(f"killed: longest gap {end['gap_s']:.2f} s")
    assert end["text"] == calm_text
    assert set(seats(rig)) == {"a", "c"}


def test_wrong_nodes_are_refused(rig: Rig, served: Running) -> None:
    del served
    assert "'nowhere' runs no work here; the nodes in use: a, c" in operate(rig, "drain", "nowhere")


def test_a_node_that_is_cut_off_takes_no_stream_with_it(
    rig: Rig, served: Running, calm_text: str
) -> None:
    del served
    lost = [psutil.Process(each["pid"]) for each in stats(rig)["workers"] if each["node"] == "c"]
    assert lost
    stream = Stream(rig)
    cut(rig.hosts[2])
    try:
        end = stream.end()
        print(f"cut off: longest gap {end['gap_s']:.2f} s")
        assert end["text"] == calm_text
        told = stats(rig)["incidents"][-1]
        assert told["noticed_by"] == "heartbeat"
        assert told["phases"]["silence"] <= MOST_SILENCE_S
        assert "c" not in seats(rig)
        stream = Stream(rig)
    finally:
        mend(rig.hosts[2])
    assert stream.end()["text"] == calm_text
    _, alive = psutil.wait_procs(lost, timeout=STRAY_S)
    assert alive == [], "workers of a node that was cut off go on for ever"
    assert stats(rig)["incidents"][-1]["number"] == told["number"]
