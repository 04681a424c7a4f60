"""From a sample's tokens to the text a client may see, stop strings included."""

from __future__ import annotations

from shoal.weights.tokenizer import TextStream


class Detokenizer:
    """Holds back what may yet turn out to be the start of a stop string."""

    def __init__(self, stream: TextStream, stop: tuple[str, ...]) -> None:
        self._stream = stream
        self._stop = stop
        self._held = ""
        self.stop_match: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that can be shown now; once `stop_match` is set, no more will come.

        A stop string counts only in text that begins while `may_stop`.
        """
        new_text = self._stream.push(token_id)
        return self._release(new_text) if self._stop and may_stop else new_text

    def flush(self) -> str:
        """The rest: incomplete characters, and what was held back in vain."""
        if self.stop_match is not None:
            return ""
        rest = self._stream.flush()
        shown = self._release(rest) if self._stop else rest
        held, self._held = self._held, ""
        return shown + held

    def _release(self, new_text: str) -> str:
        text = self._held + new_text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            at, self.stop_match = min(found)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
