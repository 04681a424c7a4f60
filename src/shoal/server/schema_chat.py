"""The body of POST /v1/chat/completions, and messages as a chat template reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from shoal.errors import InvalidRequest
from shoal.request import SamplingParams
from shoal.server.schema import Int, Schema
from shoal.server.schema_generation import GenerationRequest

# What a template is given anyway, or what would replace the template.
RESERVED_VARIABLES = frozenset(
    {"self", "messages", "add_generation_prompt", "tools", "documents", "chat_template"}
)

# Written by clients into the assistant messages they send back. They only matter with a value.
_EMPTY_IN_ANSWERS = ("refusal", "audio", "function_call", "tool_calls", "annotations")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"has a part of type {kind!r:.40}; this model reads text only")
    if not isinstance(part.get("text"), str) or len(part) != 2:
        raise ValueError("a text part is {'type': 'text', 'text': '...'}")
    return str(part["text"])


def _without_empty(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {
        name: value for name, value in message.items() if value or name not in _EMPTY_IN_ANSWERS
    }


Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        }
    ),
]


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, str]:
        """`developer` is OpenAI's newer word for `system`; templates know the older one."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


Messages = Annotated[list[Annotated[Message, BeforeValidator(_without_empty)]], Field(min_length=1)]


class ChatRequest(GenerationRequest):
    messages: Messages
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def params(self) -> SamplingParams:
        """Without a limit, the answer may fill the context. Raises InvalidRequest."""
        self.check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens "
                f"({self.max_completion_tokens}) differ; give one",
                param="max_completion_tokens",
            )
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(limits.pop() if limits else None, num_logprobs)


def check_template_variables(variables: dict[str, Any]) -> None:
    """Raises InvalidRequest for a name that belongs to the server."""
    taken = sorted(RESERVED_VARIABLES & variables.keys())
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs must not set '{taken[0]}'", param="chat_template_kwargs"
        )
