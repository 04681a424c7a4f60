"""`shoal generate`: continue one prompt, streaming."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.console import note, write, write_json
from shoal.cli.loading import LoadOptions, open_llm
from shoal.cli.options import (
    SAMPLING_PANEL,
    AcceptTermsOption,
    DTypeOption,
    JsonOption,
    KvDtypeOption,
    KvMemoryOption,
    MaxContextOption,
    MaxTokensOption,
    ModelArgument,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    usage_errors,
)
from shoal.request import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM

EPILOG = """Examples:

  shoal generate smollm2-135m "The capital of France is"

  shoal generate smollm2-135m --chat "Name three rivers." --temperature 0

  cat letter.txt | shoal generate smollm2-135m --max-tokens 100 --json
"""


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", show_default=False, help="The text; '-' or none: stdin."),
    ] = "-",
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw",
            help="Ask it as a chat message, through the model's template, or continue it as is.",
        ),
    ] = False,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=SAMPLING_PANEL, help="End before this text; repeatable."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", rich_help_panel=SAMPLING_PANEL, help="Number of answers.")
    ] = 1,
    as_json: JsonOption = False,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    max_context: MaxContextOption = None,
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes, figures to stderr."""
    with usage_errors():
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
            n=n,
        )
    text = _prompt_text(prompt)
    options = LoadOptions(
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        max_context=max_context,
        kv_memory=kv_memory,
        num_threads=threads,
        accept_terms=accept_terms,
    )
    with open_llm(model, options) as llm:
        _answer(llm, _tokens(llm, text, chat=chat), params, as_json=as_json)


def _answer(llm: LLM, tokens: list[int], params: SamplingParams, *, as_json: bool) -> None:
    if as_json or params.n > 1:
        _print_all(llm, tokens, params, as_json=as_json)
    else:
        _print_stream(llm, tokens, params)


def _prompt_text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin.isatty():
        note("reading the prompt from the terminal; end it with Ctrl-D")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin is not UTF-8 text: {error}") from error
    if not text:
        raise typer.BadParameter("the prompt on stdin is empty", param_hint="PROMPT")
    return text


def _tokens(llm: LLM, text: str, *, chat: bool) -> list[int]:
    if not chat:
        return llm.tokenizer.encode(text)
    rendered = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return llm.tokenizer.encode(rendered, add_special=False)


def _print_stream(llm: LLM, tokens: list[int], params: SamplingParams) -> None:
    start_s = time.perf_counter()
    first_s, num_generated, finish = start_s, 0, ""
    with closing(llm.stream_sync(tokens, params)) as deltas:  # type: ignore[type-var]
        for delta in deltas:
            first_s = first_s if num_generated else time.perf_counter()
            num_generated += len(delta.token_ids)
            write(delta.text)
            if delta.finish_reason:
                finish = delta.finish_reason.value
    end_s = time.perf_counter()
    write("\n")
    rate = (num_generated - 1) / (end_s - first_s) if num_generated > 1 else 0.0
    note(
        f"{len(tokens)} prompt tokens, first token after {first_s - start_s:.2f} s; "
        f"{num_generated} tokens at {rate:.1f}/s; ended by {finish}"
    )


def _print_all(llm: LLM, tokens: list[int], params: SamplingParams, *, as_json: bool) -> None:
    start_s = time.perf_counter()
    [output] = llm.generate([tokens], params, progress=False)
    elapsed_s = time.perf_counter() - start_s
    num_generated = sum(len(sample.token_ids) for sample in output.samples)
    if as_json:
        samples = [
            {
                "text": sample.text,
                "num_tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason.value if sample.finish_reason else None,
            }
            for sample in output.samples
        ]
        write_json(
            {
                "model": llm.info.name,
                "num_prompt_tokens": len(tokens),
                "samples": samples,
                "elapsed_s": round(elapsed_s, 4),
            }
        )
        return
    for number, sample in enumerate(output.samples, start=1):
        write(f"--- {number} of {params.n}\n{sample.text}\n")
    note(f"{len(tokens)} prompt tokens; {num_generated} tokens in {elapsed_s:.2f} s")
