"""Which engines there are, what they need, and which weights they are given.

`llama.cpp@Q4_0` is an engine and the blocks its matrices are rounded to; `openvino` alone is given
the model's file as shipped.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import msgspec

from bench.peers.environments import Report, installed, peers_folder, python_of
from bench.peers.weights import AS_SHIPPED

DEFAULT_PEERS = ("llama.cpp@Q4_0", "openvino", "openvino@Q8_0", "transformers", "vllm")


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """`steps` is what pip installs, one after the other; empty: only where somebody did.

    `found_as` is the Python package that shows that somebody did. `computes_in` names the type an
    engine widens all weights to; with `reads_folders` it reads none but those of transformers.
    """

    module: str
    steps: tuple[tuple[str, ...], ...] = ()
    found_as: str = ""
    computes_in: str = ""
    reads_folders: bool = False


ENGINES = {
    "shoal": Engine(module="bench.peers.run_shoal", found_as="shoal"),
    "llama.cpp": Engine(
        module="bench.peers.run_llama_cpp",
        steps=(("--only-binary=:all:", "xllamacpp==2026.10.11549"),),
    ),
    "openvino": Engine(
        module="bench.peers.run_openvino",
        # All three by name: versions that do not belong together do not even load.
        steps=(
            (
                "--only-binary=:all:",
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "openvino==2026.4.1",
            ),
        ),
    ),
    "transformers": Engine(
        module="bench.peers.run_transformers",
        # torch first and alone, as in the Makefile: its pin chooses the build.
        steps=(("torch",), ("transformers", "accelerate", "gguf")),
        computes_in="float32",
    ),
    "vllm": Engine(
        module="bench.peers.run_vllm",
        found_as="vllm",
        computes_in="bfloat16 or float32",
        reads_folders=True,
    ),
}


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    engine: Engine
    blocks: str


def parse_peer(name: str) -> Peer:
    """Raises ValueError for an engine that is not in the roster."""
    engine, _, blocks = name.partition("@")
    if engine not in ENGINES:
        raise ValueError(f"there is no engine '{engine}': choose from {', '.join(ENGINES)}")
    return Peer(name=name, engine=ENGINES[engine], blocks=blocks or AS_SHIPPED)


def python_for(peer: Peer, report: Report) -> Path | None:
    """The Python to run a peer with, installed if need be; None where it is not, and must be."""
    engine_name = peer.name.partition("@")[0]
    if peer.engine.steps:
        return installed(engine_name, peer.engine.steps, report)
    if importlib.util.find_spec(peer.engine.found_as):
        return Path(sys.executable)
    by_hand = python_of(peers_folder() / engine_name)
    return by_hand if by_hand.is_file() else None
