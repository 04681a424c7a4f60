"""Durations as people write them: `90s`, `30m`, `1h`, `7d`."""

from __future__ import annotations

import re

from shoal.errors import ConfigError

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration_s(text: str) -> float:
    """Raises ConfigError."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"'{text}' is no duration: write for example 90s, 30m, 1h or 7d")
    return float(match[1]) * _UNIT_S[match[2]]


def human_duration(duration_s: float) -> str:
    """In the largest unit that leaves no more than a rounding: `59 m`, `1.5 h`."""
    for unit in ("d", "h", "m"):
        if duration_s >= _UNIT_S[unit]:
            return f"{duration_s / _UNIT_S[unit]:.3g} {unit}"
    return f"{duration_s:.3g} s"
