"""The run of `shoal chaos`: calm first, then a load with strikes, then a look at the server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from shoal.cli.chaos_table import progress_text
from shoal.cli.chaos_target import HttpAsker, async_client, recoveries
from shoal.cli.console import err_console, note
from shoal.errors import ConfigError, ShoalError
from shoal.evaluate.answers import Answer, Asked
from shoal.evaluate.chaos import ChaosPlan, Tally, calm_answers, keep_asking
from shoal.evaluate.chaos_prompts import make_questions
from shoal.evaluate.chaos_report import ChaosReport, HeadUse, summarise
from shoal.evaluate.strikes import Striker, Target

if TYPE_CHECKING:
    from shoal.fleet.operator_client import OperatorClient
    from shoal.fleet.serving_file import Serving
    from shoal.fleet.status import FleetStatus

_NUM_QUESTIONS = 16
_SETTLE_S = 60.0
_LOOK_S = 0.25
_LOCAL = "local"  # the node of a server without a cluster


async def run_chaos(
    plan: ChaosPlan, serving: Serving, fleet: FleetStatus, client: OperatorClient
) -> ChaosReport:
    """Raises OperatorError if the server does not even answer in peace."""
    questions = make_questions(_NUM_QUESTIONS, max_tokens=plan.max_tokens, seed=plan.seed)
    striker = Striker(
        lambda: local_targets(client.status()), how=plan.how, every_s=plan.every_s, seed=plan.seed
    )
    tally, problems = Tally(), list[str]()
    async with async_client(serving.url) as http:
        asker = HttpAsker(http, serving.model)
        note(f"asking {len(questions)} questions in peace, for their calm answers")
        calm = await calm_answers(asker, questions, at_once=plan.num_streams, tally=Tally())
        use_before, seen_before = head_use(serving.pid), await recoveries(http)
        start_s = time.perf_counter()
        await _storm(plan, asker, questions, calm, striker, tally)
        seconds = time.perf_counter() - start_s
        use_after, seen_after = use_before, seen_before
        try:
            problems += await _unwell(client)
            use_after, seen_after = head_use(serving.pid), await recoveries(http)
        except (ShoalError, psutil.Error) as error:
            problems.append(f"the server is not well afterwards: {error}")
    if striker.trouble is not None:
        problems.append(f"the strikes ended early: {striker.trouble}")
    if not striker.strikes:
        problems.append(f"no worker was struck in {seconds:.1f} s, so nothing is proved")
    return summarise(
        tally,
        striker.strikes,
        seconds=seconds,
        recoveries={key: number - seen_before.get(key, 0) for key, number in seen_after.items()},
        head=(use_before, use_after),
        is_exact=is_exact(fleet.description),
        problems=problems,
    )


async def _storm(
    plan: ChaosPlan,
    asker: HttpAsker,
    questions: Sequence[Asked],
    calm: Sequence[Answer],
    striker: Striker,
    tally: Tally,
) -> None:
    """Until the time is up or Ctrl-C comes; what is open then ends without further strikes."""
    enough = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt, enough)
    striker.start()
    showing = asyncio.create_task(_show(plan, tally, striker))
    ending = asyncio.create_task(_end(plan.for_s, enough, striker))
    try:
        await keep_asking(
            asker,
            questions,
            calm,
            num_streams=plan.num_streams,
            seed=plan.seed,
            enough=enough,
            tally=tally,
        )
        await ending
    finally:
        for task in (showing, ending):
            task.cancel()
        await asyncio.wait((showing, ending))
        striker.stop()
        _end_interrupts()


def _interrupt(enough: asyncio.Event) -> None:
    note("what is open may end, then the report comes; Ctrl-C again leaves at once")
    enough.set()
    _end_interrupts()


def _end_interrupts() -> None:
    """The next Ctrl-C is Python's again."""
    if asyncio.get_running_loop().remove_signal_handler(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)


async def _end(for_s: float, enough: asyncio.Event, striker: Striker) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(enough.wait(), for_s)
    enough.set()
    await asyncio.to_thread(striker.stop)


async def _show(plan: ChaosPlan, tally: Tally, striker: Striker) -> None:
    """A line that changes, on a terminal."""
    console = err_console()
    if not console.is_terminal:
        return
    start_s = time.perf_counter()
    with console.status("") as line:
        while True:
            seconds = time.perf_counter() - start_s
            line.update(progress_text(tally, len(striker.strikes), seconds, plan))
            await asyncio.sleep(_LOOK_S)


async def _unwell(client: OperatorClient) -> list[str]:
    """Which replicas do not serve again in time, and why."""
    deadline_s = time.perf_counter() + _SETTLE_S
    while True:
        fleet = await asyncio.to_thread(client.status)
        ill = [f"{each.name}: {each.reason}" for each in fleet.replicas if not each.ok]
        if not ill or time.perf_counter() > deadline_s:
            return ill
        await asyncio.sleep(_LOOK_S)


def check_targets(fleet: FleetStatus) -> None:
    """Raises ConfigError if there is nobody to kill."""
    num_here = len(local_targets(fleet))
    num_workers = sum(len(replica.stats.workers) for replica in fleet.replicas)
    if not num_here:
        raise ConfigError(
            f"none of the {num_workers} workers of {fleet.model} runs on this machine, and only "
            "those can be killed from here: let it hold a share of the model ('shoal rebalance'), "
            "or serve without --cluster"
        )
    if num_here < num_workers:
        note(f"{num_workers - num_here} of {num_workers} workers are on other machines: spared")


def local_targets(fleet: FleetStatus) -> list[Target]:
    """The workers that run on this machine now."""
    links = psutil.net_if_addrs().values()
    own = {each.address.partition("%")[0] for link in links for each in link}
    here = {node.name for node in fleet.nodes if node.address in own or node.name == _LOCAL}
    return [
        Target(worker.worker, worker.pid)
        for replica in fleet.replicas
        for worker in replica.stats.workers
        if worker.node in here and worker.pid
    ]


def head_use(pid: int) -> HeadUse:
    """Raises psutil.Error if it has ended."""
    head = psutil.Process(pid)
    return HeadUse(
        rss_bytes=head.memory_info().rss, num_fds=head.num_fds(), num_threads=head.num_threads()
    )


def is_exact(description: str) -> bool:
    """Whether sums do not depend on what is computed beside them."""
    return "float32" in description.split(", ")
