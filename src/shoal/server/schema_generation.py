"""What completions and chat completions have in common: how to sample, and Shoal's extras."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from shoal.errors import InvalidRequest
from shoal.request import SamplingParams
from shoal.server.schema import Int, Schema


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    return tuple(stops)


StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_stop_strings),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against traffic analysis; ours has none, and none is the default."""


class GenerationRequest(Schema):
    """Ranges are checked by SamplingParams, so that Python and HTTP callers hear the same."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    seed: Int | None = None
    n: Int = 1
    stop: StopStrings = ()
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: Int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: Int = 0
    ignore_eos: bool = False
    stop_token_ids: list[Int] = Field(default_factory=list)
    prompt_logprobs: Int | None = None
    priority: Int = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        """Raises InvalidRequest for what only makes sense with, or only without, `stream`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options needs stream=true", param="stream_options", code="invalid_value"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs is not available with stream=true", param="prompt_logprobs"
            )

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest naming the parameter that is out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self._biases(),
            seed=self.seed,
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )

    def _biases(self) -> dict[int, float]:
        for name in self.logit_bias:
            # More digits than any vocabulary has would be a needless big integer.
            if not (name.isascii() and name.isdecimal() and len(name) <= 10):
                raise InvalidRequest(
                    f"logit_bias maps token ids to numbers; '{name[:40]}' is no token id",
                    param="logit_bias",
                )
        return {int(name): bias for name, bias in self.logit_bias.items()}
