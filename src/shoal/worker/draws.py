"""The tokens that a step draws: one for a chunk, and one more for each guess that was right.

N rows of logits, V vocabulary.
"""

from __future__ import annotations

from itertools import takewhile

import torch
from msgspec import structs

from shoal.compute.penalties import needs_adjusting
from shoal.compute.sampler import sample, token_logprobs
from shoal.messages import Chunk, Sampling, TokenLogprobs
from shoal.worker.batch import Batch


class Draws:
    """Which of a batch's rows that are read are drawn from, and what came of it. `rows` [N]."""

    def __init__(self, batch: Batch) -> None:
        self.rows: list[int] = []
        self._samplings: list[Sampling] = []
        self._chunks: list[tuple[Chunk, int]] = []
        """With the first of their rows among these."""
        self._drawn: dict[int, tuple[list[int], list[TokenLogprobs]]] = {}
        for chunk, last in zip(batch.chunks, batch.last_reads, strict=True):
            if chunk.sampling is not None:
                self._chunks.append((chunk, len(self.rows)))
                self.rows += range(last - chunk.num_drafted, last + 1)
                self._samplings += _samplings(chunk, chunk.sampling)

    def draw(self, logits_NV: torch.Tensor) -> None:
        """From float32 logits, which are overwritten.

        Every row is drawn at once, as if the guesses before it were right; those behind the first
        that was not are dropped.
        """
        scored = [i for i, s in enumerate(self._samplings) if s.num_logprobs is not None]
        # Scores are of the model's own logits. Copied are only rows of which these do not stay.
        adjusted = [i for i in scored if needs_adjusting(self._samplings[i])]
        own_NV = logits_NV[adjusted] if adjusted else None
        tokens = sample(logits_NV, self._samplings)
        if own_NV is not None:
            logits_NV[adjusted] = own_NV
        scores = dict(zip(scored, self._scores(scored, logits_NV, tokens), strict=True))
        for chunk, first in self._chunks:
            guesses = chunk.draft
            drawn = tokens[first : first + len(guesses) + 1]
            stop = first + _num_right(guesses, drawn) + 1
            kept = [scores[i] for i in range(first, stop) if i in scores]
            self._drawn[chunk.request_id] = (tokens[first:stop], kept)

    def of(self, chunk: Chunk) -> tuple[list[int], list[TokenLogprobs]]:
        """Its tokens and their log-probabilities; neither where nothing was drawn for it."""
        return self._drawn.get(chunk.request_id, ([], []))

    def _scores(
        self, rows: list[int], logits_NV: torch.Tensor, tokens: list[int]
    ) -> list[TokenLogprobs]:
        if not rows:
            return []
        counts = [self._samplings[i].num_logprobs or 0 for i in rows]
        return token_logprobs(logits_NV, rows, [tokens[i] for i in rows], counts)


def _samplings(chunk: Chunk, sampling: Sampling) -> list[Sampling]:
    """How each row is drawn from: the first as the chunk says, the others further on."""
    guesses = chunk.draft
    return [sampling] + [
        structs.replace(
            sampling,
            position=sampling.position + number,
            output_history=sampling.output_history + guesses[:number],
        )
        for number in range(1, len(guesses) + 1)
    ]


def _num_right(guesses: list[int], drawn: list[int]) -> int:
    pairs = zip(guesses, drawn, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
