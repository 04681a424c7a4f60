"""`shoal chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from shoal.cli.chat_backend import ChatBackend, LocalBackend, RemoteBackend, http_client
from shoal.cli.chat_session import ChatSession
from shoal.cli.client import base_url
from shoal.cli.console import note
from shoal.cli.conversation import Conversation
from shoal.cli.loading import LoadOptions, open_llm
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    KvDtypeOption,
    KvMemoryOption,
    MaxContextOption,
    MaxTokensOption,
    OptionalModelArgument,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopPOption,
    UrlOption,
    usage_errors,
)
from shoal.errors import UnsupportedByModel
from shoal.request import SamplingParams

EPILOG = """Examples:

  shoal chat smollm2-135m

  shoal chat smollm2-135m --system "Answer in one sentence." --temperature 0

  shoal chat --url http://127.0.0.1:8000

  printf 'Hello!\\nWho are you?\\n' | shoal chat smollm2-135m
"""


def chat(
    model: OptionalModelArgument = None,
    url: UrlOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: MaxTokensOption = 1024,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    seed: SeedOption = None,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    max_context: MaxContextOption = None,
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D or /exit leaves, /help tells more.

    When stdin is not a terminal, each of its lines is one question of one conversation.
    """
    with usage_errors():
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
    if model is None and url is None:
        raise typer.BadParameter("name a MODEL to load, or a server with --url")
    options = LoadOptions(
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        max_context=max_context,
        kv_memory=kv_memory,
        num_threads=threads,
        accept_terms=accept_terms,
    )
    with ExitStack() as stack:
        backend = (
            _remote(stack, url, model, params)
            if url is not None
            else _local(stack, model or "", options, params)
        )
        if sys.stdin.isatty():
            note(f"talking with {backend.name}; /help for commands, Ctrl-D leaves")
        ChatSession(backend, Conversation(system), max_tokens).run()


def _remote(stack: ExitStack, url: str, model: str | None, params: SamplingParams) -> ChatBackend:
    with usage_errors():
        client = http_client(base_url(url))
    return RemoteBackend(stack.enter_context(client), model, params)


def _local(
    stack: ExitStack, model: str, options: LoadOptions, params: SamplingParams
) -> ChatBackend:
    llm = stack.enter_context(open_llm(model, options))
    if not llm.tokenizer.has_chat_template:
        raise UnsupportedByModel(
            f"{model} has no chat template: it completes text; use 'shoal generate {model}'"
        )
    return LocalBackend(llm, params)
