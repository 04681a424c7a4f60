"""PNGs from what benchmarks said: `python -m bench.plots RESULT ... --out DIR`.

A RESULT is a file whose last line is the JSON line of `bench.sweep` or `bench.serve`; all that such
a script printed will do. Needs matplotlib: the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

Record = Mapping[str, Any]

_MEASURED, _LIMIT, _GOOD = "#0b6e99", "#888888", "#2e7d32"
_SHADES = {"p50_ms": "#7fb8d0", "p90_ms": "#2f8fb5", "p99_ms": "#0b4f6c"}
_COLOURS = ("#0b6e99", "#c05621", "#2e7d32", "#7b4fa3", "#b08900")
_DPI = 150


def read_record(path: Path) -> Record:
    """Raises ValueError for a file that does not end with such a line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        record = json.loads(last)
    except json.JSONDecodeError as error:
        raise ValueError(f"the last line of {path} is no JSON: {last[:60]!r}") from error
    if not isinstance(record, dict) or record.get("benchmark") not in ("sweep", "serve"):
        raise ValueError(f"{path} is not of bench.sweep or bench.serve, which are what is plotted")
    return record


def figures_of(records: Sequence[Record]) -> dict[str, Figure]:
    """By file name. What no record tells has no figure.

    Raises ValueError for two records that tell the same.
    """
    sweeps = [record for record in records if record["benchmark"] == "sweep"]
    figures: list[tuple[str, Figure]] = []
    for record in sweeps:
        if streams := record["points"].get("streams"):
            figures.append(("throughput.png", throughput(streams, record["machine"])))
        if context := record["points"].get("context"):
            figures.append(("context.png", cost_of_context(context, record["machine"])))
    if sweeps:
        figures.append(("roofline.png", roofline(sweeps)))
    for record in records:
        if record["benchmark"] == "serve":
            words = [
                record["workload"]["name"],
                *(word.strip("-").replace("/", "-") for word in record["server"]),
            ]
            figures.append((f"latency-{'-'.join(words)}.png", latency(record)))
    names = [name for name, _ in figures]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several results are for {', '.join(twice)}: give one of them")
    return dict(figures)


def throughput(points: Sequence[Record], machine: str) -> Figure:
    figure, (axes,) = _figure(
        f"Decoding, {points[0]['model']}, context {_contexts(points)}", machine
    )
    streams = [point["num_streams"] for point in points]
    axes.plot(streams, [p["tokens_per_s"] for p in points], "o-", color=_MEASURED, label="measured")
    axes.fill_between(
        streams,
        [point["load"]["rows"] / point["ms"]["highest"] * 1e3 for point in points],
        [point["load"]["rows"] / point["ms"]["lowest"] * 1e3 for point in points],
        color=_MEASURED,
        alpha=0.15,
        label="slowest to quickest step",
    )
    limits = [point["limit_tokens_per_s"] for point in points]
    axes.plot(streams, limits, "--", color=_LIMIT, label="limit: memory, float32 arithmetic")
    _log_ticks(axes, streams)
    axes.set(xlabel="streams at once", ylabel="tokens/s, all streams together", ylim=(0, None))
    axes.legend()
    return figure


