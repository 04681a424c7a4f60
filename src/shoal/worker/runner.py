"""Runs a plan's chunks through a model: the arithmetic of one step.

R rows that somebody reads, N of them that are drawn from, V vocabulary, E hidden width; the other
letters are those of `attention.py`.
"""

from __future__ import annotations

import torch
from msgspec import structs

from shoal.compute.attention import paged_attention
from shoal.compute.sampler import token_logprobs
from shoal.messages import Chunk, ChunkResult, TokenLogprobs
from shoal.models.decoder import Decoder
from shoal.models.encoder import Encoder
from shoal.worker.batch import Batch
from shoal.worker.draws import Draws
from shoal.worker.kv_cache import KVCache

# Prompt log-probabilities need logits of every row; so many rows at a time bound the memory.
_SCORED_ROWS = 64


class PagedAttend:
    """What the model calls in each layer: store this step's keys and values, then attend."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self._cache = cache
        self._batch = batch
        self.native_step = cache.native_step(batch)

    def __call__(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        places = self._batch.places
        keys, values = self._cache.write(layer, places.slots_T, k_TGD, v_TGD)
        return paged_attention(
            q_THD, keys, values, places.groups, scale=scale, window=window, softcap=softcap
        )


class DecoderRunner:
    """One shard of a decoder with its cache."""

    def __init__(self, decoder: Decoder, cache: KVCache, *, block_size: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._block_size = block_size

    def run(self, chunks: list[Chunk]) -> list[ChunkResult]:
        """A whole model's step: embed, all layers, sample."""
        batch = Batch(chunks, self._block_size)
        x_RE = self.forward(batch, self._decoder.embed(batch.tokens))
        return self.finish(batch, x_RE)

    def forward(self, batch: Batch, x_TE: torch.Tensor) -> torch.Tensor:
        """This shard's layers: states of all rows, of the last layer only of those read."""
        rows = batch.read_rows if self._decoder.shard.is_last else None
        return self._decoder(x_TE, batch.positions, PagedAttend(self._cache, batch), rows)

    def finish(self, batch: Batch, x_RE: torch.Tensor) -> list[ChunkResult]:
        """What the last stage makes of its output: tokens, log-probabilities, sums.

        Of a stage's tensor ranks only rank 0 sees the logits; the others' results lack them.
        """
        draws = Draws(batch)
        if draws.rows and (logits_NV := self._logits(_some_rows(x_RE, draws.rows))) is not None:
            draws.draw(logits_NV)
        return [
            self._result(chunk, x_RE, last, draws)
            for chunk, last in zip(batch.chunks, batch.last_reads, strict=True)
        ]

    def _result(self, chunk: Chunk, x_RE: torch.Tensor, last: int, draws: Draws) -> ChunkResult:
        token_ids, logprobs = draws.of(chunk)
        result = ChunkResult(request_id=chunk.request_id, token_ids=token_ids, logprobs=logprobs)
        if not chunk.score_targets and not chunk.pooling:
            return result
        x_CE = x_RE[last + 1 - len(chunk.tokens) : last + 1]
        return structs.replace(
            result,
            prompt_logprobs=self._score(chunk, x_CE) if chunk.score_targets else [],
            pooled=_sum_bytes(self._decoder.norm(x_CE)) if chunk.pooling else b"",
        )

    def _score(self, chunk: Chunk, x_CE: torch.Tensor) -> list[TokenLogprobs]:
        scored: list[TokenLogprobs] = []
        for start in range(0, len(chunk.score_targets), _SCORED_ROWS):
            targets = chunk.score_targets[start : start + _SCORED_ROWS]
            logits_NV = self._logits(x_CE[start : start + len(targets)])
            if logits_NV is None:
                continue
            num_top = [chunk.num_prompt_logprobs] * len(targets)
            scored += token_logprobs(logits_NV, list(range(len(targets))), targets, num_top)
        return scored

    def _logits(self, x_NE: torch.Tensor) -> torch.Tensor | None:
        return self._decoder.logits(x_NE)


class EncoderRunner:
    """A whole encoder: every chunk is a whole sequence, and wants the sum of its states."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def run(self, chunks: list[Chunk]) -> list[ChunkResult]:
        tokens = [token for chunk in chunks for token in chunk.tokens]
        lengths = [len(chunk.tokens) for chunk in chunks]
        x_TE = self._encoder(tokens, lengths)
        return [
            ChunkResult(request_id=chunk.request_id, pooled=_sum_bytes(x_CE))
            for chunk, x_CE in zip(chunks, torch.split(x_TE, lengths), strict=True)
        ]


def _some_rows(x_RE: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Nearly always all of them, and to pick them would be a copy."""
    return x_RE if len(rows) == len(x_RE) else x_RE[rows]


def _sum_bytes(x_CE: torch.Tensor) -> bytes:
    return x_CE.float().sum(dim=0).numpy().tobytes()
