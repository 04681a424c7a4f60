"""One chat: reads questions and commands, prints answers, survives Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing

from rich.markup import escape

from shoal.cli.chat_backend import ChatBackend
from shoal.cli.console import err_console, fail, note, write
from shoal.cli.conversation import Conversation, Message
from shoal.errors import CallerError, RetryError

# A prompt must leave at least this part of the context to the answer.
ANSWER_PART = 4

HELP = """/system TEXT   give the model a role, from the next question on; no TEXT shows it
/reset         forget the conversation
/help          this
/exit          leave; so does Ctrl-D
Ctrl-C         stop the answer"""


class ChatSession:
    def __init__(self, backend: ChatBackend, conversation: Conversation, max_tokens: int) -> None:
        self._backend = backend
        self._conversation = conversation
        self._max_tokens = max_tokens
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Until the end of the input or /exit."""
        for line in self._lines():
            text = line.strip()
            if text.startswith("/"):
                if self._command(text) == "exit":
                    return
            elif text:
                self._respond(text)

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from sys.stdin
            return
        # Gives input() its line editing and history; not on every platform.
        import readline  # noqa: F401, PLC0415

        while True:
            try:
                yield input(">>> ")
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                note("Ctrl-D or /exit leaves")

    def _command(self, text: str) -> str:
        name, _, rest = text[1:].partition(" ")
        if name in ("exit", "quit", "bye"):
            return "exit"
        if name == "reset":
            self._conversation.reset()
            note("the conversation is forgotten")
        elif name == "system":
            self._set_system(rest.strip())
        elif name in ("help", "?"):
            err_console().print(escape(HELP))
        else:
            fail(f"there is no command /{name}; /help lists them")
        return name

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        note(f"system: {self._conversation.system or '(none)'}")

    def _respond(self, question: str) -> None:
        self._conversation.ask(question)
        pieces: list[str] = []
        try:
            self._make_room()
            with closing(self._backend.answer(self._conversation.messages)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            write("\n")
            note("stopped")
        except (CallerError, RetryError) as error:
            if not self._interactive:
                raise
            fail(error.message)
        else:
            write("\n")
        self._conversation.answer("".join(pieces))

    def _make_room(self) -> None:
        """Forget the oldest exchanges that leave no room for an answer, and say so."""
        max_context = self._backend.max_context
        if max_context is None:
            return
        limit = max_context - min(self._max_tokens, max_context // ANSWER_PART)

        def fits(messages: list[Message]) -> bool:
            count = self._backend.num_tokens(messages)
            return count is None or count <= limit

        dropped = self._conversation.drop_oldest(fits)
        if dropped:
            exchanges = "exchange" if dropped == 1 else f"{dropped} exchanges"
            note(f"the context of {max_context} tokens is full: forgot the oldest {exchanges}")
