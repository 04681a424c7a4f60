"""What the head of a replica and its workers say to each other, and what the engine reports.

A plan holds everything a step needs: workers keep weights and KV cache, never a request's state.
That is why recovery can send a request anywhere by sending its next plan there.
"""

from __future__ import annotations

import msgspec

from shoal.request import FinishReason


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the last stage draws one token; its randomness is a function of (seed, position).

    `position` is the index of the drawn token in the sequence. `banned_ids` may not be drawn
    (stop tokens before `min_tokens`). The histories are filled in only when a penalty needs them.
    `num_logprobs` is None for none, else the number of alternatives. Behind drafted tokens it says
    how the first is drawn; for those after it position and output history move on.
    """

    seed: int
    position: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    banned_ids: tuple[int, ...] = ()
    prompt_history: list[int] = []
    output_history: list[int] = []
    num_logprobs: int | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request's part of a step: compute `tokens` at positions `start`, `start + 1`, …

    `block_ids` covers positions [0, start + len(tokens)). `sampling` is set when the last
    token's logits are to be sampled. The last `num_drafted` tokens are guesses at what will be
    drawn: then a token is drawn after the one before them, and after each of them that was right.
    `score_targets[i]` is the prompt token that follows `tokens[i]`: prompt log-probabilities are
    asked for where it is set. `is_cached`: the cache holds the one token already, in a block that
    others may read. Only its logits are wanted: it is stored in the next token's place, which
    `block_ids` covers too, and which the next token will take.
    """

    request_id: int
    start: int
    tokens: list[int]
    block_ids: list[int]
    sampling: Sampling | None = None
    num_drafted: int = 0
    score_targets: list[int] = []
    num_prompt_logprobs: int = 0
    pooling: bool = False
    is_cached: bool = False

    @property
    def draft(self) -> list[int]:
        """The guesses."""
        return self.tokens[len(self.tokens) - self.num_drafted :]


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan", forbid_unknown_fields=True):
    """What one step computes."""

    epoch: int
    step: int
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chosen token's log-probability and the best alternatives, best first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class ChunkResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the last stage made of one chunk. `pooled` is float32, the sum over its tokens.

    `token_ids` are those drawn: the drafted tokens that were right, then one more. `logprobs` is
    parallel to them, or empty.
    """

    request_id: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    pooled: bytes = b""


class StepResult(
    msgspec.Struct, frozen=True, kw_only=True, tag="step_result", forbid_unknown_fields=True
):
    epoch: int
    step: int
    results: list[ChunkResult]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One token of one request, if there is one, and the end when it is the end.

    A step that drew several tokens is as many events, as if they had come one at a time.
    `prompt_logprobs` and `pooled` are complete, and come once: with the step that finished the
    prompt. Entry i of `prompt_logprobs` scores prompt token i + 1.
    """

    request_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None
    num_cached_tokens: int = 0
