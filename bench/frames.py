"""Where a step's time goes: wrappers around the parts of the code, by kind of work.

A frame's time is its own, without the frames inside it, so that kinds add up to the whole step.
Only what a site in `SITES` names is wrapped, where this version of Shoal has it; what is not there
is in the time of who calls it.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

KERNELS: dict[str, tuple[str, ...]] = {
    "linear layers": (
        "shoal.compute.linear:LinearByRows.__call__",
        "shoal.compute.linear:DenseLinear.__call__",
        "shoal.compute.linear:WideningLinear.__call__",
        "shoal.compute.quantized:DynamicInt8Linear.__call__",
        "shoal.compute.quantized:Float16Linear.__call__",
        "shoal.compute.native:NativeLinear.__call__",
        "shoal.compute.native:NormedLinear.__call__",
        "shoal.compute.native:GatedLinear.__call__",
    ),
    "native layers": ("shoal.compute.native_layer:NativeLayers.__call__",),
    "attention halves": ("shoal.compute.native_layer:NativeAttention.__call__",),
    "MLP halves": ("shoal.compute.native_layer:NativeMLP.__call__",),
    "output head": ("shoal.models.decoder:Decoder.logits",),
    "attention": ("shoal.compute.attention:paged_attention", "shoal.compute.native:attend"),
    "cache write": ("shoal.worker.kv_cache:KVCache.write", "shoal.compute.native:store"),
    "norms": ("shoal.models.layers:RMSNorm.__call__", "shoal.models.layers:HeadNorm.__call__"),
    "rope": (
        "shoal.models.rope:RotaryEmbedding.__call__",
        "shoal.models.rope:Rotation.__call__",
        "shoal.compute.native:rotate",
    ),
    "gate": ("shoal.models.layers:Gate.__call__",),
    "embedding": ("shoal.models.decoder:Decoder.embed",),
    "sampling": (
        "shoal.compute.sampler:sample",
        "shoal.compute.sampler:token_logprobs",
    ),
}
PYTHON: dict[str, tuple[str, ...]] = {
    "batch assembly": ("shoal.worker.batch:Batch.__init__",),
    "layers: sums, views, calls": (
        "shoal.models.decoder:Decoder.__call__",
        "shoal.models.layers:DecoderLayer.__call__",
        "shoal.models.layers:Attention.__call__",
        "shoal.models.layers:GatedMLP.__call__",
        "shoal.worker.runner:PagedAttend.__call__",
    ),
}
SITES = KERNELS | PYTHON

# A head is a linear layer too, and is not counted as one.
_WHOLE = ("output head",)


class Frames:
    """Seconds and calls by kind, between `begin` and `end` of one step at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._since_s = 0.0
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def begin(self, rest: str) -> None:
        """A step: what no other frame takes is of the kind `rest`."""
        self.seconds, self.calls = {}, {}
        self._open = [rest]
        self._since_s = self._clock()

    def end(self) -> None:
        self._note()
        self._open = []

    def run(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inside = self._open
        if not inside or inside[-1] == kind or inside[-1] in _WHOLE:
            return call(*args, **kwargs)
        self._note()
        inside.append(kind)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        try:
            return call(*args, **kwargs)
        finally:
            self._note()
            inside.pop()

    def _note(self) -> None:
        now_s = self._clock()
        kind = self._open[-1]
        self.seconds[kind] = self.seconds.get(kind, 0.0) + now_s - self._since_s
        self._since_s = now_s


@contextmanager
def framed(frames: Frames, sites: dict[str, tuple[str, ...]] = SITES) -> Iterator[None]:
    """Wraps every site that there is, wherever it has been imported to."""
    with ExitStack() as stack:
        for kind, names in sites.items():
            for name in names:
                for holder, attribute, original in _places(name):
                    wrapped = _wrapped(frames, kind, original)
                    stack.enter_context(patch.object(holder, attribute, wrapped))
        yield


def _places(name: str) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Who holds what a site names: a class its method, modules a function. Empty: not there."""
    module_name, _, path = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        return []
    owner, _, attribute = path.rpartition(".")
    if owner:
        holder = getattr(module, owner, None)
        original = None if holder is None else vars(holder).get(attribute)
        return [] if original is None else [(holder, attribute, original)]
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if function is None:
        return []
    package = module_name.partition(".")[0]
    holders = [m for key, m in sys.modules.items() if key.partition(".")[0] == package]
    return [(m, attribute, function) for m in holders if vars(m).get(attribute) is function]


def _wrapped(frames: Frames, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return frames.run(kind, original, *args, **kwargs)

    return call
