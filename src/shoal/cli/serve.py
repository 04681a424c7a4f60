"""`shoal serve`: the OpenAI API over one model."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.markup import escape

from shoal.cli.cluster_options import StateOption
from shoal.cli.console import err_console, human_bytes, note
from shoal.cli.fetching import fetch
from shoal.cli.journaling import GraceOption, JournalOption, opened_journal
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    KvDtypeOption,
    KvMemoryOption,
    MaxContextOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
    usage_errors,
)
from shoal.cli.placing import (
    ClusterOption,
    ObjectiveOption,
    PlacementOption,
    PlaintextOption,
    Where,
    deploy_at,
    judged_after_a_minute,
)
from shoal.cli.recovery_options import (
    DEAD_AFTER_S,
    HOLD_S,
    DeadAfterOption,
    HoldOption,
    RecoveryTimeoutOption,
    SparesOption,
    recovering,
)
from shoal.cli.scheduling_options import (
    DraftModelOption,
    MaxRunningOption,
    MaxStepTokensOption,
    MaxWaitingOption,
    NoPrefixCacheOption,
    SpeculateOption,
    StallAfterOption,
    scheduling,
)
from shoal.cli.split_options import (
    LayersOption,
    PipelineOption,
    ReplicasOption,
    RouteOption,
    SharesOption,
    TensorOption,
    TransportOption,
    WireFormatOption,
    make_split,
)
from shoal.cli.starting import without_collections
from shoal.cli.stored import size_of
from shoal.config import EngineConfig

if TYPE_CHECKING:
    import socket

    from shoal.engine.api import ModelInfo
    from shoal.fleet.deployment import Deployment
    from shoal.fleet.state import StateFolder
    from shoal.journal.api import Journal

EPILOG = """Examples:

  shoal serve smollm2-135m

  shoal serve ./model.gguf --host 0.0.0.0 --port 9000 --kv-memory 2GiB

  shoal serve gemma3-270m --accept-terms --max-context 8192 --threads 2

Over several processes of this machine:

  shoal serve smollm2-135m --pipeline 2 --tensor 2

  shoal serve smollm2-135m --layers 20/10 --replicas 2

Over the machines that have joined 'shoal head':

  shoal serve smollm2-135m --cluster
