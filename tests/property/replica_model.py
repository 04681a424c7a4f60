"""A replica without tensors: its next token depends on every token before it, through the cache.

Each cache slot holds a hash of the whole token prefix up to it, so that a block that is shared,
overwritten or freed wrongly is seen at the first step that reads it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property

from shoal.messages import Chunk, ChunkResult, Plan, Sampling, StepResult, TokenLogprobs
from shoal.request import FinishReason, Request
from shoal.schedule.scheduler import Scheduler

VOCAB_SIZE = 7
EMPTY_PREFIX = 0


def extend_hash(prefix_hash: int, token_id: int) -> int:
    return hash((prefix_hash, token_id))


def draw(prefix_hash: int, seed: int, position: int, banned_ids: tuple[int, ...]) -> int:
    choice = hash((prefix_hash, seed, position))
    if not banned_ids:
        return choice % VOCAB_SIZE
    allowed = [token_id for token_id in range(VOCAB_SIZE) if token_id not in banned_ids]
    return allowed[choice % len(allowed)]


def score(prefix_hash: int, target: int) -> TokenLogprobs:
    return TokenLogprobs(-float(hash((prefix_hash, target)) % 1000), [], [])


def calm_run(request: Request) -> tuple[list[int], FinishReason]:
    """What the request yields when it has the replica to itself and nothing ever goes wrong."""
    prefix_hash = EMPTY_PREFIX
    for token_id in request.prompt_tokens:
        prefix_hash = extend_hash(prefix_hash, token_id)
    emitted: list[int] = []
    while len(emitted) < request.max_tokens:
        may_stop = len(emitted) >= request.params.min_tokens
        banned_ids = () if may_stop else tuple(request.stop_ids)
        position = len(request.prompt_tokens) + len(emitted)
        token_id = draw(prefix_hash, request.seed, position, banned_ids)
        emitted.append(token_id)
        prefix_hash = extend_hash(prefix_hash, token_id)
        if may_stop and token_id in request.stop_ids:
            return emitted, FinishReason.STOP
    return emitted, FinishReason.LENGTH


class Guesser:
    """A Drafter that knows the calm run, and says it with mistakes."""

    def __init__(self, request: Request) -> None:
        self._request = request

    @cached_property
    def _calm(self) -> list[int]:
        return calm_run(self._request)[0]

    def propose(self, tokens: list[int], at_most: int) -> list[int]:
        if at_most <= 0:
            return []
        first = len(tokens) - len(self._request.prompt_tokens)
        guesses = (self._calm[first:] + [0] * at_most)[:at_most]
        chance = hash((self._request.seed, *tokens))
        return [
            (token_id + (chance >> (2 * number)) % 4 // 3) % VOCAB_SIZE
            for number, token_id in enumerate(guesses)
        ]


def guess_well(scheduler: Scheduler, requests: Iterable[Request]) -> None:
    """Texts are too short here to repeat themselves."""
    for request in requests:
        drafting = scheduler._alive[request.request_id].drafting
        if drafting is not None:
            drafting.drafter = Guesser(request)


def calm_prompt_logprobs(request: Request) -> list[TokenLogprobs]:
    scores = []
    prefix_hash = EMPTY_PREFIX
    for token_id, target in zip(request.prompt_tokens, request.prompt_tokens[1:], strict=False):
        prefix_hash = extend_hash(prefix_hash, token_id)
        scores.append(score(prefix_hash, target))
    return scores


def pool(tokens: list[int]) -> bytes:
    """A stand-in for summed hidden states; small integers, so that any order adds up the same."""
    return array("f", [float(len(tokens)), float(sum(tokens))]).tobytes()


class ReplicaModel:
    """Runs plans as a worker would, and checks each against what it has stored."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], int] = {}

    def lose_cache(self) -> None:
        self._slots.clear()

    def run(self, plan: Plan) -> StepResult:
        results = [self._run_chunk(chunk) for chunk in plan.chunks]
        return StepResult(epoch=plan.epoch, step=plan.step, results=results)

    def read_prefix(self, chunk: Chunk, length: int) -> list[int | None]:
        """What the chunk's blocks hold for positions [0, length)."""
        return [self._slots.get(self._slot(chunk, position)) for position in range(length)]

    def _run_chunk(self, chunk: Chunk) -> ChunkResult:
        end = chunk.start + len(chunk.tokens)
        num_covered = end + chunk.is_cached
        assert len(chunk.block_ids) == -(-num_covered // self._block_size), "blocks do not fit"
        hashes = self._write(chunk)
        targets = zip(hashes, chunk.score_targets, strict=False)
        return ChunkResult(
            request_id=chunk.request_id,
            token_ids=_draws(chunk, hashes),
            prompt_logprobs=[score(prefix_hash, target) for prefix_hash, target in targets],
            pooled=pool(chunk.tokens) if chunk.pooling else b"",
        )

    def _write(self, chunk: Chunk) -> list[int]:
        prefix_hash = EMPTY_PREFIX
        if chunk.start > 0:
            prefix_hash = self._slots[self._slot(chunk, chunk.start - 1)]
        hashes = []
        for position, token_id in enumerate(chunk.tokens, start=chunk.start):
            prefix_hash = extend_hash(prefix_hash, token_id)
            self._slots[self._slot(chunk, position + chunk.is_cached)] = prefix_hash
            hashes.append(prefix_hash)
        return hashes

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.block_ids[position // self._block_size], position % self._block_size


def _draws(chunk: Chunk, hashes: list[int]) -> list[int]:
    """A token after the last that is known, and after each guess that was right."""
    if chunk.sampling is None:
        return []
    num_known = len(chunk.tokens) - chunk.num_drafted
    draws: list[int] = []
    for index, prefix_hash in enumerate(hashes[num_known - 1 :]):
        draws.append(_sample(prefix_hash, chunk.sampling, index))
        if draws != chunk.tokens[num_known : num_known + len(draws)]:
            break
    return draws


def _sample(prefix_hash: int, sampling: Sampling, index: int) -> int:
    return draw(prefix_hash, sampling.seed, sampling.position + index, sampling.banned_ids)
