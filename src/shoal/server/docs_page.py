"""The page at /docs. FastAPI's own loads its scripts from a CDN; this one needs no network."""

from __future__ import annotations

import html
import json
from typing import Any, NamedTuple

from shoal.engine.api import ModelInfo

_MESSAGES = [{"role": "user", "content": "Why is the sea salt?"}]


class Endpoint(NamedTuple):
    method: str
    path: str
    text: str
    body: dict[str, Any] | None = None


_ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation; with stream=true word by word.",
        {"messages": _MESSAGES, "max_tokens": 64, "stream": True},
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        "Continue one prompt or many, as text or token ids.",
        {"prompt": "The sea is salt because", "max_tokens": 32, "temperature": 0},
    ),
    Endpoint("POST", "/v1/embeddings", "A vector for each input.", {"input": ["sea", "salt"]}),
    Endpoint(
        "POST",
        "/v1/tokenize",
        "Token ids of a text or of messages.",
        {"prompt": "The sea is salt"},
    ),
    Endpoint("POST", "/v1/detokenize", "The text of token ids.", {"tokens": [1, 2, 3]}),
    Endpoint("GET", "/v1/models", "The model served here."),
    Endpoint("GET", "/health", "200 while work can progress, else 503 with the reason."),
    Endpoint("GET", "/health/live", "503 once the engine has stopped for good: start it anew."),
    Endpoint("GET", "/health/ready", "503 while new requests are refused: send them elsewhere."),
    Endpoint("GET", "/health/progress", "503 when work waits and nothing moves."),
    Endpoint("GET", "/metrics", "Counts and times for Prometheus."),
    Endpoint("GET", "/openapi.json", "Every field of every endpoint, for machines."),
)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Shoal: {model}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark; }}
pre {{ padding: .75rem; overflow-x: auto; border: 1px solid #8888; border-radius: .4rem; }}
h2 {{ font-size: 1.05rem; margin-bottom: 0; }}
</style>
<h1>Shoal</h1>
<p>This server has the model <strong>{model}</strong> ({description}); prompt and answer together
hold {max_context} tokens. It speaks OpenAI's API: give any OpenAI client the base URL
<code>{base_url}/v1</code> and any key.</p>
<pre>from openai import OpenAI

client = OpenAI(base_url="{base_url}/v1", api_key="none")
answer = client.chat.completions.create(
    model={model_literal}, messages={messages}
)
print(answer.choices[0].message.content)</pre>
{endpoints}
</html>
"""


def docs_page(base_url: str, info: ModelInfo) -> str:
    """HTML with an example to copy for each endpoint."""
    values = {
        "model": info.name,
        "model_literal": json.dumps(info.name),
        "description": info.description,
        "max_context": str(info.max_context),
        "base_url": base_url,
        "messages": json.dumps(_MESSAGES),
    }
    escaped = {name: html.escape(value) for name, value in values.items()}
    sections = "".join(_section(endpoint, base_url, info.name) for endpoint in _ENDPOINTS)
    return _PAGE.format(**escaped, endpoints=sections)


def _section(endpoint: Endpoint, base_url: str, model: str) -> str:
    command = f"curl -N {base_url}{endpoint.path}"
    if endpoint.body is not None:
        body = json.dumps({"model": model, **endpoint.body}).replace("'", r"'\''")
        command += f" -H 'content-type: application/json' \\\n  -d '{body}'"
    return (
        f"<h2>{endpoint.method} {endpoint.path}</h2>\n<p>{html.escape(endpoint.text)}</p>\n"
        f"<pre>{html.escape(command)}</pre>\n"
    )
