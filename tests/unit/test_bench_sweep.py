"""From a few layers to all of them, and the limits that are set beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llama import TINY

from bench.extrapolation import Extrapolated, Whole, extrapolate
from bench.llama_shapes import LLAMA_SHAPES, write_checkpoints
from bench.ratios import Spread
from bench.roofline import Load, Rates, shape_in_blocks, shape_of
from bench.step_log import Step
from bench.sweep import best_of
from bench.sweep_points import (
    Point,
    Subject,
    decoding,
    head_ms,
    of_work,
    point_of,
    reading,
)
from bench.sweep_tables import points_table, record_of, wholes_table
from shoal.models.config import decoder_config
from shoal.weights.source import open_source, resolve
from shoal.weights.tokenizer import load_tokenizer

RATES = Rates(bytes_per_s=1e9, operations_per_s=1e12)


def test_a_line_through_a_few_layers_is_drawn_out_to_all() -> None:
    # 3 ms a layer, a head of 2 ms and 5 ms besides.
    whole = extrapolate({1: 10.0, 2: 13.0, 4: 19.0}, head_ms=2.0, vocabulary_scale=4, num_layers=16)
    assert whole.layer_ms == pytest.approx(3.0)
    assert (whole.head_ms, whole.rest_ms) == (8.0, pytest.approx(5.0))
    assert whole.ms == pytest.approx(16 * 3 + 8 + 5)
    assert whole.misfit == pytest.approx(0.0)


def test_a_point_off_the_line_is_told() -> None:
    whole = extrapolate({1: 10.0, 2: 26.0, 3: 30.0}, head_ms=0.0, vocabulary_scale=1, num_layers=3)
    # The line is 2 + 10 n: it has 12 where 10 was measured.
    assert whole.misfit == pytest.approx(0.2)
    with pytest.raises(ValueError, match="two numbers of layers"):
        extrapolate({4: 10.0}, head_ms=1.0, vocabulary_scale=1, num_layers=16)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-1b", 1_235_814_400), ("llama-3b", 3_212_749_824)]
)
def test_shapes_have_as_many_weights_as_was_published(name: str, parameters: int) -> None:
    shape = LLAMA_SHAPES[name]
    config = shape.config(num_layers=shape.num_layers, vocab_size=shape.vocab_size)
    held = shape_in_blocks(config, 8, 0.0)
    assert held.layer_weights + held.head_weights == parameters


def test_bytes_of_weights_in_blocks() -> None:
    config = TINY.config(num_layers=2, vocab_size=1000)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    norms, head = (2 * 2 + 1) * 64 * 4, 64 * 1000 * 1.0625
    assert shape_in_blocks(config, 8, 5.0).weight_bytes == 2 * layer * 1.0625 + norms + head
    assert shape_in_blocks(config, 4, 5.0).weight_bytes == 2 * layer * 0.625 + norms + head
    assert shape_in_blocks(config, 4, 5.0).attention_operations_per_key == 4 * 2 * 4 * 16


def test_checkpoints_share_their_files_and_are_whole(tmp_path: Path) -> None:
    paths = write_checkpoints(TINY, [1, 3], 500, tmp_path)
    for number, path in paths.items():
        files = resolve(str(path))
        source = open_source(files)
        model = decoder_config(source.config)
        # Every tensor that the index names is there, and none too many.
        assert len(source.names()) == 2 + 9 * number
        assert all(source.shape(name) for name in source.names())
        source.close()
        assert (model.num_layers, model.vocab_size, model.tied_head) == (number, 500, True)
        assert (
            shape_of(files, 1.0).layer_weights
            == shape_in_blocks(json.loads((path / "config.json").read_text()), 8, 1.0).layer_weights
        )
        tokenizer = load_tokenizer(files)
        assert tokenizer.decode(tokenizer.encode("a sea, é")) == "a sea, é"
    assert (paths[3] / "layer-0.safetensors").samefile(paths[1] / "layer-0.safetensors")


def test_answers_outlast_the_reading_of_all_prompts() -> None:
    # 256 prompts of 64 take ten steps of 1 792 tokens beside those that decode.
    assert decoding(256, 64, 24, 2048).new_tokens == 10 + 24 + 1
    assert decoding(1, 128, 24, 512).new_tokens == 1 + 24 + 1


def step(rows: int, chunks: int, started_s: float, ended_s: float) -> Step:
    return Step(
        num_chunks=chunks,
        load=Load(rows=rows, head_rows=chunks, keys=40, pairs=40),
        started_s=started_s,
        ended_s=ended_s,
        cpu_s=0.0,
        seconds={"output head": 0.002, "sampling": 0.001, "attention": 0.5},
        calls={},
    )


def test_decoding_is_timed_from_step_to_step_and_a_prompt_by_itself() -> None:
    steps = [step(64, 2, 0.0, 1.0), step(2, 2, 1.0, 1.5), step(2, 2, 2.0, 2.5)]
    decoded = of_work(decoding(2, 32, 2, 512), steps)
    assert (len(decoded.steps), decoded.seconds) == (2, [1.0])
    read = of_work(reading(8), [step(8, 1, 0.0, 0.25), step(1, 1, 1.0, 1.1)])
    assert read.seconds == [0.25]
    assert head_ms(steps) == pytest.approx(3.0)


def test_a_point_beside_its_limit() -> None:
    config = TINY.config(num_layers=2, vocab_size=1000)
    shape = shape_in_blocks(config, 8, 100.0)
    subject = Subject(model="tiny", num_layers=2, engine=None, shape=shape, step_tokens=512)  # type: ignore[arg-type]
    work = decoding(2, 20, 2, 512)
    taken = of_work(work, [step(2, 2, at, at + 0.1) for at in (0.0, 0.5, 1.1)])
    point: Point = point_of(subject, work, taken)
    assert point.ms == Spread(pytest.approx(550), pytest.approx(500), pytest.approx(600))
    assert (point.context, point.num_steps) == (20, 2)
    told = record_of(point, RATES)
    assert told["tokens_per_s"] == pytest.approx(2 / 0.55)
    # Memory binds: weights, and 40 keys of 100 bytes, at a byte a nanosecond.
    assert told["limit_tokens_per_s"] == pytest.approx(2e9 / (shape.weight_bytes + 4000))
    cells = [next(iter(column.cells)) for column in points_table("x", [point], RATES).columns]
    assert cells[-1] == "0% (memory)"
    whole = Whole(num_layers=10, layer_ms=1.0, head_ms=2.0, rest_ms=3.0, misfit=0.0)
    drawn = Extrapolated(model="tiny", work="decode-2", load=point.load, shape=shape, whole=whole)
    assert record_of(drawn, RATES)["ms"] == 15.0
    assert "not measured" in str(wholes_table([drawn], RATES).title)


def test_a_limit_is_the_best_that_was_read() -> None:
    other = Rates(bytes_per_s=2e9, operations_per_s=1e11)
    assert best_of([RATES, other]) == Rates(bytes_per_s=2e9, operations_per_s=1e12)
