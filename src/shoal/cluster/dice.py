"""Randomness that is a function of a seed and a count, so that decisions can be repeated."""

from __future__ import annotations

_MASK = 2**64 - 1


class Dice:
    """splitmix64 (Steele, Lea and Flood 2014) of a seed and a count."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def roll(self) -> int:
        """64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        bits = self._state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        return bits ^ (bits >> 31)
