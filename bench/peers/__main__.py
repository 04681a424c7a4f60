"""Shoal beside other engines: `python -m bench.peers [--peers NAME ...] [--rounds N]`.

Method: every engine in a process of its own, all loaded, one of them computing at a time. A round
gives each the same prompts in turn, beginning with another one each round; ratios are of one round.
Greedy, end-of-sequence ignored, as many threads for everyone. OpenVINO GenAI, transformers and
llama.cpp install themselves from wheels into environments of their own; vLLM runs where it is
installed. Every engine has the catalogue's file, or its values rounded to the blocks that are named
after its @. `same tokens` says how long a greedy answer to one prompt is the same as Shoal's.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.peers.environments import peers_folder
from bench.peers.process import EngineProcess, thread_settings
from bench.peers.roster import DEFAULT_PEERS, Peer, parse_peer, python_for
from bench.peers.table import OURS, records, results_table
from bench.peers.turns import rounds_of
from bench.peers.weights import AS_SHIPPED, described, in_blocks
from bench.works import WORKS, tokens_in_common
from shoal.evaluate.perplexity import english_text
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.profile import usable_cores


def start(
    peer: Peer, shipped: Path, options: argparse.Namespace, console: Console
) -> EngineProcess | None:
    """None, and a line that says why, where the peer is not installed."""
    python = python_for(peer, lambda line: console.print(line))
    if python is None:
        by_hand = peers_folder() / peer.name
        console.print(f"{peer.name}: skipped, it is neither installed here nor in {by_hand}")
        return None
    settings: dict[str, Any] = {
        "weights": str(in_blocks(shipped, peer.blocks, peers_folder() / "weights")),
        "threads": options.threads,
    }
    if peer.name == OURS:
        settings["options"] = {"quantize": options.quantize}
    environment = thread_settings(options.threads)
    engine = EngineProcess(peer.name, python, peer.engine.module, settings, environment)
    console.print(f"{peer.name}: {engine.about['engine']}; {engine.about['computes']}")
    return engine


def weights_of(peer: Peer, shipped: Path) -> str:
    as_shipped = described(shipped)
    if peer.name == "transformers":
        return f"{as_shipped}, as float32"
    return f"{as_shipped}, {AS_SHIPPED}" if peer.blocks == AS_SHIPPED else peer.blocks


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=list(DEFAULT_PEERS))
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--quantize", default="auto", help="Shoal's")
    parser.add_argument("--model", default="smollm2-135m", help="one that is a GGUF file")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    console = Console(width=150)
    files = resolve(options.model)
    text = load_tokenizer(files).encode(english_text())
    peers = [parse_peer(name) for name in (OURS, *options.peers)]
    rounds: dict[str, dict[str, list[float]]] = {}
    same: dict[str, int] = {}
    with ExitStack() as stack:
        started = [start(peer, files.path, options, console) for peer in peers]
        engines = [stack.enter_context(engine) for engine in started if engine is not None]
        for name in options.works:
            by_engine: dict[str, list[float]] = {}
            for done in rounds_of(engines, WORKS[name], options.rounds, text):
                for engine, (figure, streams) in done.items():
                    by_engine.setdefault(engine, []).append(figure)
                    if name == "decode-1":
                        ours = done[OURS][1]["tokens"][0]
                        same[engine] = tokens_in_common(ours, streams["tokens"][0])
            rounds[name] = by_engine
        about = {engine.name: engine.about for engine in engines}
    console.print(
        results_table(rounds, {peer.name: weights_of(peer, files.path) for peer in peers})
    )
    console.print(f"tokens of a greedy answer that are the same as Shoal's: {same}")
    print(
        json.dumps(
            {
                "benchmark": "peers",
                "threads": options.threads,
                "engines": about,
                "same_tokens": same,
                "rows": records(rounds),
            }
        )
    )


if __name__ == "__main__":
    main()
