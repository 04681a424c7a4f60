"""From the command `shoal serve MODEL` to ready: `python -m bench.start [--rounds N]`.

Method: the real command, again and again; ready is when its /health answers that all is well. The
first token is of a request that is sent then, since memory and threads may be taken only with the
first one. The first round is not counted: it brings files into the machine's cache.
"""

from __future__ import annotations

import argparse
import json
import time

import httpx
from rich.console import Console
from rich.table import Table

from bench.machine import describe_machine
from bench.ratios import spread_of
from bench.server_process import served
from shoal.worker.profile import usable_cores

_PROMPT_TOKENS = 16


def one_round(model: str, options: list[str]) -> tuple[float, float]:
    """Seconds from the command to ready, and to the first token."""
    with served(model, options) as server:
        body = {
            "model": model,
            "prompt": list(range(100, 100 + _PROMPT_TOKENS)),
            "max_tokens": 1,
            "ignore_eos": True,
        }
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        first_s = time.perf_counter()
    return server.ready_s - server.started_s, first_s - server.started_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.start", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("server", nargs="*", help="after --: options of shoal serve")
    options = parser.parse_args()
    one_round(options.model, options.server)
    rounds = [one_round(options.model, options.server) for _ in range(options.rounds)]
    machine = describe_machine(usable_cores())
    told = {
        "ready": [ready_s for ready_s, _ in rounds],
        "first token": [first_s for _, first_s in rounds],
    }
    table = Table("seconds from the command to", "median", "range", title=machine)
    for name, seconds in told.items():
        spread = spread_of(seconds)
        table.add_row(name, spread.text(2), spread.range_text(2))
    Console().print(table)
    record = {
        "benchmark": "start",
        "machine": machine,
        "model": options.model,
        "server": options.server,
        "ready_s": told["ready"],
        "first_token_s": told["first token"],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
