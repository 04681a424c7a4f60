"""The pure parts of bench/: prompts, figures from arrivals, ratios, sides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.compare import results
from bench.peers.process import ROOT
from bench.ratios import in_turn, ratios, spread_of
from bench.sides import parse_side, python_path, unpacked
from bench.works import WORKS, Work, decode_rate, figure_of, prompts_of, tokens_in_common

TEXT = list(range(2000))


def test_no_two_prompts_begin_alike() -> None:
    firsts = [
        prompt[0]
        for turn in range(4)
        for work in (WORKS["decode-32"],)
        for prompt in prompts_of(work, turn, TEXT)
    ]
    assert len(set(firsts)) == len(firsts) == 4 * 32
    assert {len(p) for p in prompts_of(WORKS["prefill-512"], 3, TEXT)} == {512}


def test_a_text_that_is_too_short_for_a_prompt() -> None:
    with pytest.raises(ValueError, match="100 tokens of text hold no prompt of 128"):
        prompts_of(WORKS["decode-1"], 0, TEXT[:100])


def test_decoding_is_counted_while_every_stream_runs() -> None:
    early = [1.0, 2.0, 3.0, 4.0]
    late = [2.5, 3.5, 4.5, 5.5]
    # From 2.5 to 4.0 come 3.0, 4.0 and 3.5.
    assert decode_rate([early, late]) == pytest.approx(3 / 1.5)


def test_streams_that_never_ran_together_have_no_rate() -> None:
    with pytest.raises(ValueError, match=r"ended 1\.000 s before"):
        decode_rate([[1.0, 2.0], [3.0, 4.0]])


def test_figures_of_a_prompt() -> None:
    assert figure_of(WORKS["prefill-512"], [[0.5]]) == pytest.approx(1024)
    assert figure_of(WORKS["cached-512"], [[0.5]]) == pytest.approx(500)


def test_tokens_that_did_not_come_are_an_error() -> None:
    work = Work(name="two", figure="decode", num_streams=2, prompt_tokens=4, new_tokens=3)
    with pytest.raises(ValueError, match=r"2 streams for 3 tokens each, but \[3, 2\] came"):
        figure_of(work, [[1.0, 2.0, 3.0], [1.0, 2.0]])


def test_tokens_in_common() -> None:
    assert tokens_in_common([1, 2, 3], [1, 2, 4]) == 2
    assert tokens_in_common([1, 2, 3], [1, 2]) == 2
    assert tokens_in_common([1], [2]) == 0


def test_ratios_are_of_one_round() -> None:
    # The second round was slow for both: the ratio does not know.
    spread = ratios([20.0, 10.0, 21.0], [10.0, 5.0, 10.0])
    assert spread.median == 2.0
    assert (spread.lowest, spread.highest) == (2.0, 2.1)
    with pytest.raises(ValueError, match="2 rounds cannot be set beside 1"):
        ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no rounds"):
        spread_of([])


def test_everyone_begins_a_round_once() -> None:
    assert [in_turn(["a", "b", "c"], turn) for turn in range(3)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_a_side_and_its_settings() -> None:
    side = parse_side("HEAD~1 quantize=int8 max_running=8 OMP_WAIT_POLICY=passive")
    assert side.revision == "HEAD~1"
    assert side.options == {"quantize": "int8", "max_running": 8}
    assert side.environment == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("text", ["", "quantize=int8", "HEAD int8", "HEAD =8"])
def test_what_is_no_side(text: str) -> None:
    with pytest.raises(ValueError, match=r"revision|name=value"):
        parse_side(text)


def test_a_comparison_has_both_sides_in_it() -> None:
    figures = {"decode-1": {"before": [10.0, 12.0, 11.0], "after": [20.0, 18.0, 22.0]}}
    table, (record,) = results(figures)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == [
        "decode-1, tokens/s",
        "11.0",
        "10.0 to 12.0",
        "20.0",
        "18.0 to 22.0",
        "2.000x",
        "1.500 to 2.000",
    ]
    assert (record["before"], record["gain"]) == ([10.0, 12.0, 11.0], 2.0)


def test_a_revision_is_unpacked_and_the_working_tree_is_not(tmp_path: Path) -> None:
    source = unpacked(parse_side("HEAD"), tmp_path)
    assert source == tmp_path / "src" and (source / "shoal" / "llm.py").is_file()
    assert unpacked(parse_side("."), tmp_path) == ROOT / "src"
    with pytest.raises(RuntimeError, match="no-such-revision"):
        unpacked(parse_side("no-such-revision"), tmp_path)


def test_a_side_has_its_own_source_first() -> None:
    side = parse_side("HEAD PYTHONPATH=kernels")
    assert python_path(Path("src"), side) == os.pathsep.join(("src", "kernels"))
    assert python_path(Path("src"), parse_side("HEAD")) == "src"