def cost_of_context(points: Sequence[Record], machine: str) -> Figure:
    figure, panels = _figure(f"Cost of context, {points[0]['model']}", machine, num_panels=2)
    labels = {
        "decode": "one stream: ms for a token",
        "prefill": "reading a prompt: ms for 512 tokens",
    }
    for axes, (kind, label) in zip(panels, labels.items(), strict=True):
        some = [point for point in points if point["figure"] == kind]
        contexts = [point["context"] for point in some]
        axes.plot(
            contexts, [p["ms"]["median"] for p in some], "o-", color=_MEASURED, label="measured"
        )
        limits = [p["load"]["rows"] / p["limit_tokens_per_s"] * 1e3 for p in some]
        axes.plot(contexts, limits, "--", color=_LIMIT, label="limit")
        axes.set(xlabel="tokens of context", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.legend()
    return figure


def roofline(sweeps: Sequence[Record]) -> Figure:
    """Every point where its limit is, and how far below it stays."""
    machines = dict.fromkeys(sweep["machine"] for sweep in sweeps)
    figure, (axes,) = _figure("Tokens per second against the roofline", "\n".join(machines))
    points = [
        point | {"model": _held(sweep, point["model"])}
        for sweep in sweeps
        for some in (
            *sweep["points"].values(),
            [one | {"figure": "extrapolated"} for one in sweep["extrapolated"]],
        )
        for point in some
    ]
    colours = {model: _COLOURS[n % len(_COLOURS)] for n, model in enumerate(_models(points))}
    markers = {"decode": "o", "prefill": "s", "extrapolated": "D"}
    for model, figure_of in dict.fromkeys((p["model"], p["figure"]) for p in points):
        some = [p for p in points if (p["model"], p["figure"]) == (model, figure_of)]
        axes.scatter(
            [point["limit_tokens_per_s"] for point in some],
            [point["tokens_per_s"] for point in some],
            marker=markers[figure_of],
            edgecolors=colours[model],
            facecolors="none" if figure_of == "extrapolated" else colours[model],
            label=_label(some),
            s=28,
        )
    ends = [f(p["limit_tokens_per_s"] for p in points) for f in (min, max)]
    axes.plot(ends, ends, color=_LIMIT, label="the limit")
    axes.plot(ends, [0.6 * end for end in ends], ":", color=_LIMIT, label="60 % of it")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(
        xlabel="limit: memory, or float32 arithmetic (8-bit kernels can pass it), tokens/s",
        ylabel="measured (hollow: extrapolated), tokens/s",
    )
    figure.set_figwidth(10.0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def latency(record: Record) -> Figure:
    rows, limits = record["rows"], record["limits"]
    title = f"{record['model']} under load: {_described(record['workload'])}"
    title = " ".join([title, *record["server"]])
    figure, panels = _figure(title, record["machine"], num_panels=3)
    rates = [row["rate_per_s"] for row in rows]
    labels = {"ttft": "to the first token, ms", "tpot": "for each token after it, ms"}
    for axes, (name, label) in zip(panels, labels.items(), strict=False):
        for percentile, colour in _SHADES.items():
            times = [row[name][percentile] if row[name] else float("nan") for row in rows]
            axes.plot(rates, times, "o-", color=colour, label=percentile.removesuffix("_ms"))
        if name in limits:
            axes.axhline(limits[name], color=_LIMIT, linestyle="--", label="limit")
        axes.set(ylabel=label, ylim=(0, None))
    good = [row["goodput"]["requests_per_s"] for row in rows]
    panels[2].plot(rates, [row["requests_per_s"] for row in rows], "o-", color=_LIMIT, label="all")
    kept = " and ".join(f"{name} ≤ {ms:g} ms" for name, ms in limits.items())
    panels[2].plot(rates, good, "o-", color=_GOOD, label=kept)
    panels[2].set(ylabel="answered requests/s", ylim=(0, None))
    for axes in panels:
        axes.set(xlabel="arriving requests/s", xlim=(0, None))
        axes.legend()
    return figure


def _figure(title: str, machine: str, num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    width = 7.0 if num_panels == 1 else 4.2 * num_panels
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(machine, fontsize=8, color="#555555")
    panels = [figure.add_subplot(1, num_panels, n + 1) for n in range(num_panels)]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _log_ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, labels=[str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _contexts(points: Sequence[Record]) -> str:
    least, most = (f(point["context"] for point in points) for f in (min, max))
    return f"{least}" if least == most else f"{least} to {most}"


def _models(points: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(point["model"] for point in points))


def _held(sweep: Record, model: str) -> str:
    return model if sweep["quantize"] == "auto" else f"{model} {sweep['quantize']}"


def _label(points: Sequence[Record]) -> str:
    model, kind = points[0]["model"], points[0]["figure"]
    if kind == "extrapolated":
        return f"{model}, all layers: extrapolated"
    least, most = (f(point["num_layers"] for point in points) for f in (min, max))
    layers = f"{least}" if least == most else f"{least} to {most}"
    return f"{model}, {layers} layers, {kind}"


def _described(workload: Record) -> str:
    words = f"{workload['question_tokens']} tokens asked, {workload['answer_tokens']} answered"
    if workload["num_turns"] > 1:
        words += f", {workload['num_turns']} turns behind {workload['shared_tokens']} in common"
    return words


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.plots", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    figures = figures_of([read_record(path) for path in options.results])
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=_DPI)
        print(options.out / name)


if __name__ == "__main__":
    main()
