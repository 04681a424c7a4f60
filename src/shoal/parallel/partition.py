"""Which part of a model a worker holds, and how a model is dealt to workers. Pure values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shoal.errors import ConfigError

# 4-bit weights come in groups of 32 columns, which no rank may cut.
MLP_UNIT = 32
# Matrix kernels pack rows in tiles.
VOCAB_UNIT = 64


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


class Dims(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model can be divided, and into how many parts at most."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    num_mlp_columns: int
    vocab_size: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor rank's part of every layer, of the embedding and of the head.

    It holds whole KV-head groups (KV heads with all their query heads), or some of the query
    heads of a single KV head, which other ranks then hold as well.
    """

    query_heads: Span
    kv_heads: Span
    mlp_columns: Span
    vocab: Span


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """Layers `[layers.start, layers.stop)` and one tensor rank's slice of them.

    A rank's outputs are partial sums, which the communicator adds up.
    """

    layers: Span
    num_layers: int
    slice: Slice
    rank: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers


def whole_shard(dims: Dims) -> Shard:
    return shards_of(dims, Span(0, dims.num_layers), [1.0])[0]


def shards_of(dims: Dims, layers: Span, shares: Sequence[float]) -> list[Shard]:
    """One stage's shards, a rank for each share. Raises ConfigError if there are too many."""
    slices = tensor_slices(dims, shares)
    return [
        Shard(
            layers=layers, num_layers=dims.num_layers, slice=part, rank=rank, num_ranks=len(slices)
        )
        for rank, part in enumerate(slices)
    ]


def tensor_slices(dims: Dims, shares: Sequence[float]) -> list[Slice]:
    """Divide every layer among ranks in proportion to their shares.

    Up to as many ranks as KV heads get whole KV-head groups; more share a KV head, each with some
    of its query heads. Raises ConfigError for more ranks than query heads.
    """
    columns = deal(dims.num_mlp_columns, shares, "MLP columns", unit=MLP_UNIT)
    vocab = deal(dims.vocab_size, shares, "vocabulary entries", unit=VOCAB_UNIT)
    return [
        Slice(query_heads=heads[0], kv_heads=heads[1], mlp_columns=columns[rank], vocab=vocab[rank])
        for rank, heads in enumerate(_deal_heads(dims, shares))
    ]


def layer_ranges(num_layers: int, shares: Sequence[float]) -> list[Span]:
    """Divide the layers among stages in proportion to their shares. Raises ConfigError."""
    return deal(num_layers, shares, "layers")


def deal(total: int, shares: Sequence[float], what: str, *, unit: int = 1) -> list[Span]:
    """Cut `[0, total)` into one span for each share, none empty, at multiples of `unit`.

    By the largest remainder; what is left below a unit goes to the last. Where there are fewer
    units than shares, cuts are made anywhere. Raises ConfigError when there are more shares than
    things to deal, or a share is not positive.
    """
    unit = unit if total >= unit * len(shares) else 1
    num_units = total // unit
    if not shares or not all(0 < share < math.inf for share in shares):
        raise ConfigError(f"shares of {what} must be positive numbers, got {list(shares)}")
    if len(shares) > num_units:
        raise ConfigError(
            f"{total} {what} cannot be divided into {len(shares)} parts: at most {num_units}"
        )
    spare = num_units - len(shares)  # everyone has one for certain
    scale = num_units / sum(shares)
    wanted = [max(share * scale - 1, 0.0) for share in shares]
    scale = spare / sum(wanted) if spare else 0.0
    exact = [part * scale for part in wanted]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: spare - sum(counts)]:
        counts[i] += 1
    stops, stop = [], 0
    for count in counts:
        stop += (count + 1) * unit
        stops.append(stop)
    stops[-1] = total
    return [Span(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _deal_heads(dims: Dims, shares: Sequence[float]) -> list[tuple[Span, Span]]:
    """(query heads, KV heads) of each rank."""
    num_kv, size = dims.num_kv_heads, dims.group_size
    if len(shares) > dims.num_query_heads:
        raise ConfigError(
            f"the model has {dims.num_query_heads} query heads: at most as many tensor ranks can "
            f"share its layers, not {len(shares)}; use more pipeline stages or replicas instead"
        )
    if len(shares) <= num_kv:
        return [(span.scaled(size), span) for span in deal(num_kv, shares, "KV heads")]
    return [
        (Span(kv * size + part.start, kv * size + part.stop), Span(kv, kv + 1))
        for kv, sharers in enumerate(_sharers(num_kv, size, shares))
        for part in deal(size, sharers, "query heads of a KV head")
    ]


def _sharers(num_kv: int, size: int, shares: Sequence[float]) -> list[Sequence[float]]:
    """The shares of the ranks that hold each KV head: at least one, at most its query heads."""
    groups, first = [], 0
    for kv in range(num_kv):
        heads_after = num_kv - kv - 1
        most = min(size, len(shares) - first - heads_after)
        least = max(1, len(shares) - first - heads_after * size)
        target = sum(shares[first:]) / (heads_after + 1)
        count = least
        while count < most and sum(shares[first : first + count]) < target * (1 - 1e-9):
            count += 1
        groups.append(shares[first : first + count])
        first += count
    return groups
