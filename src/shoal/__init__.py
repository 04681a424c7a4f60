"""Shoal: one language model, many ordinary machines, and no stream breaks."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.config import Split as Split
    from shoal.llm import LLM as LLM
    from shoal.request import SamplingParams as SamplingParams

__version__ = version("shoal")
__all__ = ["LLM", "SamplingParams", "Split", "__version__"]

# Imported when first asked for: `import shoal` itself loads nothing heavy.
_HOMES = {"LLM": "shoal.llm", "SamplingParams": "shoal.request", "Split": "shoal.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
