"""Shoal beside other engines: `python -m bench.peers [--peers NAME ...] [--rounds N]`.

Method: every engine in a process of its own, all loaded, one of them computing at a time. A round
gives each the same prompts in turn, beginning with another one each round; ratios are of one round.
Greedy, end-of-sequence ignored, as many threads for everyone. OpenVINO GenAI, transformers and
llama.cpp install themselves from wheels into environments of their own; vLLM runs where it is
installed. Every engine has the catalogue's file, or its values rounded to the blocks that are named
after its @.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.peers.environments import peers_folder
from bench.peers.process import EngineProcess, thread_settings
from bench.peers.roster import DEFAULT_PEERS, Peer, parse_peer, python_for
from bench.peers.table import OURS, records, results_table, steps_to_cached_token
from bench.peers.turns import rounds_of
from bench.peers.weights import AS_SHIPPED, as_folder, described, in_blocks
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
        "weights": str(weights_for(peer, shipped, console)),
        "threads": options.threads,
    }
    if peer.name == OURS:
        settings["options"] = {"quantize": options.quantize}
    environment = thread_settings(options.threads)
    engine = EngineProcess(peer.name, python, peer.engine.module, settings, environment)
    console.print(f"{peer.name}: {engine.about['engine']}; {engine.about['computes']}")
    return engine


def weights_for(peer: Peer, shipped: Path, console: Console) -> Path:
    folder = peers_folder() / "weights"
    blocks = in_blocks(shipped, peer.blocks, folder)
    if not peer.engine.reads_folders:
        return blocks
    python = python_for(parse_peer("transformers"), lambda line: console.print(line))
    assert python is not None, "transformers installs itself"
    return as_folder(blocks, folder, python)


def description_of(peer: Peer, shipped: Path) -> str:
    """Which weights it ran, for the table."""
    is_shipped = peer.blocks == AS_SHIPPED
    blocks = f"{described(shipped)}, {AS_SHIPPED}" if is_shipped else peer.blocks
    return f"{blocks}, as {peer.engine.computes_in}" if peer.engine.computes_in else blocks


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=list(DEFAULT_PEERS))
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--quantize", default="auto", help="Shoal's")
    parser.add_argument("--model", default="smollm2-135m", help="one that is a GGUF file")
    return parser.parse_args()


def measure(
    engines: Sequence[EngineProcess], works: Sequence[str], num_rounds: int, text: Sequence[int]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Figures by work and engine; and how many tokens of one answer are Shoal's, where told."""
    rounds: dict[str, dict[str, list[float]]] = {}
    same: dict[str, int] = {}
    for name in works:
        by_engine = rounds.setdefault(name, {})
        for done in rounds_of(engines, WORKS[name], num_rounds, text):
            figures = {engine: figure for engine, (figure, _) in done.items()}
            print(name, {engine: round(one, 1) for engine, one in figures.items()}, file=sys.stderr)
            for engine, figure in figures.items():
                by_engine.setdefault(engine, []).append(figure)
            if name == "decode-1":
                answers = {engine: streams["tokens"][0] for engine, (_, streams) in done.items()}
                same = {e: tokens_in_common(answers[OURS], t) for e, t in answers.items() if t}
    return rounds, same


def main() -> None:
    options = options_of()
    console = Console(width=150)
    files = resolve(options.model)
    text = load_tokenizer(files).encode(english_text())
    peers = [parse_peer(name) for name in (OURS, *options.peers)]
    engines: list[EngineProcess] = []
    with ExitStack() as stack:
        for peer in peers:
            engine = start(peer, files.path, options, console)
            if engine is not None:
                engines.append(stack.enter_context(engine))
        rounds, same = measure(engines, options.works, options.rounds, text)
    weights = {peer.name: description_of(peer, files.path) for peer in peers}
    console.print(results_table(rounds, weights))
    console.print(f"tokens of one greedy answer, from the first, that are Shoal's: {same}")
    if (steps := steps_to_cached_token(rounds)) is not None:
        console.print(f"Shoal's first token of a cached prompt takes {steps:.2f} decode steps")
    print(
        json.dumps(
            {
                "benchmark": "peers",
                "threads": options.threads,
                "engines": {engine.name: engine.about for engine in engines},
                "weights": weights,
                "same_tokens": same,
                "steps_to_cached_token": steps,
                "rows": records(rounds),
            }
        )
    )


if __name__ == "__main__":
    main()
