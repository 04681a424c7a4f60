"""How far one request has come: the only mutable state of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from shoal.messages import TokenLogprobs
from shoal.request import Request
from shoal.schedule.drafting import Drafting
from shoal.schedule.prefix import HashChain

Rank = tuple[int, float, int]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its progress, which is one number: `num_computed` of its `tokens`.

    `tokens` are the prompt's, then those emitted; `num_planned` of them are computed or in a
    plan. `num_in_flight` counts the outstanding plans that compute a chunk of it; until they have
    landed its blocks stay held even after it has ended. `preempt_reason` is set when it has to be
    preempted as soon as they have.
    """

    request: Request
    chain: HashChain
    tokens: list[int]
    rank: Rank
    banned_ids: tuple[int, ...]
    state: State = State.WAITING
    num_computed: int = 0
    num_shared: int = 0
    """Tokens in blocks that it found in the prefix cache."""
    block_ids: list[int] = field(default_factory=list)
    num_planned: int = 0
    num_in_flight: int = 0
    preempt_reason: str | None = None
    prompt_computed: bool = False
    """Computed at least once: stays True through preemptions."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache when it first ran; None before that."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: bytes = b""
    drafting: Drafting | None = None
    """Of whom tokens are guessed."""

    @classmethod
    def of(cls, request: Request, chain: HashChain, drafting: Drafting | None = None) -> Sequence:
        return cls(
            request=request,
            chain=chain,
            tokens=request.prompt_tokens + request.emitted_tokens,
            rank=(request.priority, request.arrival_s, request.request_id),
            banned_ids=tuple(sorted(request.stop_ids)) if request.params.min_tokens else (),
            drafting=drafting,
        )

    def __lt__(self, other: Sequence) -> bool:
        """Whether it is served before another."""
        return self.rank < other.rank

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def num_emitted(self) -> int:
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def in_flight(self) -> bool:
        return self.num_in_flight > 0

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    @property
    def num_unplanned(self) -> int:
        """Those of them that are in no plan yet."""
        return len(self.tokens) - self.num_planned

    @property
    def generates(self) -> bool:
        return not self.request.pooling and self.request.max_tokens > 0

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be collected."""
        return self.reports_prompt_logprobs and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def reports_prompt_logprobs(self) -> bool:
        """They come with the first token, which may have been emitted in an earlier life."""
        request = self.request
        return request.params.prompt_logprobs is not None and not request.emitted_tokens

    @property
    def may_skip_prefix(self) -> bool:
        """Whether a cached prefix serves it: not if something of every prompt token is wanted."""
        request = self.request
        return request.splittable and not request.pooling and not self.needs_prompt_logprobs

    def check(self, block_size: int) -> None:
        """Assert what must hold while it is open."""
        if self.state is State.WAITING:
            assert not self.block_ids and not self.num_computed and not self.in_flight
            return
        assert self.num_missing > 0, f"{self.request_id} has nothing to compute"
        assert self.num_computed <= self.num_planned
        assert self.num_planned <= len(self.block_ids) * block_size

    def restart(self) -> None:
        """Forget what is computed and keep what is known; its blocks must be released."""
        assert not self.block_ids
        self.state = State.WAITING
        self.num_computed = 0
        self.num_shared = 0
        self.num_planned = 0
        self.preempt_reason = None
        self.pooled = b""
