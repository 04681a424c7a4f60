"""Log-probabilities in the three forms clients know: completions, chat, and prompt tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shoal.messages import TokenLogprobs
from shoal.weights.tokenizer import Tokenizer

# JSON has no infinity; clients know this number for "impossible" from other servers.
IMPOSSIBLE = -9999.0


class CompletionLogprobs:
    """The legacy form, built token by token: parallel lists, offsets into the choice's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._skip_special = skip_special
        self._offset = 0

    def form(
        self, token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """The next tokens. A prompt's first token has no score, hence None."""
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [score and _finite(score.logprob) for score in scores],
            "top_logprobs": [
                score and self._top(token_id, score)
                for token_id, score in zip(token_ids, scores, strict=True)
            ],
            "text_offset": list(self._offsets(token_ids)),
        }

    def _top(self, token_id: int, score: TokenLogprobs) -> dict[str, float]:
        """Best first; the chosen token is always among them."""
        top: dict[str, float] = {}
        for other_id, logprob in _best(score, self._num_top):
            # Tokens that are pieces of characters can look the same: the better one stays.
            top.setdefault(self._tokenizer.token_text(other_id), _finite(logprob))
        top.setdefault(self._tokenizer.token_text(token_id), _finite(score.logprob))
        return top

    def _offsets(self, token_ids: Sequence[int]) -> Iterator[int]:
        for token_id in token_ids:
            yield self._offset
            self._offset += self._num_chars(token_id)

    def _num_chars(self, token_id: int) -> int:
        """Characters that begin in this token, so that the pieces of one character count once."""
        if self._skip_special and not self._tokenizer.decode([token_id], skip_special=True):
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        entry(token_id, score.logprob)
        | {"top_logprobs": [entry(*best) for best in _best(score, len(score.top_ids))]}
        for token_id, score in zip(token_ids, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """One map from token ids to scores per prompt token, and None for the first."""

    def scored(token_id: int, logprob: float) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "decoded_token": tokenizer.token_text(token_id)}

    form: list[dict[str, Any] | None] = [None]
    for token_id, score in zip(prompt[1:], scores, strict=True):
        best = dict(_best(score, num_top)) | {token_id: score.logprob}
        form.append({str(other): scored(other, logprob) for other, logprob in best.items()})
    return form


def mean_logprob(scores: Sequence[TokenLogprobs]) -> float:
    return sum(_finite(score.logprob) for score in scores) / max(1, len(scores))


def _best(score: TokenLogprobs, num_top: int) -> Iterator[tuple[int, float]]:
    return zip(score.top_ids[:num_top], score.top_logprobs[:num_top], strict=True)


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)
