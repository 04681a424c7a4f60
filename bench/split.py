"""Two workers with one core each against one process with two: `python bench/split.py`.

Method: all models are loaded at once, and one at a time is given work: a round asks the whole model
and each split of it for the same prompts (different ones in every round, no prefix cache), in
turn. A ratio is of one round; shown are the medians, and the ratios' range. Decoding counts the
tokens that come while all streams run; a prompt's rate is its length by the time to its first
token. What those who wait use of the processor is measured as well, and shown.
Limits: pipeline 2 at 32 streams ≥ 0.9 of the whole's rate, tensor 2 with shared memory for one
stream ≥ 0.9.

llama.cpp RPC, two servers with one core each (FIELD_NOTES 3: 43 tokens/s for one stream, 89 for
16), ran on another processor, so what it is compared with here is only a rough guide.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from loopback_fleet import make_identity, start_loopback_fleet
from rich.console import Console
from rich.table import Table
from split_loads import (
    KV_BYTES,
    MODEL,
    Contestant,
    Rates,
    Work,
    idle_cores,
    measure_in_turn,
)

from shoal.config import EngineConfig, Quantize, Split
from shoal.engine.assembly import usable_cores
from shoal.fleet.deployment import Deployment, deploy
from shoal.parallel.endpoint import MutualTls

WHOLE, PIPELINE, TENSOR = "one process", "pipeline 2", "tensor 2"
UNEVEN = "pipeline 15/15"  # as if the output head cost nothing
TENSOR_UNIX, TENSOR_TLS = "tensor 2, unix", "tensor 2, TLS"
LLAMA_CPP_RPC = {1: 43.0, 16: 89.0}


def contests(num_tokens: int) -> dict[Work, tuple[str, ...]]:
    """Who does what; the whole model always comes first."""

    def decode(num_streams: int) -> Work:
        return Work(
            name=f"{num_streams} streams" if num_streams > 1 else "1 stream",
            num_streams=num_streams,
            prompt_tokens=128,
            max_tokens=num_tokens,
        )

    def prefill(prompt_tokens: int) -> Work:
        return Work(
            name=f"prompt {prompt_tokens}",
            num_streams=1,
            prompt_tokens=prompt_tokens,
            max_tokens=1,
        )

    return {
        decode(32): (WHOLE, PIPELINE, UNEVEN, TENSOR),
        decode(16): (WHOLE, PIPELINE, UNEVEN, TENSOR),
        decode(1): (WHOLE, TENSOR, TENSOR_UNIX, TENSOR_TLS, PIPELINE),
        prefill(512): (WHOLE, PIPELINE, TENSOR, TENSOR_UNIX, TENSOR_TLS),
        prefill(2048): (WHOLE, PIPELINE, UNEVEN, TENSOR),
    }


def starters(
    quantize: Quantize, step_tokens: int, folder: Path
) -> dict[str, Callable[[], Deployment]]:
    def config(**split: object) -> EngineConfig:
        return EngineConfig(
            model=MODEL,
            quantize=quantize,
            kv_memory_bytes=KV_BYTES,
            max_step_tokens=step_tokens,
            prefix_caching=False,
            split=Split(**split),  # type: ignore[arg-type]
        )

    over_sockets = config(tensor=2, transport="sockets")
    tls = MutualTls(make_identity(folder))
    return {
        WHOLE: partial(deploy, config()),
        PIPELINE: partial(deploy, config(pipeline=2)),
        UNEVEN: partial(deploy, config(pipeline=2, layers=(15, 15))),
        TENSOR: partial(deploy, config(tensor=2)),
        TENSOR_UNIX: partial(deploy, over_sockets),
        TENSOR_TLS: partial(start_loopback_fleet, over_sockets, tls),
    }


def show(plan: dict[Work, tuple[str, ...]], rates: Rates, title: str) -> list[dict[str, object]]:
    table = Table("work", "model", "tokens/s", "ratio", "range", "llama.cpp RPC", title=title)
    rows: list[dict[str, object]] = []
    for work, names in plan.items():
        for name in names:
            ratios = rates.ratios(work, name, WHOLE)
            ratio, rate = ratios[len(ratios) // 2], rates.median(work, name)
            theirs = LLAMA_CPP_RPC.get(work.num_streams) if work.max_tokens > 1 else None
            table.add_row(
                work.name,
                name,
                f"{rate:.1f}",
                f"{ratio:.2f}",
                f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
                f"{theirs:.0f}: ×{rate / theirs:.1f}" if theirs and name != WHOLE else "",
            )
            rows.append(
                {
                    "work": work.name,
                    "model": name,
                    "tokens_per_s": round(rate, 1),
                    "ratio": round(ratio, 3),
                }
            )
        table.add_section()
    for column in table.columns[2:]:
        column.justify = "right"
    Console().print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each stream (64)")
    parser.add_argument("--quantize", default="auto", choices=("auto", "none", "int8", "int4"))
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens in a step (512)")
    parser.add_argument("--only", default="", help="work whose name holds this, such as prompt")
    options = parser.parse_args()
    console = Console(stderr=True)
    plan = {w: n for w, n in contests(options.tokens).items() if options.only in w.name}
    wanted = {name for names in plan.values() for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contestants = {}
        for name, start in starters(options.quantize, options.step_tokens, folder).items():
            if name in wanted:
                contestants[name] = Contestant(name, start)
                stack.callback(contestants[name].deployment.close)
        own, workers = idle_cores(list(contestants.values()), 3.0)
        rates, idle_share = measure_in_turn(contestants, plan, options.rounds, report=console.print)
    title = f"{MODEL}, quantize {options.quantize}, {len(usable_cores())} cores"
    rows = show(plan, rates, title)
    print(f"Idle: this process {own:.1%} of a core, all workers together {workers:.1%};")
    print(f"workers of models that wait while another computes: at most {idle_share:.1%}.")
    record = {
        "benchmark": "split",
        "quantize": options.quantize,
        "rounds": options.rounds,
        "idle_cores": [round(own, 4), round(workers, 4), round(idle_share, 4)],
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
