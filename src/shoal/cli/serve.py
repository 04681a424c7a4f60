"""`shoal serve`: the OpenAI API over one model."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated

import typer
from rich.markup import escape

from shoal.cli.console import err_console, human_bytes, note
from shoal.cli.fetching import fetch
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    KvMemoryOption,
    MaxContextOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
    usage_errors,
)
from shoal.cli.stored import size_of
from shoal.config import EngineConfig

SCHEDULING_PANEL = "Scheduling"

EPILOG = """Examples:

  shoal serve smollm2-135m

  shoal serve ./model.gguf --host 0.0.0.0 --port 9000 --kv-memory 2GiB

  shoal serve gemma3-270m --accept-terms --max-context 8192 --threads 2
"""


def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    max_context: MaxContextOption = None,
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
    max_running: Annotated[
        int, typer.Option(help="Requests computed together.", rich_help_panel=SCHEDULING_PANEL)
    ] = 256,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Requests that may queue; more are answered 429.", rich_help_panel=SCHEDULING_PANEL
        ),
    ] = 4096,
    max_step_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of one step: more is faster for long prompts, less is smoother for the "
            "rest.",
            rich_help_panel=SCHEDULING_PANEL,
        ),
    ] = 512,
    no_prefix_cache: Annotated[
        bool,
        typer.Option(
            "--no-prefix-cache",
            help="Compute every prompt anew, even what is in the KV cache.",
            rich_help_panel=SCHEDULING_PANEL,
        ),
    ] = False,
) -> None:
    """Serve a model behind the OpenAI API until Ctrl-C or SIGTERM.

    Open requests may finish after the first signal; a second one ends at once.
    """
    with usage_errors():
        config = EngineConfig(
            model=model,
            dtype=dtype,
            quantize=quantize,
            max_context=max_context,
            kv_memory_bytes=kv_memory,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            prefix_caching=not no_prefix_cache,
            num_threads=threads,
        )
    run_server(config, host, port, accept_terms=accept_terms)


def run_server(config: EngineConfig, host: str, port: int, *, accept_terms: bool) -> None:
    """Fetch, load, serve, and stop the engine. Raises ShoalError when it cannot start."""
    # torch and FastAPI take seconds to import, which `--help` must not wait for.
    from shoal.server.run import bind  # noqa: PLC0415

    # First of all: a port in use must be known before a minute of loading.
    with bind(host, port) as listener:
        files = fetch(config.model, accept_terms=accept_terms)
        note(f"loading {files.name} ({human_bytes(size_of(files.path))}) from {files.path}")
        start_s = time.perf_counter()

        from shoal.engine.local import start_engine  # noqa: PLC0415
        from shoal.server.run import serve as serve_http  # noqa: PLC0415

        engine = start_engine(config)
        try:
            note(f"{engine.info.description}; ready in {time.perf_counter() - start_s:.1f} s")
            note(
                f"context of {engine.info.max_context:,} tokens; up to {config.max_running:,} "
                f"requests together, {config.max_waiting:,} waiting"
            )

            def ready(url: str) -> None:
                _welcome(url, files.name, can_generate=engine.info.can_generate)

            asyncio.run(serve_http(engine, host, port, listener=listener, on_ready=ready))
        finally:
            engine.close()
    note("stopped")


def _welcome(url: str, model: str, *, can_generate: bool) -> None:
    """Where it is, and something to paste."""
    console = err_console()
    console.print(f"[bold green]serving[/] [bold]{escape(model)}[/]", soft_wrap=True)
    console.print(f"  API   {url}/v1\n  docs  {url}/docs", soft_wrap=True, markup=False)
    console.print(f"\n{_curl_example(url, model, can_generate)}\n", soft_wrap=True, markup=False)
    note("Ctrl-C stops the server")


def _curl_example(url: str, model: str, can_generate: bool) -> str:
    path = "chat/completions" if can_generate else "embeddings"
    body: dict[str, object] = {"model": model}
    if can_generate:
        body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
        body["stream"] = True
    else:
        body["input"] = ["Why is the sky blue?"]
    return (
        f"  curl -N {url}/v1/{path} -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'"
    )
