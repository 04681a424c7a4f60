"""Each benchmark of the suite for a second or two, on a small random model, up to the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tiny_llama import TINY

from bench import serve, start, sweep
from bench.llama_shapes import write_checkpoints

pytestmark = pytest.mark.slow

SMALL_SERVER = ("--", "--threads", "1", "--kv-memory", "16MiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_checkpoints(TINY, [2], sweep.SMALL_VOCABULARY, folder)[2])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a benchmark prints, and the record in its last line."""

    def run(module: Any, *arguments: str) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
        module.main()
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return run


def test_serving(said: Any, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    # An extra that may not be there.
    from bench import plots  # noqa: PLC0415

    small = ("--question-tokens", "16", "--answer-tokens", "4", "--shared-tokens", "64")
    asked = ("--rates", "20", "40", "--seconds", "0.5", "--warm-up", "0.2", *small)
    out, record = said(serve, "--model", model, "--workload", "chat", *asked, *SMALL_SERVER)
    assert [row["num_requests"] for row in record["rows"]] == [8, 20]
    for row in record["rows"]:
        assert row["num_errors"] == 0, row["errors"]
        assert row["num_output_tokens"] == 4 * row["num_requests"]
        # Of 80 to 140 tokens of a prompt at least the shared 64 are known.
        assert row["cached_share"] > 0.5
        assert 0 < row["ttft"]["p50_ms"] <= row["ttft"]["p99_ms"]
    path = tmp_path / "serve.txt"
    path.write_text(out)
    figures = plots.figures_of([plots.read_record(path)])
    (name,) = figures
    assert name.startswith("latency-chat-threads-1")


def test_what_is_not_shared_is_not_cached(said: Any, model: str) -> None:
    asked = ("--rates", "20", "--seconds", "0.5", "--warm-up", "0.2", "--answer-tokens", "4")
    _, record = said(serve, "--model", model, *asked, *SMALL_SERVER)
    (row,) = record["rows"]
    assert (row["num_requests"], row["num_errors"], row["num_cached_tokens"]) == (10, 0, 0)


def test_starting(said: Any, model: str) -> None:
    _, record = said(start, "--model", model, "--rounds", "1", *SMALL_SERVER)
    (ready_s,), (first_s,) = record["ready_s"], record["first_token_s"]
    assert 0 < ready_s < first_s


def test_sweeping(said: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LLAMA_SHAPES", {"tiny": structs.replace(TINY, vocab_size=128_256)})
    quick = sweep.Plan(
        layers={"tiny": [1, 2]},
        contexts=[40, 600],
        streams=[1, 5],
        num_steps=4,
        rounds=1,
        rates_s=0.2,
    )
    monkeypatch.setattr(sweep, "QUICK", quick)
    asked = ("--quick", "--model", model, "--threads", "1", "--quantize", "int4")
    out, record = said(sweep, *asked)
    points = record["points"]
    assert [(one["num_layers"], one["figure"]) for one in points["layers"]] == [
        (1, "decode"),
        (2, "decode"),
        (1, "decode"),
        (2, "decode"),
        (1, "prefill"),
        (2, "prefill"),
    ]
    assert [one["num_streams"] for one in points["streams"]] == [1, 5]
    decoded = [one["context"] for one in points["context"] if one["figure"] == "decode"]
    assert [40 < decoded[0] < 50, 600 < decoded[1] < 610] == [True, True]
    assert [one["context"] for one in points["context"] if one["figure"] == "prefill"] == [512]
    assert [one["work"] for one in record["extrapolated"]] == [
        "decode-1",
        "decode-32",
        "prefill-512",
    ]
    whole = record["extrapolated"][0]
    # All ten layers, and the head of all the vocabulary.
    assert whole["whole"]["num_layers"] == 10
    assert whole["shape"]["head_weights"] == 128_256 * TINY.hidden_size
    assert "not measured" in out
