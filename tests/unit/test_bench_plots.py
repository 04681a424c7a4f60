"""Plots of records that were once measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")

from bench import plots

MACHINE = "some processor (avx2), 2 of 2 cores"


def point(figure: str, streams: int, context: int, ms: float, limit: float) -> dict[str, Any]:
    rows = streams if figure == "decode" else 512
    return {
        "model": "m",
        "num_layers": 2,
        "figure": figure,
        "num_streams": streams,
        "context": context,
        "load": {"rows": rows},
        "ms": {"median": ms, "lowest": ms / 2, "highest": ms * 2},
        "tokens_per_s": rows / ms * 1e3,
        "limit_tokens_per_s": limit,
    }


SWEEP = {
    "benchmark": "sweep",
    "machine": MACHINE,
    "quantize": "int4",
    "points": {
        "streams": [point("decode", 1, 64, 10.0, 200.0), point("decode", 8, 64, 40.0, 400.0)],
        "context": [
            point("decode", 1, 128, 10.0, 200.0),
            point("decode", 1, 1000, 20.0, 100.0),
            point("prefill", 1, 512, 900.0, 700.0),
        ],
        "layers": [],
    },
    "extrapolated": [
        {"model": "m", "work": "decode-1", "tokens_per_s": 3.0, "limit_tokens_per_s": 5.0}
    ],
}
TIMES = {"mean_ms": 1.0, "p50_ms": 10.0, "p90_ms": 20.0, "p99_ms": 30.0}
SERVE = {
    "benchmark": "serve",
    "machine": MACHINE,
    "model": "m",
    "server": [],
    "workload": {
        "name": "chat",
        "question_tokens": 32,
        "answer_tokens": 16,
        "shared_tokens": 512,
        "num_turns": 4,
    },
    "limits": {"ttft": 25.0},
    "rows": [
        {
            "rate_per_s": rate,
            "ttft": TIMES,
            "tpot": None,
            "requests_per_s": rate,
            "goodput": {"requests_per_s": rate / 2},
        }
        for rate in (1.0, 2.0)
    ],
}


def test_every_record_has_its_figures() -> None:
    figures = plots.figures_of([SWEEP, SERVE])
    assert set(figures) == {"throughput.png", "context.png", "roofline.png", "latency-chat.png"}
    for figure in figures.values():
        assert figure.get_supxlabel() == MACHINE
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_what_is_drawn_is_what_was_measured() -> None:
    figures = plots.figures_of([SWEEP, SERVE])
    measured, limit = figures["throughput.png"].axes[0].lines
    assert list(measured.get_ydata()) == [100.0, 200.0]
    assert list(limit.get_ydata()) == [200.0, 400.0]
    first, per_token, good = figures["latency-chat.png"].axes
    assert [line.get_label() for line in first.lines] == ["p50", "p90", "p99", "limit"]
    assert list(first.lines[2].get_ydata()) == [30.0, 30.0]
    # No limit on these was asked for.
    assert [line.get_label() for line in per_token.lines] == ["p50", "p90", "p99"]
    assert list(good.lines[1].get_ydata()) == [0.5, 1.0]
    limit, part = figures["roofline.png"].axes[0].lines
    assert list(limit.get_xdata()) == list(limit.get_ydata()) == [5.0, 700.0]
    assert list(part.get_ydata()) == [3.0, 420.0]
    labels = figures["roofline.png"].axes[0].get_legend_handles_labels()[1]
    assert "m int4, all layers: extrapolated" in labels
    assert "m int4, 2 layers, prefill" in labels


def test_results_do_not_cover_one_another() -> None:
    uncached = SERVE | {"server": ["--no-prefix-cache"]}
    figures = plots.figures_of([SERVE, uncached])
    assert set(figures) == {"latency-chat.png", "latency-chat-no-prefix-cache.png"}
    assert "--no-prefix-cache" in figures["latency-chat-no-prefix-cache.png"].get_suptitle()
    with pytest.raises(ValueError, match=r"several results are for latency-chat\.png"):
        plots.figures_of([SERVE, SWEEP, SERVE])


def test_only_the_last_line_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(f"a table\n{json.dumps(SERVE)}\n\n")
    assert plots.read_record(path)["model"] == "m"
    for text, complaint in (("a table\n", "no JSON"), ('{"benchmark": "step"}', "not of bench")):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            plots.read_record(path)


def test_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"
    path.write_text(json.dumps(SERVE))
    monkeypatch.setattr("sys.argv", ["plots", str(path), "--out", str(tmp_path / "pngs")])
    plots.main()
    written = tmp_path / "pngs" / "latency-chat.png"
    assert capsys.readouterr().out == f"{written}\n"
    assert written.read_bytes().startswith(b"\x89PNG")
