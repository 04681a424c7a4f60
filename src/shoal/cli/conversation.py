"""A conversation and how much of it the model sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


class Conversation:
    """Turns of user and assistant, behind an optional system message.

    The whole of it is sent each time: the engine finds its prefix in the KV cache again.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self._turns

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    def ask(self, question: str) -> None:
        self._turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """An answer of no text is dropped, with its question: templates refuse two in a row."""
        if text.strip():
            self._turns.append({"role": "assistant", "content": text})
        else:
            self.take_back()

    def take_back(self) -> None:
        """Forget the question that has no answer."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        self._turns.clear()

    def drop_oldest(self, fits: Callable[[list[Message]], bool]) -> int:
        """Forget the oldest questions with their answers until the rest fits.

        The last question always stays. Returns how many exchanges went.
        """
        dropped = 0
        while len(self._turns) > 2 and not fits(self.messages):
            del self._turns[:2]
            dropped += 1
        return dropped
