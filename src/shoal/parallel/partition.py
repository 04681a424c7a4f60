"""Which part of a model a worker holds. Pure values."""

from __future__ import annotations

import msgspec


class Span(msgspec.Struct, frozen=True):
    """A half-open range `[start, stop)`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor)

    def as_slice(self) -> slice:
        return slice(self.start, self.stop)


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """Layers `[layers.start, layers.stop)` and one tensor rank's slice of them.

    A rank holds whole KV-head groups (a KV head with its query heads) and MLP columns;
    its outputs are partial sums that the communicator adds up.
    """

    layers: Span
    num_layers: int
    kv_heads: Span
    mlp_columns: Span
    rank: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers


def whole_shard(num_layers: int, num_kv_heads: int, num_mlp_columns: int) -> Shard:
    return Shard(
        layers=Span(0, num_layers),
        num_layers=num_layers,
        kv_heads=Span(0, num_kv_heads),
        mlp_columns=Span(0, num_mlp_columns),
    )
