"""What a journal keeps of a response, and what the server asks of one; and the journal of none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from shoal.engine.api import Delta
from shoal.request import SamplingParams

Entry = tuple[int, Delta]
"""A choice of a response, and what one step added to it."""

State = Literal["open", "interrupted", "finished", "failed"]
"""`interrupted`: its client left; it goes on when somebody asks for it."""

Then = Callable[[bool], None]
"""Called in the event loop, in the order of the calls: whether all of it is kept so far."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a response: all that is needed to compute it and to write it down again.

    `params` are by prompt, with their seed and `max_tokens` filled in. `key` is the client's
    own name for the request, if it gave one. `model` is the journal's.
    """

    response_id: str
    endpoint: str
    model: str
    created_s: int
    body: dict[str, Any]
    prompts: list[list[int]]
    params: list[SamplingParams]
    priority: int = 0
    key: str | None = None

    @property
    def num_samples(self) -> int:
        """Of each prompt: choice `i` is sample `i % num_samples` of prompt `i // num_samples`."""
        return self.params[0].n

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.num_samples


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A response as the journal has it. `error` says why it failed."""

    accepted: Accepted
    state: State
    error: str | None
    entries: list[Entry]


class Journal(Protocol):
    """Called from one event loop, which it never blocks; what fails is told by `trouble`."""

    @property
    def model(self) -> str:
        """What answers here: a response of another model or with other weights cannot go on."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why nothing is kept at the moment, and since when; None if all is well."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether a response that nobody follows can be found again."""
        ...

    def accept(self, accepted: Accepted, then: Then) -> None: ...

    def append(self, response_id: str, first: int, entries: Sequence[Entry], then: Then) -> None:
        """`first` is the number of entries before these."""
        ...

    def mark(
        self, response_id: str, state: State, then: Then, *, error: str | None = None
    ) -> None: ...

    async def find(self, name: str) -> Kept | None:
        """By its id or its client's key. None if it is unknown, expired, or was not kept whole."""
        ...

    async def open_ids(self) -> list[str]:
        """Responses that an earlier server left unfinished, oldest first."""
        ...


class NoJournal:
    """Keeps nothing: a response is gone with the last who follows it."""

    model = ""
    trouble: str | None = None
    is_kept = False

    def accept(self, accepted: Accepted, then: Then) -> None:
        del accepted
        then(False)

    def append(self, response_id: str, first: int, entries: Sequence[Entry], then: Then) -> None:
        del response_id, first, entries
        then(False)

    def mark(self, response_id: str, state: State, then: Then, *, error: str | None = None) -> None:
        del response_id, state, error
        then(False)

    async def find(self, name: str) -> Kept | None:
        del name
        return None

    async def open_ids(self) -> list[str]:
        return []
