"""How `shoal chaos` shows what it does and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from shoal.cli.console import human_bytes
from shoal.evaluate.chaos import ChaosPlan, Tally

if TYPE_CHECKING:
    from shoal.evaluate.chaos_report import ChaosReport, Gaps


def progress_text(tally: Tally, num_strikes: int, seconds: float, plan: ChaosPlan) -> str:
    """One line."""
    bad = len(tally.broken), len(tally.different)
    verdict = f"{bad[0]} broken, {bad[1]} differ"
    return (
        f"{seconds:,.0f} of {plan.for_s:,.0f} s: {len(tally.answers):,} requests, "
        f"{tally.num_tokens:,} tokens, {num_strikes:,} struck, "
        f"{f'[red]{verdict}[/]' if any(bad) else verdict}"
    )


def report_view(report: ChaosReport, plan: ChaosPlan, description: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in _facts(report, plan, description):
        grid.add_row(f"[dim]{label}[/]", value)
    return grid


def _facts(report: ChaosReport, plan: ChaosPlan, description: str) -> list[tuple[str, str]]:
    rate = report.num_tokens / report.seconds if report.seconds else 0.0
    return [
        (
            "load",
            f"{report.num_requests:,} requests and {report.num_tokens:,} tokens in "
            f"{report.seconds:,.1f} s, {plan.num_streams} at a time: {rate:,.1f} tokens/s",
        ),
        ("struck", f"{report.num_kills:,} workers killed, {report.num_freezes:,} frozen"),
        ("recoveries", _recoveries(report.recoveries)),
        ("longest gaps", f"{_gaps(report.hit_gaps)}, where a worker was struck meanwhile"),
        ("", f"{_gaps(report.other_gaps)} else"),
        ("streams", _judged(report.num_broken, "broken")),
        ("tokens", _judged(report.num_lost_tokens, "lost") + ", " + _repeated(report)),
        (
            "answers",
            _judged(report.num_different, f"of {report.num_requests:,} differ from the calm run's"),
        ),
        ("head", _head(report)),
        ("served", f"{escape(description)}: {_promise(report.is_exact)}"),
    ]


def _gaps(gaps: Gaps) -> str:
    if not gaps.number:
        return "none"
    return (
        f"[bold]{gaps.max_s:.2f} s[/], p99 {gaps.p99_s:.2f}, p50 {gaps.p50_s:.2f} "
        f"({gaps.number:,} waits)"
    )


def _recoveries(recoveries: dict[str, int]) -> str:
    seen = [f"{number:,} ({key})" for key, number in recoveries.items() if number]
    return ", ".join(seen) or "none seen by /metrics"


def _repeated(report: ChaosReport) -> str:
    return _judged(report.num_repeated_tokens, "repeated")


def _judged(number: int, what: str) -> str:
    colour = "red" if number else "green"
    return f"[{colour}]{number:,}[/] {what}"


def _head(report: ChaosReport) -> str:
    before, after = report.head_before, report.head_after
    return (
        f"{human_bytes(before.rss_bytes)} before, {human_bytes(after.rss_bytes)} after; "
        f"{before.num_fds} and {after.num_fds} open files; "
        f"{before.num_threads} and {after.num_threads} threads"
    )


def _promise(is_exact: bool) -> str:
    if is_exact:
        return "every answer must be the same"
    return (
        "these kernels round by how much is computed together, so a near-tie may fall "
        "the other way; '--dtype float32 --quantize none' promises the same answers"
    )