"""


HostOption = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")
]
PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
]
NameOption = Annotated[
    str | None, typer.Option(help="What clients call the model, if not as it is named here.")
]


def serve(
    model: ModelArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    max_context: MaxContextOption = None,
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
    max_running: MaxRunningOption = 256,
    max_waiting: MaxWaitingOption = 4096,
    max_step_tokens: MaxStepTokensOption = 512,
    no_prefix_cache: NoPrefixCacheOption = False,
    speculate: SpeculateOption = 0,
    draft_model: DraftModelOption = None,
    stall_after: StallAfterOption = 30.0,
    pipeline: PipelineOption = 1,
    tensor: TensorOption = 1,
    replicas: ReplicasOption = 1,
    layers: LayersOption = None,
    shares: SharesOption = None,
    route: RouteOption = "prefix",
    wire: WireFormatOption = "exact",
    transport: TransportOption = "auto",
    spares: SparesOption = 0,
    dead_after: DeadAfterOption = DEAD_AFTER_S,
    recovery_timeout: RecoveryTimeoutOption = 60.0,
    hold: HoldOption = HOLD_S,
    placement: PlacementOption = None,
    cluster: ClusterOption = False,
    objective: ObjectiveOption = "balanced",
    insecure_plaintext: PlaintextOption = False,
    state: StateOption = None,
    journal: JournalOption = None,
    grace: GraceOption = 30,
) -> None:
    """Serve a model behind the OpenAI API until Ctrl-C or SIGTERM."""
    with usage_errors():
        config = EngineConfig(
            model=model,
            served_name=name,
            dtype=dtype,
            quantize=quantize,
            kv_dtype=kv_dtype,
            max_context=max_context,
            kv_memory_bytes=kv_memory,
            num_threads=threads,
            stall_s=stall_after,
            split=make_split(pipeline, tensor, replicas, layers, shares, route, wire, transport),
            **scheduling(max_step_tokens, max_running, max_waiting, no_prefix_cache),
            speculate=speculate,
            draft_model=draft_model,
            **recovering(spares, dead_after, recovery_timeout, hold, port),
        )
        where = Where(placement, cluster, objective, insecure_plaintext, state)
    run_server(config, where, host, port, Ending(journal, grace), accept_terms=accept_terms)


class Ending(NamedTuple):
    """As `--journal` and `--grace` say."""

    journal: str | None
    grace_s: int


def run_server(
    config: EngineConfig, where: Where, host: str, port: int, ending: Ending, *, accept_terms: bool
) -> None:
    """Fetch, load, serve, and stop the engine. Raises ShoalError when it cannot start."""
    with ExitStack() as stack:
        with without_collections():
            # torch and FastAPI take seconds to import, which `--help` must not wait for.
            from shoal.fleet.state import state_folder  # noqa: PLC0415
            from shoal.server.run import bind  # noqa: PLC0415

            # First of all: a port in use must be known before a minute of loading.
            listener = stack.enter_context(bind(host, port))
            files = fetch(config.model, accept_terms=accept_terms)
            if config.draft_model is not None:
                fetch(config.draft_model, accept_terms=accept_terms)
            state = state_folder(where.state)
            kept = opened_journal(ending.journal, state, files, config, port)
            journal = stack.enter_context(kept)
            note(f"loading {files.name} ({human_bytes(size_of(files.path))}) from {files.path}")
            start_s = time.perf_counter()
            deployment = stack.enter_context(closing(deploy_at(config, where, port)))
        info = deployment.engine.info
        note(f"{info.description}; ready in {time.perf_counter() - start_s:.1f} s")
        note(
            f"context of {info.max_context:,} tokens; up to {config.max_running:,} "
            f"requests together, {config.max_waiting:,} waiting"
        )
        _serve_until_stopped(deployment, state, listener, journal, ending.grace_s)
    note("stopped")


def _serve_until_stopped(
    deployment: Deployment,
    state: StateFolder,
    listener: socket.socket,
    journal: Journal | None,
    grace_s: int,
) -> None:
    from shoal.fleet.serving_file import register  # noqa: PLC0415
    from shoal.server.run import serve as serve_http  # noqa: PLC0415
    from shoal.server.run import url_of  # noqa: PLC0415

    engine, url = deployment.engine, url_of(listener)
    example = _example(engine.info, chats=engine.tokenizer.has_chat_template)
    entry = register(state, model=engine.info.name, url=url, control=deployment.control)

    def ready(url: str) -> None:
        _welcome(url, engine.info.name, example)

    host, port = listener.getsockname()[:2]
    with entry, judged_after_a_minute(deployment):
        asyncio.run(
            serve_http(
                engine,
                host,
                port,
                listener=listener,
                on_ready=ready,
                grace_s=grace_s,
                journal=journal,
            )
        )


def _welcome(url: str, model: str, example: tuple[str, dict[str, object]]) -> None:
    """Where it is, and something to paste."""
    console = err_console()
    console.print(f"[bold green]serving[/] [bold]{escape(model)}[/]", soft_wrap=True)
    console.print(f"  API   {url}/v1\n  docs  {url}/docs", soft_wrap=True, markup=False)
    path, body = example
    console.print(
        f"\n  curl -N {url}/v1/{path} -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'\n",
        soft_wrap=True,
        markup=False,
    )
    note("Ctrl-C stops the server")


def _example(info: ModelInfo, *, chats: bool) -> tuple[str, dict[str, object]]:
    """An endpoint that this model can answer, and a body for it."""
    question = "Why is the sky blue?"
    if not info.can_generate:
        return "embeddings", {"model": info.name, "input": [question]}
    if chats:
        messages = [{"role": "user", "content": question}]
        return "chat/completions", {"model": info.name, "messages": messages, "stream": True}
    prompt = "The sky is blue because"
    return "completions", {"model": info.name, "prompt": prompt, "max_tokens": 64, "stream": True}
