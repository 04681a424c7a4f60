"""Settings of an engine. Values from the command line or `LLM(...)`, checked once, then fixed."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from shoal.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["auto", "none", "int8", "int4"]
KVDType = Literal["auto", "float32", "float16", "int8"]
Route = Literal["random", "round-robin", "least-loaded", "two-choices", "prefix"]
WireFormat = Literal["exact", "int8"]
Transport = Literal["auto", "shared-memory", "sockets", "gloo", "nccl"]

HEARTBEAT_S = 0.2
DEAD_AFTER_S = 1.25
LEAST_DEAD_AFTER_S = 0.5

_GUESSES_OF_A_MODEL = 4
_UNIT_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNIT_BYTES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Split(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is divided: `replicas` chains of `pipeline` stages of `tensor` ranks each.

    `layers` gives each stage's number of layers, `shares` the relative size of each rank's slice;
    without them stages and ranks go by cores. `wire_format` is how activations travel between
    workers, `transport` how the ranks of a stage add up.
    """

    pipeline: int = 1
    tensor: int = 1
    replicas: int = 1
    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    route: Route = "prefix"
    wire_format: WireFormat = "exact"
    transport: Transport = "auto"

    def __post_init__(self) -> None:
        for name in ("pipeline", "tensor", "replicas"):
            _positive(name, getattr(self, name))
        _one_for_each("layers", self.layers, "pipeline stages", self.pipeline)
        _one_for_each("shares", self.shares, "tensor ranks", self.tensor)

    @property
    def num_workers(self) -> int:
        return self.pipeline * self.tensor * self.replicas


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_memory_bytes=None` sizes the KV cache from the memory that is free.

    `served_name` is what clients call the model, if not `model` itself. `stall_s` is how long
    work may wait without a finished step before the engine counts as unhealthy.

    A worker that has not been heard of for `dead_after_s` is replaced. Requests wait
    `recovery_timeout_s` for workers that cannot be had before they are told to come again.
    `spares` processes stand by for lost workers, and workers that lose their head wait `hold_s`
    for the next one.

    Of each request up to `speculate` tokens are guessed in a step, to be drawn all at once: the
    answers are the same, and there are fewer steps where a text repeats itself. 0 guesses none.
    A `draft_model` with the same tokens guesses better, as long as that saves time.
    """

    model: str
    served_name: str | None = None
    dtype: DType = "auto"
    quantize: Quantize = "auto"
    kv_dtype: KVDType = "auto"
    max_context: int | None = None
    kv_memory_bytes: int | None = None
    block_size: int = 16
    max_step_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 4096
    prefix_caching: bool = True
    speculate: int = 0
    draft_model: str | None = None
    num_threads: int | None = None
    stall_s: float = 30.0
    dead_after_s: float = DEAD_AFTER_S
    recovery_timeout_s: float = 60.0
    spares: int = 0
    hold_s: float = 0.0
    split: Split = msgspec.field(default_factory=Split)

    @property
    def most_guesses(self) -> int:
        """For a request in a step."""
        return self.speculate or (_GUESSES_OF_A_MODEL if self.draft_model else 0)

    def __post_init__(self) -> None:
        for name in ("block_size", "max_step_tokens", "max_running", "max_waiting", "stall_s"):
            _positive(name, getattr(self, name))
        for name in ("recovery_timeout_s", "spares", "hold_s", "speculate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}")
        if self.dead_after_s < LEAST_DEAD_AFTER_S:
            raise ConfigError(
                f"dead_after_s must be at least {LEAST_DEAD_AFTER_S} s, several heartbeats: "
                f"got {self.dead_after_s}"
            )
        for name in ("max_context", "kv_memory_bytes", "num_threads"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))


def parse_bytes(text: str) -> int:
    """`512M`, `2GiB`, `1.5 GB` or a plain number of bytes, as an int."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or (match[3] and not match[2]):
        raise ConfigError(f"'{text}' is not an amount of memory; write it like 512M, 2GiB or 1.5GB")
    number, unit, binary = match.groups()
    return int(float(number) * (_BINARY_UNIT_BYTES[unit] if binary else _UNIT_BYTES[unit]))


def _one_for_each(name: str, values: tuple[float, ...] | None, what: str, number: int) -> None:
    if values is None:
        return
    if len(values) != number:
        raise ConfigError(f"{name} has {len(values)} entries for {number} {what}", param=name)
    for value in values:
        _positive(name, value)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{name} must be positive, got {value}")
