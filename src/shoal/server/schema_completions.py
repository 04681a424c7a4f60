"""The body of POST /v1/completions."""

from __future__ import annotations

import msgspec

from shoal.errors import InvalidRequest
from shoal.request import SamplingParams
from shoal.server.schema import Int
from shoal.server.schema_generation import GenerationRequest
from shoal.server.schema_prompt import Prompts

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: Int = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: Int | None = None
    best_of: Int | None = None
    add_special_tokens: bool = True

    @property
    def scores_only(self) -> bool:
        """`echo` with no new tokens, as clients ask that compare the likelihood of texts.

        The engine has no request without a token, so one is drawn and dropped.
        """
        return self.echo and self.max_tokens == 0

    @property
    def num_drawn(self) -> int:
        """Samples per prompt the engine draws, of which the best `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    def params(self) -> SamplingParams:
        """Raises InvalidRequest."""
        self.check_stream()
        self._check_combinations()
        params = self.sampling_params(1 if self.scores_only else self.max_tokens, self.logprobs)
        changes: dict[str, int | None] = {"n": self.num_drawn}
        if self.num_drawn > self.n and self.logprobs is None:
            changes["logprobs"] = 0
        if self.echo and self.logprobs is not None:
            changes["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return msgspec.structs.replace(params, **changes)

    def _check_combinations(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(
                f"best_of ({self.best_of}) is less than n ({self.n})", param="best_of"
            )
        if self.best_of is not None and self.stream:
            raise InvalidRequest("best_of is not available with stream=true", param="best_of")
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs is not available with stream=true", param="logprobs"
            )
