"""What encrypted connections between workers cost: `python bench/encryption.py`.

Method: the same split of the same model with workers of one core each, over mutual TLS, plaintext
TCP (both through the loopback interface) and unix sockets, all loaded at once. A round gives each
the same prompts in turn. A ratio is of one round and to plaintext TCP: what only encryption costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from loopback_fleet import make_identity, start_loopback_fleet
from rich.console import Console
from rich.table import Table
from split_loads import KV_BYTES, MODEL, Contestant, Rates, Work, measure_in_turn

from shoal.config import EngineConfig, Split
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security

SPLITS = {
    "pipeline 2": Split(pipeline=2),
    "tensor 2": Split(tensor=2, transport="sockets"),
}
PLAINTEXT, TLS, UNIX = "plaintext TCP", "mutual TLS", "unix sockets"


def works(num_tokens: int) -> list[Work]:
    return [
        Work(name="1 stream", num_streams=1, prompt_tokens=128, max_tokens=num_tokens),
        Work(name="16 streams", num_streams=16, prompt_tokens=128, max_tokens=num_tokens),
        Work(name="prompt 512", num_streams=1, prompt_tokens=512, max_tokens=1),
    ]


def measure_split(name: str, ways: dict[str, Security], plan: list[Work], num_rounds: int) -> Rates:
    config = EngineConfig(
        model=MODEL, kv_memory_bytes=KV_BYTES, prefix_caching=False, split=SPLITS[name]
    )
    console = Console(stderr=True)
    with ExitStack() as stack:
        contestants = {}
        for way, security in ways.items():
            contestants[way] = Contestant(way, partial(start_loopback_fleet, config, security))
            stack.callback(contestants[way].deployment.close)
        contests = {work: tuple(ways) for work in plan}
        rates, _ = measure_in_turn(
            contestants,
            contests,
            num_rounds,
            report=lambda text: console.print(f"{name}: {text}"),
        )
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each stream (64)")
    options = parser.parse_args()
    table = Table("split", "work", "connections", "tokens/s", "ratio", "range")
    for column in table.columns[3:]:
        column.justify = "right"
    rows = []
    plan = works(options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        tls = MutualTls(make_identity(Path(folder)))
        ways = {PLAINTEXT: Plaintext(), TLS: tls, UNIX: LocalOnly()}
        for name in SPLITS:
            rates = measure_split(name, ways, plan, options.rounds)
            for work in plan:
                for way in ways:
                    ratios = rates.ratios(work, way, PLAINTEXT)
                    rate, ratio = rates.median(work, way), ratios[len(ratios) // 2]
                    span = f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
                    table.add_row(name, work.name, way, f"{rate:.1f}", f"{ratio:.2f}", span)
                    rows.append(
                        {
                            "split": name,
                            "work": work.name,
                            "connections": way,
                            "tokens_per_s": round(rate, 1),
                            "ratio": round(ratio, 3),
                        }
                    )
                table.add_section()
    Console().print(table)
    print(json.dumps({"benchmark": "encryption", "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
