"""Loads a model into this process, saying so; commands get their model from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from shoal.cli.console import err_console
from shoal.cli.fetching import fetch
from shoal.config import DType, KVDType, Quantize, Split

if TYPE_CHECKING:
    from shoal.llm import LLM


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The model options that commands share; the names are those of `shoal.LLM`."""

    dtype: DType = "auto"
    quantize: Quantize = "auto"
    kv_dtype: KVDType = "auto"
    max_context: int | None = None
    kv_memory: int | None = None
    num_threads: int | None = None
    split: Split = Split()
    accept_terms: bool = False


def open_llm(model: str, options: LoadOptions, **more: Any) -> LLM:
    """A loaded model, fetched first where needed; `more` goes to `LLM` as it is.

    Raises SourceError, ConfigError, OutOfMemory.
    """
    fetch(model, accept_terms=options.accept_terms)
    with err_console().status(f"loading {model}"):
        # torch takes seconds to import, which `--help` must not wait for.
        from shoal import LLM  # noqa: PLC0415

        return LLM(
            model,
            dtype=options.dtype,
            quantize=options.quantize,
            kv_dtype=options.kv_dtype,
            max_context=options.max_context,
            kv_memory=options.kv_memory,
            num_threads=options.num_threads,
            split=options.split,
            **more,
        )
