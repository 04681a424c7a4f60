"""The benchmarks' commands over scripted engines: who is asked what when, and the JSON line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest

from bench import compare, step
from bench.peers import __main__ as peers
from bench.peers import turns
from bench.roofline import Limit, Rates, Shape
from bench.works import WORKS
from shoal.weights.source import ModelFiles

TEXT = list(range(1000))


class ScriptedEngine:
    """Answers at once with tokens that come every `pace_s`; notes what it was asked for."""

    def __init__(self, name: str, pace_s: float, diary: list[str], **about: Any) -> None:
        self.name = name
        self.about = {"engine": name, "computes": "nothing", "caches_prefixes": True, **about}
        self._pace_s = pace_s
        self._diary = diary

    def call(self, what: str, **arguments: Any) -> Any:
        if what == "perplexity":
            return 25.0
        prompts, new_tokens = arguments["prompts"], arguments["new_tokens"]
        self._diary.append(f"{self.name} {len(prompts)}x{len(prompts[0])}+{new_tokens}")
        stream = [self._pace_s * (n + 1) for n in range(new_tokens)]
        tokens = list(range(new_tokens))
        return {"arrivals_s": [stream] * len(prompts), "tokens": [tokens] * len(prompts)}

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._diary.append(f"{self.name} closed")


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_REST_S", 0.0)


@pytest.fixture
def _scripted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ModelFiles(name="scripted", kind="gguf", path=Path("scripted.gguf"))
    tokenizer = SimpleNamespace(encode=lambda _text: TEXT)
    for module in (compare, peers):
        monkeypatch.setattr(module, "resolve", lambda _name: files)
        monkeypatch.setattr(module, "load_tokenizer", lambda _files: tokenizer)


def test_engines_take_turns_and_the_first_round_is_not_counted() -> None:
    diary: list[str] = []
    engines = [ScriptedEngine("a", 0.1, diary), ScriptedEngine("b", 0.2, diary)]
    rounds = list(turns.rounds_of(engines, WORKS["decode-1"], 2, TEXT))  # type: ignore[arg-type]
    assert [{name: figure for name, (figure, _) in one.items()} for one in rounds] == [
        {"a": pytest.approx(10), "b": pytest.approx(5)}
    ] * 2
    measured = [line for line in diary if line.endswith("+64")]
    assert [line[0] for line in measured] == ["a", "b", "b", "a", "a", "b"]
    # Each is warmed up before.
    assert diary[:2] == ["a 1x8+4", "a 1x128+64"]


def test_a_cached_prompt_is_asked_for_twice_and_of_those_who_keep_it() -> None:
    diary: list[str] = []
    engines = [
        ScriptedEngine("a", 0.1, diary),
        ScriptedEngine("b", 0.2, diary, caches_prefixes=False),
    ]
    (done,) = turns.rounds_of(engines, WORKS["cached-512"], 1, TEXT)  # type: ignore[arg-type]
    assert done.keys() == {"a"}
    assert [line for line in diary if "512" in line] == ["a 1x512+1"] * 4


@pytest.mark.usefixtures("_scripted_model")
def test_peers_beside_shoal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diary: list[str] = []
    paces = {"shoal": 0.01, "openvino@Q8_0": 0.04}

    def start(peer: Any, *_: Any) -> ScriptedEngine | None:
        return ScriptedEngine(peer.name, paces[peer.name], diary) if peer.name in paces else None

    monkeypatch.setattr(peers, "start", start)
    monkeypatch.setattr(peers, "described", lambda _path: "Q4_1")
    given = ["--peers", "openvino@Q8_0", "vllm", "--works", "decode-1", "cached-512"]
    monkeypatch.setattr("sys.argv", ["peers", "--rounds", "2", *given])
    peers.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    gains = {(row["work"], row["engine"]): row["gain"] for row in told["rows"]}
    assert gains[("decode-1", "openvino@Q8_0")] == gains[("cached-512", "openvino@Q8_0")] == 4.0
    assert told["same_tokens"] == {"shoal": 64, "openvino@Q8_0": 64}
    assert told["steps_to_cached_token"] == pytest.approx(1.0)
    assert told["weights"]["vllm"] == "Q4_1, as shipped, as bfloat16 or float32"
    assert diary[-2:] == ["openvino@Q8_0 closed", "shoal closed"]


@pytest.mark.usefixtures("_scripted_model")
def test_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str, *_: Any) -> ScriptedEngine:
        return ScriptedEngine(name, 0.02 if name == "before" else 0.01, [])

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare, "commit_of", lambda side: side.revision)
    given = ["--before", "HEAD~1", "--perplexity", "100", "--works", "prefill-512"]
    monkeypatch.setattr("sys.argv", ["compare", "--rounds", "1", *given])
    compare.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["sides"] == {"before": "HEAD~1, nothing", "after": "., nothing"}
    assert told["rows"][0]["gain"] == 2.0
    assert told["perplexity"] == {"before": 25.0, "after": 25.0}


def test_a_step_beside_its_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = SimpleNamespace(
        stats=lambda: SimpleNamespace(num_blocks=2**11),
        info=SimpleNamespace(description="scripted"),
        close=lambda: None,
    )
    shape = Shape(
        weight_bytes=1,
        layer_weights=1,
        head_weights=1,
        attention_operations_per_key=1,
        kv_bytes_per_token=1.0,
    )

    def measure(_engine: Any, work: Any, *_: Any) -> step.Account:
        return step.Account(
            work=work.name,
            num_steps=1,
            step_ms=9.0,
            framed_ms=10.0,
            waiting_ms=0.0,
            period_ms=None,
            parts={"linear layers": 10.0},
            calls={"linear layers": 1.0},
            limit=Limit(memory_ms=4.5, arithmetic_ms=1.0),
        )

    monkeypatch.setattr(step, "start_engine", lambda _config: engine)
    monkeypatch.setattr(step, "resolve", lambda _name: None)
    monkeypatch.setattr(step, "shape_of", lambda _files, _bytes: shape)
    monkeypatch.setattr(
        step, "measure_rates", lambda _s: Rates(bytes_per_s=1.0, operations_per_s=1.0)
    )
    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr("sys.argv", ["step", "--works", "decode-1", "prefill-512"])
    step.main()
    out = capsys.readouterr().out
    assert "50% (memory)" in out
    told = json.loads(out.splitlines()[-1])
    assert [one["work"] for one in told["accounts"]] == ["decode-1", "prefill-512"]
    assert told["accounts"][0]["python_share"] == 0.0
