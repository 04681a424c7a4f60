"""Tokens in one by one, text out as soon as it is sure: joined, it is the text of all tokens.

tokenizers' DecodeStream comes close, but raises when a byte-fallback run that was valid UTF-8 is
continued by a byte that makes all of it invalid, and it never gives the incomplete end.
"""

from __future__ import annotations

from collections.abc import Callable

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """`decode` turns token ids into text; those that `is_silent` says so add nothing to it.

    Ids in `byte_tokens` stand for one byte each, and a run of them is decoded as a whole: text
    waits for the end of the run.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        is_silent: Callable[[int], bool],
        byte_tokens: frozenset[int],
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._byte_tokens = byte_tokens
        # Decoding looks at neighbours (leading spaces, split characters), so the tokens last shown
        # are kept as context. `_window` is that context, then the tokens not shown yet.
        self._window: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often one token's, sometimes none."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._byte_tokens:
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """The rest, with a replacement character for what stayed incomplete; then it is empty."""
        return self._show(self._decode(self._window)) if self._window else ""

    def _show(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if new:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._context_text = self._decode(self._window)
        return new
