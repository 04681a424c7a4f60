"""How often a text differs after a recovery, with which kernels: `python bench/near_ties.py`.

Method: the scheduler and a worker of the whole model in this process, no engine, no prefix cache.
Every prompt is continued in four ways: alone; alone, with the cache lost at a random token, so
that prompt and emitted tokens are computed again as one chunk; eight at a time; eight at a time
with the cache lost at a random step. The first and third are what the second and fourth are
compared with, and "company" compares the third with the first. A fifth, for a few of them, is
alone and one token per step, also when computing again: the same shapes as before the loss.
Greedy, and seeded with temperature 1. The lead is the difference in log-probability of the two
best tokens where a greedy text first differs, beside the median lead of all steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.compute.threads import set_num_threads
from shoal.config import DType, EngineConfig, Quantize
from shoal.engine.assembly import usable_cores
from shoal.evaluate.perplexity import english_text
from shoal.request import Request, SamplingParams
from shoal.schedule.scheduler import Scheduler
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.worker import Worker, load_worker

MODEL = "smollm2-135m"
TOGETHER = 8
SCHEMES: dict[str, tuple[DType, Quantize]] = {
    "auto": ("auto", "auto"),
    "int8": ("auto", "int8"),
    "float32": ("float32", "none"),
}
BLOCKS, BLOCK_SIZE = 256, 16


class Text(msgspec.Struct):
    """What came, and the lead of the best token at each step."""

    tokens: list[int] = []
    leads: list[float] = []


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Of texts with those of the calm run. `steps` are those of the first differences."""

    scheme: str
    sampling: str
    case: str
    num_texts: int
    num_tokens: int
    num_different: int
    steps: list[int]
    leads: list[float]
    median_lead: float | None


def prompts_of(model: str, number: int, dice: random.Random) -> list[list[int]]:
    tokens = load_tokenizer(resolve(model)).encode(english_text())
    starts = [dice.randrange(len(tokens) - 100) for _ in range(number)]
    return [tokens[start : start + dice.randint(8, 32)] for start in starts]


def requests_of(prompts: Sequence[list[int]], temperature: float, num_tokens: int) -> list[Request]:
    params = SamplingParams(temperature=temperature, logprobs=2)
    return [
        Request(
            request_id=number,
            prompt_tokens=prompt,
            params=params,
            max_tokens=num_tokens,
            seed=number,
            arrival_s=float(number),
        )
        for number, prompt in enumerate(prompts)
    ]


def continue_all(
    worker: Worker,
    requests: Sequence[Request],
    *,
    lost_at: int | None = None,
    max_step_tokens: int = 512,
) -> list[Text]:
    """All together. The cache is lost when `lost_at` tokens have come of the first request."""
    scheduler = Scheduler(
        num_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        max_context=2048,
        max_step_tokens=max_step_tokens,
        max_running=TOGETHER,
        max_waiting=len(requests),
        prefix_caching=False,
    )
    texts = {request.request_id: Text() for request in requests}
    scheduler.add_all(requests)
    first = texts[requests[0].request_id]
    while (plan := scheduler.plan(0.0)) is not None:
        for event in scheduler.complete(worker.execute(plan)):
            assert event.token_id is not None and event.logprobs is not None
            best, second = event.logprobs.top_logprobs[:2]
            texts[event.request_id].tokens.append(event.token_id)
            texts[event.request_id].leads.append(best - second)
        if lost_at is not None and len(first.tokens) >= lost_at:
            lost_at = None
            scheduler.new_epoch(1, cache_lost=True)
            scheduler.resize(num_blocks=BLOCKS, max_in_flight=1, epoch=1)
    return list(texts.values())


def alone(
    worker: Worker, requests: Sequence[Request], dice: random.Random | None, **how: int
) -> list[Text]:
    texts = []
    for request in requests:
        lost_at = None if dice is None else dice.randrange(1, request.max_tokens)
        texts += continue_all(worker, [request], lost_at=lost_at, **how)
    return texts


def together(worker: Worker, requests: Sequence[Request], dice: random.Random | None) -> list[Text]:
    texts = []
    for start in range(0, len(requests), TOGETHER):
        lost_at = None if dice is None else dice.randrange(1, requests[0].max_tokens)
        texts += continue_all(worker, requests[start : start + TOGETHER], lost_at=lost_at)
    return texts


def compare(
    scheme: str, sampling: str, case: str, texts: Sequence[Text], calm: Sequence[Text]
) -> Comparison:
    firsts = [
        (step, before)
        for text, before in zip(texts, calm, strict=True)
        for step in [first_difference(text.tokens, before.tokens)]
        if step is not None
    ]
    is_greedy = sampling == "greedy"
    leads = [lead for text in calm for lead in text.leads]
    return Comparison(
        scheme=scheme,
        sampling=sampling,
        case=case,
        num_texts=len(texts),
        num_tokens=sum(len(text.tokens) for text in texts),
        num_different=len(firsts),
        steps=sorted(step for step, _ in firsts),
        leads=[round(before.leads[step], 5) for step, before in firsts] if is_greedy else [],
        median_lead=round(statistics.median(leads), 3) if is_greedy else None,
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = enumerate(zip(one, other, strict=True))
    return next((step for step, (a, b) in pairs if a != b), None)


def measure(
    scheme: str, model: str, prompts: Sequence[list[int]], num_tokens: int
) -> list[Comparison]:
    dtype, quantize = SCHEMES[scheme]
    config = EngineConfig(
        model=model, dtype=dtype, quantize=quantize, kv_memory_bytes=512 * 2**20, max_context=2048
    )
    worker = load_worker(resolve(model), config)
    found = []
    for sampling, temperature in (("greedy", 0.0), ("seeded", 1.0)):
        dice = random.Random(1)
        requests = requests_of(prompts, temperature, num_tokens)
        few = requests[: max(1, len(requests) // 4)]
        one = alone(worker, requests, None)
        eight = together(worker, requests, None)
        single = alone(worker, few, None, max_step_tokens=1)
        cases = {
            "recovered, alone": (alone(worker, requests, dice), one),
            f"recovered, {TOGETHER} at a time": (together(worker, requests, dice), eight),
            f"company: {TOGETHER} at a time, calm": (eight, one),
            "recovered, alone, in the same shapes": (
                alone(worker, few, dice, max_step_tokens=1),
                single,
            ),
        }
        found += [compare(scheme, sampling, case, *texts) for case, texts in cases.items()]
    return found


def show(rows: Sequence[Comparison]) -> None:
    table = Table("kernels", "sampling", "case", "texts", "differ", "per 1 000 tokens")
    for name in ("first at step", "lead there (largest)", "median lead"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row.scheme,
            row.sampling,
            row.case,
            str(row.num_texts),
            str(row.num_different),
            f"{1000 * row.num_different / row.num_tokens:.2f}",
            ", ".join(map(str, row.steps[:6])) or "-",
            f"{max(row.leads):.4f}" if row.leads else "-",
            f"{row.median_lead:.2f}" if row.median_lead is not None else "-",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--threads", type=int, default=len(usable_cores()))
    options = parser.parse_args()
    set_num_threads(options.threads)
    prompts = prompts_of(options.model, options.prompts, random.Random(0))
    rows: list[Comparison] = []
    for scheme in options.schemes.split(","):
        rows += measure(scheme, options.model, prompts, options.tokens)
    show(rows)
    print(json.dumps({"bench": "near_ties", "rows": msgspec.to_builtins(rows)}))


if __name__ == "__main__":
    main()
