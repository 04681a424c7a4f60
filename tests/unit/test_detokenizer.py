"""Text on its way to a client: stop strings across borders are never leaked."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.detokenizer import Detokenizer


class Pieces:
    """A text stream whose tokens are the pieces of a text; the last comes with the flush."""

    def __init__(self, pieces: list[str], flushed: str = "") -> None:
        self.pieces = pieces
        self.flushed = flushed

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.flushed


def run(pieces: list[str], stop: tuple[str, ...], flushed: str = "") -> tuple[str, str | None]:
    detokenizer = Detokenizer(Pieces(pieces, flushed), stop)  # type: ignore[arg-type]
    shown = ""
    for token_id in range(len(pieces)):
        shown += detokenizer.push(token_id)
        if detokenizer.stop_match is not None:
            return shown, detokenizer.stop_match
    return shown + detokenizer.flush(), detokenizer.stop_match


def test_a_stop_string_inside_one_token_ends_the_text_before_it() -> None:
    assert run(["one. two"], (". ",)) == ("one", ". ")


def test_a_stop_string_across_tokens_is_not_leaked() -> None:
    detokenizer = Detokenizer(Pieces(["a\n", "\nUs", "er:", " b"]), ("\n\nUser:",))  # type: ignore[arg-type]
    assert [detokenizer.push(i) for i in range(3)] == ["a", "", ""]
    assert detokenizer.stop_match == "\n\nUser:"


def test_a_false_start_is_shown_after_all() -> None:
    assert run(["a#", "#b", "##"], ("###",)) == ("a##b##", None)


def test_a_stop_string_may_appear_only_at_the_flush() -> None:
    assert run(["say st"], ("stop",), flushed="op") == ("say ", "stop")


def test_the_first_of_several_stop_strings_wins() -> None:
    assert run(["abcdef"], ("de", "bc")) == ("a", "bc")


def test_text_before_min_tokens_cannot_stop() -> None:
    detokenizer = Detokenizer(Pieces(["x.", "y."]), (".",))  # type: ignore[arg-type]
    assert detokenizer.push(0, may_stop=False) == "x."
    assert detokenizer.push(1) == "y"
    assert detokenizer.stop_match == "."


@given(
    text=st.text("ab", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_however_text_is_cut_the_shown_part_ends_before_the_first_stop(
    text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, match = run(pieces, stop)
    # A piece is judged whole, so of overlapping matches the first to be complete wins.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert (match is None) == (not ends)
    if match is None:
        assert shown == text
    else:
        assert text.startswith(shown + match)
        assert not any(s in shown for s in stop)
