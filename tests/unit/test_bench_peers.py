"""The lines between a benchmark and an engine, who is in the roster, and what the table says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from bench.peers import run_transformers
from bench.peers.process import EngineProcess
from bench.peers.protocol import Streams, answer_to, call_line, parse_answer
from bench.peers.roster import parse_peer, python_for
from bench.peers.run_shoal import follow_all
from bench.peers.table import gain, records, results_table, steps_to_cached_token
from bench.peers.turns import can_do
from bench.peers.weights import described, in_blocks
from bench.works import WORKS
from shoal.engine.api import Delta
from shoal.request import SamplingParams


def test_a_call_and_its_answer() -> None:
    line = call_line("add", {"a": 1, "b": 2})
    reply = json.dumps(answer_to(line, {"add": lambda a, b: a + b}))
    assert parse_answer(reply, "engine") == 3


def test_an_error_travels() -> None:
    reply = json.dumps(answer_to(call_line("fail", {}), {"fail": lambda: 1 / 0}))
    with pytest.raises(RuntimeError, match=r"(?s)engine failed.*ZeroDivisionError"):
        parse_answer(reply, "engine")


@pytest.mark.parametrize("line", ["loading…", "[]", "{}", '{"answer": 1, "error": "x"}'])
def test_what_is_no_answer(line: str) -> None:
    with pytest.raises(RuntimeError, match="engine answered"):
        parse_answer(line, "engine")


def test_streams_keep_when_tokens_came() -> None:
    streams = Streams(2)
    streams.came(0, [7, 8])
    streams.counted(1, 1)
    answer = streams.answer()
    assert answer["tokens"] == [[7, 8], []]
    assert [len(stream) for stream in answer["arrivals_s"]] == [2, 1]
    assert answer["arrivals_s"][0][0] <= answer["arrivals_s"][1][0]


ENGINE = """
import sys
from bench.peers.protocol import serve

def load(settings):
    print("what libraries print is no answer")
    if settings.get("fails"):
        sys.exit("no such weights")
    return {"engine": settings["name"]}, {"double": lambda number: 2 * number}

serve(load)
"""


@pytest.fixture
def engine_module(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "scripted_engine.py").write_text(ENGINE, encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path)}


def test_an_engine_in_its_own_process(engine_module: dict[str, str]) -> None:
    python = Path(sys.executable)
    settings = {"name": "scripted"}
    with EngineProcess("one", python, "scripted_engine", settings, engine_module) as engine:
        assert engine.about == {"engine": "scripted"}
        assert engine.call("double", number=21) == 42


def test_an_engine_that_dies_says_why(engine_module: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)one ended with status 1.*no such weights"):
        EngineProcess("one", Path(sys.executable), "scripted_engine", {"fails": 1}, engine_module)


def test_names_of_peers() -> None:
    peer = parse_peer("openvino@Q8_0")
    assert (peer.engine.module, peer.blocks) == ("bench.peers.run_openvino", "Q8_0")
    assert parse_peer("openvino").blocks == "as shipped"
    with pytest.raises(ValueError, match=r"no engine 'openvinos'.*transformers"):
        parse_peer("openvinos")


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    peer = parse_peer("vllm")
    assert python_for(peer, print) is None
    by_hand = tmp_path / "shoal" / "bench" / "peers" / "vllm" / "bin" / "python"
    by_hand.parent.mkdir(parents=True)
    by_hand.touch()
    assert python_for(peer, print) == by_hand


def test_better_is_more_tokens_and_less_time() -> None:
    assert gain(WORKS["decode-1"], [60.0], [30.0]).median == 2.0
    assert gain(WORKS["cached-512"], [10.0], [50.0]).median == 5.0


def test_the_table_and_its_records() -> None:
    rounds = {"decode-1": {"shoal": [60.0, 62.0, 64.0], "other": [30.0, 31.0, 40.0]}}
    table = results_table(rounds, {"shoal": "Q4_1", "other": "Q8_0"})
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["shoal", "other"]
    assert cells[3] == ["62.0", "31.0"]
    assert cells[5] == ["", "2.00x"]
    ours, other = records(rounds)
    assert (ours["gain"], other["gain"], other["rounds"]) == (1.0, 2.0, [30.0, 31.0, 40.0])


def test_a_cached_prompt_counts_in_decode_steps() -> None:
    rounds = {"decode-1": {"shoal": [50.0]}, "cached-512": {"shoal": [30.0]}}
    assert steps_to_cached_token(rounds) == pytest.approx(1.5)
    assert steps_to_cached_token({"decode-1": rounds["decode-1"]}) is None


def test_who_keeps_no_prefixes_has_none_cached() -> None:
    assert not can_do({"caches_prefixes": False}, WORKS["cached-512"])
    assert can_do({"caches_prefixes": False}, WORKS["prefill-512"])


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    dice = np.random.default_rng(1)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    matrix = gguf.quants.quantize(dice.standard_normal((4, 64), dtype=np.float32), q4_1)
    writer.add_tensor("blk.0.ffn_up.weight", matrix, raw_dtype=q4_1)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_in_other_blocks_have_the_same_values(shipped: Path, tmp_path: Path) -> None:
    assert in_blocks(shipped, "as shipped", tmp_path) == shipped
    rounded = in_blocks(shipped, "Q8_0", tmp_path)
    assert described(shipped) == "Q4_1" and described(rounded) == "Q8_0"
    before, after = gguf.GGUFReader(shipped), gguf.GGUFReader(rounded)
    assert after.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name
        values = gguf.quants.dequantize(old.data, old.tensor_type)
        rounded_values = gguf.quants.dequantize(new.data, new.tensor_type)
        np.testing.assert_allclose(rounded_values, values, atol=np.abs(values).max() / 127)
    with pytest.raises(RuntimeError, match="not as 'Q2_K'"):
        in_blocks(shipped, "Q2_K", tmp_path)


@pytest.mark.slow
def test_transformers_is_asked_for_a_batch() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answer = run_transformers.generate(model, [[1, 2, 3], [4, 5, 6]], 4)
    assert [len(stream) for stream in answer["arrivals_s"]] == [4, 4]
    logits_BTV = model(torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    firsts = [tokens[0] for tokens in answer["tokens"]]
    assert firsts == logits_BTV[:, -1].argmax(-1).tolist()


class FakeLLM:
    """Two deltas a stream, the second one of two tokens."""

    async def stream(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Delta]:
        assert params.greedy and params.ignore_eos and params.max_tokens == 3
        yield Delta(index=0, token_ids=[prompt[0]])
        yield Delta(index=0, token_ids=[8, 9])


def test_shoal_is_asked_for_all_streams_at_once() -> None:
    answer = asyncio.run(follow_all(FakeLLM(), [[1, 2], [3, 4]], 3))  # type: ignore[arg-type]
    assert answer["tokens"] == [[1, 8, 9], [3, 8, 9]]
    assert [len(stream) for stream in answer["arrivals_s"]] == [3, 3]
