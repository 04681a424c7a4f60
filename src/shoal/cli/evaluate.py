"""`shoal eval perplexity`: what a precision costs in quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table

from shoal.cli.console import note, out_console, write_json
from shoal.cli.loading import LoadOptions, open_llm
from shoal.cli.options import (
    AcceptTermsOption,
    DTypeOption,
    KvDtypeOption,
    ModelArgument,
    QuantizeOption,
    ThreadsOption,
)
from shoal.cli.split_options import (
    PipelineOption,
    TensorOption,
    TransportOption,
    WireFormatOption,
    make_split,
)
from shoal.config import DType, KVDType, Quantize
from shoal.errors import InvalidRequest, UnsupportedByModel
from shoal.evaluate.perplexity import Perplexity, english_text, measure_perplexity

if TYPE_CHECKING:
    from shoal.llm import LLM

EPILOG = """Examples:

  shoal eval perplexity smollm2-135m

  shoal eval perplexity smollm2-135m --compare

  shoal eval perplexity ./model.gguf --quantize int8 --text novel.txt --window 1024
"""

PRECISIONS: tuple[tuple[DType, Quantize], ...] = (
    ("float32", "none"),
    ("auto", "int8"),
    ("auto", "int4"),
    ("bfloat16", "none"),
    ("auto", "auto"),
)
"""What --compare measures; the first is what the others are compared with."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    dtype: DType
    quantize: Quantize
    kv_dtype: KVDType
    description: str
    result: Perplexity


def perplexity(
    model: ModelArgument,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure fp32, int8, int4, bfloat16 and auto in turn.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="UTF-8 text to predict. [dim]default: 17 000 characters of Alice in Wonderland[/]",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that are read together; windows do not overlap.")
    ] = 512,
    step_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens computed in one step; kernels differ by it, and 1 measures those that "
            "decode one stream (slow).",
        ),
    ] = 512,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    threads: ThreadsOption = None,
    accept_terms: AcceptTermsOption = False,
    pipeline: PipelineOption = 1,
    tensor: TensorOption = 1,
    wire: WireFormatOption = "exact",
    transport: TransportOption = "auto",
) -> None:
    """Measure how well a model predicts a text: the lower, the better.

    Prints a table; the last line is one JSON record.
    """
    prose = _read(text)
    precisions = PRECISIONS if compare else ((dtype, quantize),)
    scores = []
    for one_dtype, one_quantize in precisions:
        note(f"measuring {_label(one_dtype, one_quantize)}")
        options = LoadOptions(
            dtype=one_dtype,
            quantize=one_quantize,
            kv_dtype=kv_dtype,
            num_threads=threads,
            split=make_split(pipeline=pipeline, tensor=tensor, wire=wire, transport=transport),
            accept_terms=accept_terms,
        )
        scores.append(_measure(model, options, prose, window=window, step_tokens=step_tokens))
    out_console().print(_table(model, scores))
    write_json(_record(model, scores, window=window, step_tokens=step_tokens, text=text))


def _read(path: Path | None) -> str:
    if path is None:
        return english_text()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text: {error}") from error


def _measure(
    model: str, options: LoadOptions, prose: str, *, window: int, step_tokens: int
) -> Score:
    # With the prefix cache, text seen before would not be scored with the kernels under test.
    more = {"prefix_caching": False, "max_step_tokens": step_tokens}
    with open_llm(model, options, **more) as llm:
        if not llm.info.can_generate:
            raise UnsupportedByModel(f"{model} is an encoder: it predicts no text")
        tokens = llm.tokenizer.encode(prose, add_special=False)
        result = measure_perplexity(
            llm, tokens, window=window, bos=_prompt_start(llm), progress=True
        )
        return Score(
            dtype=options.dtype,
            quantize=options.quantize,
            kv_dtype=options.kv_dtype,
            description=llm.info.description,
            result=result,
        )


def _prompt_start(llm: LLM) -> int | None:
    """The token every prompt of this model begins with, if there is one."""
    alone = llm.tokenizer.encode("")
    return alone[0] if alone and alone[0] == llm.tokenizer.bos_id else None


def _table(model: str, scores: list[Score]) -> Table:
    table = Table("precision", "perplexity", "ratio", "nats/token", "tokens", "tokens/s")
    table.title, table.title_justify = f"perplexity of {model}", "left"
    for column in table.columns[1:]:
        column.justify = "right"
    base = scores[0].result.perplexity
    for score in scores:
        result = score.result
        table.add_row(
            _label(score.dtype, score.quantize),
            f"{result.perplexity:.3f}",
            f"{result.perplexity / base:.4f}",
            f"{result.mean_nll:.4f}",
            str(result.num_tokens),
            f"{result.num_tokens / result.elapsed_s:.0f}",
        )
    return table


def _record(
    model: str, scores: list[Score], *, window: int, step_tokens: int, text: Path | None
) -> dict[str, object]:
    base = scores[0].result.perplexity
    return {
        "eval": "perplexity",
        "model": model,
        "text": str(text) if text else "english.txt",
        "window": window,
        "step_tokens": step_tokens,
        "results": [
            {
                "dtype": score.dtype,
                "quantize": score.quantize,
                "kv_dtype": score.kv_dtype,
                "description": score.description,
                "ratio": round(score.result.perplexity / base, 6),
                **{
                    name: round(value, 6)
                    for name, value in msgspec.structs.asdict(score.result).items()
                },
            }
            for score in scores
        ],
    }


def _label(dtype: DType, quantize: Quantize) -> str:
    return dtype if quantize == "none" else quantize
