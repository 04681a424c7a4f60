"""A smaller model that guesses at what a larger one will draw."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from msgspec import structs

from shoal.config import EngineConfig
from shoal.errors import ConfigError
from shoal.messages import Chunk, Plan
from shoal.schedule.foresight import GuessWanted
from shoal.weights.source import resolve
from shoal.weights.tokenizer import Tokenizer, load_tokenizer
from shoal.worker.worker import Worker, load_worker

_MOST_AT_ONCE = 512
"""Tokens of a text that are read in a call: a step must not wait until all of a prompt is."""

_CACHE_BYTES = 2**28


@dataclass(slots=True)
class _Text:
    """What the cache holds of a sequence. Its first `num_sure` tokens cannot change any more."""

    tokens: list[int] = field(default_factory=list)
    num_sure: int = 0
    block_ids: list[int] = field(default_factory=list)

    def num_common(self, tokens: list[int]) -> int:
        stop = min(len(self.tokens), len(tokens))
        number = min(self.num_sure, stop)
        while number < stop and self.tokens[number] == tokens[number]:
            number += 1
        return number


class DraftModel:
    """Draws as the larger model will: with the same seeds, so that chance decides alike in both.

    The texts it was asked about last stay in a cache of its own. Not thread-safe.
    """

    def __init__(self, worker: Worker, *, block_size: int, vocab_size: int) -> None:
        """`vocab_size` is the larger model's: what it has not is not guessed."""
        self._worker = worker
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._free = list(range(worker.num_blocks))
        self._texts: dict[int, _Text] = {}  # what was asked about longest ago first

    def guess(self, wanted: list[GuessWanted]) -> dict[int, list[int]]:
        """Guesses by request; none for a text that is too long, or not read as far yet."""
        guesses: dict[int, list[int]] = {each.request_id: [] for each in wanted}
        for number in range(max((each.number for each in wanted), default=0)):
            asked = [
                each
                for each in wanted
                if each.number > number and len(guesses[each.request_id]) == number
            ]
            chunks = [self._chunk(each, guesses[each.request_id], guesses.keys()) for each in asked]
            for request_id, token in self._drawn([chunk for chunk in chunks if chunk]):
                guesses[request_id].append(token)
        return guesses

    def _drawn(self, chunks: list[Chunk]) -> list[tuple[int, int]]:
        if not chunks:
            return []
        results = self._worker.execute(Plan(epoch=0, step=0, chunks=chunks)).results
        return [
            (result.request_id, token)
            for result in results
            for token in result.token_ids
            if token < self._vocab_size
        ]

    def _chunk(self, wanted: GuessWanted, guess: list[int], kept: Set[int]) -> Chunk | None:
        """What of a text and the guesses behind it is not in the cache; None if it does not fit."""
        tokens = wanted.tokens + guess
        text = self._texts.pop(wanted.request_id, None) or _Text()
        self._texts[wanted.request_id] = text
        start = min(text.num_common(tokens), len(tokens) - 1)
        stop = min(start + _MOST_AT_ONCE, len(tokens))
        if stop >= self._worker.max_context or not self._hold(text, stop, kept):
            return None
        text.tokens[start:] = tokens[start:stop]
        text.num_sure = min(stop, len(wanted.tokens))
        is_read = stop == len(tokens)
        sampling = structs.replace(
            wanted.sampling,
            position=wanted.sampling.position + len(guess),
            output_history=wanted.sampling.output_history + guess,
        )
        return Chunk(
            request_id=wanted.request_id,
            start=start,
            tokens=tokens[start:stop],
            block_ids=text.block_ids.copy(),
            sampling=sampling if is_read else None,
        )

    def _hold(self, text: _Text, num_tokens: int, kept: Set[int]) -> bool:
        """Blocks for so many tokens, at the cost of the texts that were not asked about lately."""
        num_missing = -(-num_tokens // self._block_size) - len(text.block_ids)
        for request_id in [one for one in self._texts if one not in kept]:
            if len(self._free) >= num_missing:
                break
            self._free += self._texts.pop(request_id).block_ids
        if num_missing > len(self._free):
            return False
        text.block_ids += [self._free.pop() for _ in range(num_missing)]
        return True


def check_draft_model(config: EngineConfig, tokenizer: Tokenizer) -> None:
    """Before anything large is loaded. `tokenizer` is the larger model's.

    Raises SourceError, and ConfigError for a model that does not go with it.
    """
    if config.draft_model is None:
        return
    files = resolve(config.draft_model)
    if not load_tokenizer(files).has_tokens_of(tokenizer):
        raise ConfigError(
            f"draft model {files.name} has other tokens than {config.model}: "
            f"take one of its family",
            param="draft_model",
        )


def load_draft_model(config: EngineConfig, tokenizer: Tokenizer) -> DraftModel | None:
    """The one that `config` names, once it has been checked. Raises OutOfMemory, SourceError."""
    if config.draft_model is None:
        return None
    own_config = structs.replace(
        config,
        model=config.draft_model,
        dtype="auto",
        quantize="auto",
        kv_dtype="auto",
        max_context=None,
        kv_memory_bytes=_CACHE_BYTES,
    )
    worker = load_worker(resolve(config.draft_model), own_config)
    return DraftModel(worker, block_size=config.block_size, vocab_size=tokenizer.vocab_size)
