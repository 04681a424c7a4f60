"""How a model is dealt: everything once, nobody empty-handed, in proportion."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.placement import divide
from shoal.config import Split
from shoal.errors import ConfigError
from shoal.parallel.partition import (
    MLP_UNIT,
    VOCAB_UNIT,
    Dims,
    Slice,
    Span,
    deal,
    layer_ranges,
    shards_of,
    tensor_slices,
    whole_shard,
)

SMOL = Dims(
    num_layers=30, num_query_heads=9, num_kv_heads=3, num_mlp_columns=1536, vocab_size=49152
)
GEMMA = Dims(
    num_layers=18, num_query_heads=4, num_kv_heads=1, num_mlp_columns=2048, vocab_size=262144
)

one_share = st.floats(0.01, 1000, allow_nan=False)
some_shares = st.lists(one_share, min_size=1, max_size=8)


@st.composite
def models(draw: st.DrawFn) -> Dims:
    num_kv_heads, group_size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return Dims(
        num_layers=draw(st.integers(1, 100)),
        num_query_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        num_mlp_columns=draw(st.integers(8, 5000)),
        vocab_size=draw(st.integers(8, 300_000)),
    )


@st.composite
def divided(draw: st.DrawFn) -> tuple[Dims, list[float], list[Slice]]:
    dims = draw(models())
    most = min(8, dims.num_query_heads)
    shares = draw(st.lists(one_share, min_size=1, max_size=most))
    return dims, shares, tensor_slices(dims, shares)


def covers(spans: list[Span], total: int) -> bool:
    """All of [0, total), once, in order, and a part of it in every span."""
    joined = all(before.stop == after.start for before, after in pairwise(spans))
    ends = (spans[0].start, spans[-1].stop) == (0, total)
    return joined and ends and all(len(span) > 0 for span in spans)


@given(shares=some_shares, extra=st.integers(0, 5000), unit=st.integers(1, 64))
def test_a_deal_covers_everything_once_in_whole_units(
    shares: list[float], extra: int, unit: int
) -> None:
    total = len(shares) + extra
    spans = deal(total, shares, "things", unit=unit)
    assert covers(spans, total)
    if total >= unit * len(shares):
        assert all(span.start % unit == 0 for span in spans)


@given(shares=some_shares, num_units=st.integers(8, 2000))
def test_a_deal_is_proportional_to_within_a_unit(shares: list[float], num_units: int) -> None:
    fair = [num_units * share / sum(shares) for share in shares]
    counts = [len(span) for span in deal(num_units, shares, "things")]
    if min(fair) >= 1:
        assert all(abs(count - part) < 1 + 1e-6 for count, part in zip(counts, fair, strict=True))
    by_share = sorted(zip(shares, counts, strict=True))
    ordered = [count for _, count in by_share]
    assert all(less <= more or one == other for (one, less), (other, more) in pairwise(by_share)), (
        f"a larger share got less: {ordered}"
    )


@given(num_things=st.integers(1, 1000), number=st.integers(1, 8))
def test_equal_shares_differ_by_at_most_one(num_things: int, number: int) -> None:
    if number <= num_things:
        counts = [len(span) for span in deal(num_things, [1.0] * number, "things")]
        assert max(counts) - min(counts) <= 1


@given(divided())
def test_slices_cover_every_dim_once(case: tuple[Dims, list[float], list[Slice]]) -> None:
    dims, shares, slices = case
    assert len(slices) == len(shares)
    assert covers([each.query_heads for each in slices], dims.num_query_heads)
    assert covers([each.mlp_columns for each in slices], dims.num_mlp_columns)
    assert covers([each.vocab for each in slices], dims.vocab_size)


@given(divided())
def test_no_unit_that_kernels_need_is_cut(case: tuple[Dims, list[float], list[Slice]]) -> None:
    dims, shares, slices = case
    if dims.num_mlp_columns >= MLP_UNIT * len(shares):
        assert all(each.mlp_columns.start % MLP_UNIT == 0 for each in slices)
    if dims.vocab_size >= VOCAB_UNIT * len(shares):
        assert all(each.vocab.start % VOCAB_UNIT == 0 for each in slices)


@given(divided())
def test_ranks_hold_the_kv_heads_of_their_query_heads(
    case: tuple[Dims, list[float], list[Slice]],
) -> None:
    dims, _, slices = case
    held = {kv for each in slices for kv in range(each.kv_heads.start, each.kv_heads.stop)}
    assert held == set(range(dims.num_kv_heads))
    for each in slices:
        first = each.query_heads.start // dims.group_size
        last = (each.query_heads.stop - 1) // dims.group_size
        assert each.kv_heads == Span(first, last + 1)


@given(divided())
def test_a_kv_head_is_shared_only_where_ranks_outnumber_them(
    case: tuple[Dims, list[float], list[Slice]],
) -> None:
    dims, shares, slices = case
    for each in slices:
        is_whole = len(each.query_heads) == len(each.kv_heads) * dims.group_size
        assert is_whole or len(each.kv_heads) == 1
    if len(shares) <= dims.num_kv_heads:
        assert covers([each.kv_heads for each in slices], dims.num_kv_heads)


@given(num_layers=st.integers(1, 200), shares=some_shares)
def test_every_layer_is_in_one_stage(num_layers: int, shares: list[float]) -> None:
    if len(shares) <= num_layers:
        assert covers(layer_ranges(num_layers, shares), num_layers)


def test_the_real_models_divide_as_documented() -> None:
    assert heads(SMOL, [1, 1]) == [(6, 2), (3, 1)]
    assert heads(SMOL, [30, 70]) == [(3, 1), (6, 2)]
    assert heads(SMOL, [1, 1, 1]) == [(3, 1), (3, 1), (3, 1)]
    assert heads(SMOL, [1, 1, 1, 1]) == [(2, 1), (1, 1), (3, 1), (3, 1)]
    assert heads(GEMMA, [50, 30, 20]) == [(2, 1), (1, 1), (1, 1)]
    assert [len(span) for span in layer_ranges(30, [2, 1])] == [20, 10]


def heads(dims: Dims, shares: list[float]) -> list[tuple[int, int]]:
    """(query heads, KV heads) of each rank."""
    return [(len(s.query_heads), len(s.kv_heads)) for s in tensor_slices(dims, shares)]


def test_a_shard_knows_its_place() -> None:
    first, second = shards_of(SMOL, Span(20, 30), [70, 30])
    assert (first.rank, second.rank, first.num_ranks) == (0, 1, 2)
    assert first.is_last and not first.is_first
    whole = whole_shard(SMOL)
    assert whole.is_first and whole.is_last
    assert whole.slice.query_heads == Span(0, 9) and whole.slice.vocab == Span(0, 49152)


def test_a_split_names_every_worker_once() -> None:
    split = Split(pipeline=3, layers=(3, 17, 10), tensor=2, shares=(70, 30), replicas=2)
    placement = divide(SMOL, split, ["here"])
    seats = [seat for replica in placement.replicas for seat in replica.seats]
    assert len({seat.worker for seat in seats}) == split.num_workers == len(seats)
    stages = placement.replicas[1].stages
    assert [stage[0].shard.layers for stage in stages] == [Span(0, 3), Span(3, 20), Span(20, 30)]
    assert [seat.shard.rank for seat in stages[2]] == [0, 1]


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
def test_shares_that_mean_nothing_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"shares of .* must be positive"):
        tensor_slices(SMOL, [1.0, share])


def test_more_parts_than_things_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"30 layers cannot be divided into 31"):
        layer_ranges(30, [1.0] * 31)
    with pytest.raises(ConfigError, match=r"9 query heads.*not 10"):
        tensor_slices(SMOL, [1.0] * 10)
    with pytest.raises(ConfigError, match=r"\[20, 11\] make 31, the model has 30"):
        divide(SMOL, Split(pipeline=2, layers=(20, 11)), ["here"])
