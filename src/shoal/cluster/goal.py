"""What a placement is to be good at, and what it must have room for."""

from __future__ import annotations

import msgspec

from shoal.cluster.prediction import Objective
from shoal.errors import ConfigError


class Goal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_tokens` is the cache every replica must have room for, `num_streams` how many streams
    it serves when busy, and `stream_tokens` how long those are when speed is predicted."""

    objective: Objective = "balanced"
    kv_tokens: int = 4096
    num_streams: int = 32
    stream_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "num_streams", "stream_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}", param=name)
