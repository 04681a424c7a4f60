"""Before and after: `python -m bench.compare --before SIDE [--after SIDE] [--rounds N]`.

A side is a git revision, or `.` for the working tree, and settings if any: in capitals an
environment variable, else an argument of `shoal.LLM`, as in `--before "HEAD~1 quantize=int8"` or
`--after '. split={"tensor":2}'`.
Method: each side in a process of its own, with its own source, both loaded, one of them computing
at a time. A round gives both the same prompts, beginning with the other one each round; ratios are
of one round. Native kernels are those that are installed; `PYTHONPATH=folder` in a side gives it
others. Perplexity (`--perplexity TOKENS`) is of the fixed text, once: it has no noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.process import EngineProcess, thread_settings
from bench.peers.table import gain
from bench.peers.turns import rounds_of
from bench.ratios import spread_of
from bench.sides import Side, commit_of, parse_side, python_path, unpacked
from bench.works import WORKS
from shoal.evaluate.perplexity import english_text
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.profile import usable_cores

BEFORE, AFTER = "before", "after"

Figures = Mapping[str, Sequence[float]]


def start(name: str, side: Side, folder: Path, options: argparse.Namespace) -> EngineProcess:
    """Raises RuntimeError if the side would run other source than its own."""
    source = unpacked(side, folder / name)
    engine = EngineProcess(
        name,
        Path(sys.executable),
        "bench.peers.run_shoal",
        {"weights": options.model, "threads": options.threads, "options": side.options},
        {
            **thread_settings(options.threads),
            **side.environment,
            "PYTHONPATH": python_path(source, side),
        },
    )
    if not Path(engine.about["source"]).is_relative_to(source):
        engine.close()
        raise RuntimeError(f"{name} ran {engine.about['source']}, which is not in {source}")
    return engine


def results(figures: Mapping[str, Figures]) -> tuple[Table, list[dict[str, Any]]]:
    """Rounds by work and side, as a table and as records."""
    table = Table("work", BEFORE, "range", AFTER, "range", "better by", "range")
    records = []
    for name, sides in figures.items():
        work = WORKS[name]
        by = gain(work, sides[AFTER], sides[BEFORE])
        cells = []
        for side in (BEFORE, AFTER):
            spread = spread_of(sides[side])
            cells += [spread.text(1), spread.range_text(1)]
        table.add_row(f"{name}, {work.unit}", *cells, f"{by.text(3)}x", by.range_text(3))
        rounds = {side: [round(value, 3) for value in values] for side, values in sides.items()}
        records.append({"work": name, "unit": work.unit, **rounds, "gain": round(by.median, 4)})
    return table, records


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=parse_side, required=True)
    parser.add_argument("--after", type=parse_side, default=parse_side("."))
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=list(WORKS)[:3])
    parser.add_argument("--perplexity", type=int, default=0, metavar="TOKENS", help="of the text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--model", default="smollm2-135m")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    sides = {BEFORE: options.before, AFTER: options.after}
    text = load_tokenizer(resolve(options.model)).encode(english_text())
    figures: dict[str, dict[str, list[float]]] = {}
    console = Console(width=130)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = [
            stack.enter_context(start(name, side, folder, options)) for name, side in sides.items()
        ]
        about = {
            engine.name: f"{commit_of(sides[engine.name])}, {engine.about['computes']}"
            for engine in engines
        }
        for name, what in about.items():
            console.print(f"{name}: {what}")
        for name in options.works:
            figures[name] = {BEFORE: [], AFTER: []}
            for done in rounds_of(engines, WORKS[name], options.rounds, text):
                for side, (figure, _) in done.items():
                    figures[name][side].append(figure)
        tokens = options.perplexity
        perplexity = (
            {one.name: one.call("perplexity", num_tokens=tokens) for one in engines}
            if tokens
            else {}
        )
    table, records = results(figures)
    console.print(table)
    if perplexity:
        ratio = perplexity[AFTER] / perplexity[BEFORE]
        console.print(f"perplexity: {perplexity}, after / before {ratio:.4f}")
    print(
        json.dumps(
            {
                "benchmark": "compare",
                "threads": options.threads,
                "sides": about,
                "rows": records,
                "perplexity": perplexity,
            }
        )
    )


if __name__ == "__main__":
    main()
