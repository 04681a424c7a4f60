"""The native kernels against plain torch, and each row against itself in other company."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from each_isa import by_avx2_and_avx512, isa, kernels  # noqa: F401  # a fixture is used by its name

from shoal.compute import native
from shoal.compute.affine import Affine4, quantize_affine4
from shoal.compute.kv_types import held_width, narrow, widen
from shoal.compute.native import Activation, GatedLinear, NativeLinear, NormedLinear

ROWS = (1, 2, 5, 7, 13, 130)
KV_DTYPES = (torch.float32, torch.float16, torch.int8)
ACTIVATIONS: dict[Activation, object] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def blocks_of(weight_NK: torch.Tensor) -> Affine4:
    """As a file holds them, with float16 scales."""
    blocks = quantize_affine4(weight_NK)
    return Affine4(
        blocks.codes_NK, blocks.scales_NG.half().float(), blocks.minimums_NG.half().float()
    )


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded as the kernels round them."""
    groups = F.pad(x, (0, -x.shape[-1] % 32)).view(*x.shape[:-1], -1, 32)
    steps = groups.abs().amax(dim=-1, keepdim=True) / 127
    return ((groups / steps).round() * steps).nan_to_num().flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (13, 96), (8, 50)])
def test_a_product_is_that_of_the_rounded_numbers(
    rng: torch.Generator, rows: int, columns: int
) -> None:
    weight_NK = torch.randn(rows, columns, generator=rng)
    bias_N = torch.randn(rows, generator=rng)
    weights: list[tuple[torch.Tensor | Affine4, torch.Tensor]] = [(weight_NK, weight_NK)]
    if columns % 32 == 0:
        blocks = blocks_of(weight_NK)
        weights.append((blocks, blocks.dense()))
    for given, dense_NK in weights:
        linear = NativeLinear(given, bias_N)
        for num_rows in ROWS:
            x_MK = torch.randn(num_rows, columns, generator=rng)
            expected = in_8_bits(x_MK) @ dense_NK.T + bias_N
            # 8-bit weights are rounded too; for 4-bit ones only ties round otherwise.
            assert error(linear(x_MK), expected) < (2e-3 if given is not weight_NK else 1e-2)


@pytest.mark.parametrize("columns", [50, 64, 96, 330])
def test_a_row_is_the_same_in_any_company(rng: torch.Generator, columns: int) -> None:
    weight_NK = torch.randn(40, columns, generator=rng)
    blocks = [blocks_of(weight_NK)] if columns % 32 == 0 else []
    x_MK = torch.randn(max(ROWS), columns, generator=rng)
    for given in (weight_NK, *blocks):
        linear = NativeLinear(given)
        every = linear(x_MK)
        for num_rows in ROWS:
            assert torch.equal(linear(x_MK[-num_rows:]), every[-num_rows:])
        for row in range(len(x_MK)):
            assert torch.equal(linear(x_MK[row]), every[row])
        assert torch.equal(linear(torch.zeros(2, columns)), torch.zeros(2, 40))


@pytest.mark.parametrize("columns", [64, 50, 576])
def test_avx2_and_avx512_give_the_same_bits(rng: torch.Generator, columns: int) -> None:
    """So that an answer goes on alike when a machine of another age takes over."""
    weight_NK = torch.randn(41, columns, generator=rng)
    blocks = [blocks_of(weight_NK)] if columns % 32 == 0 else []
    x_MK = torch.randn(19, columns, generator=rng) * 30
    for given in (weight_NK, *blocks):
        linear = NativeLinear(given, torch.randn(41, generator=rng))
        for num_rows in range(1, 20):
            assert torch.equal(*by_avx2_and_avx512(partial(linear, x_MK[:num_rows])))


def test_rows_may_be_views_and_of_other_types(rng: torch.Generator) -> None:
    linear = NativeLinear(torch.randn(16, 32, generator=rng))
    wide = torch.randn(5, 3, 96, generator=rng)
    part = wide[:, 1, 32:64]
    assert torch.equal(linear(part), linear(part.contiguous()))
    assert torch.equal(
        linear(wide[..., :32]), linear(wide[..., :32].reshape(-1, 32)).view(5, 3, 16)
    )
    assert linear(part.bfloat16()).dtype == torch.bfloat16


def test_norm_and_gate_are_done_on_the_way(rng: torch.Generator) -> None:
    weight_NK = torch.randn(24, 72, generator=rng)
    linear = NativeLinear(weight_NK)
    x_MK, scale_K = torch.randn(6, 72, generator=rng) * 3, torch.randn(72, generator=rng)
    normed = F.rms_norm(x_MK, (72,), scale_K, 1e-5)
    assert error(NormedLinear(linear, scale_K, 1e-5)(x_MK), linear(normed)) < 2e-3
    gate_up = torch.randn(6, 144, generator=rng) * 2
    gate, up = gate_up.chunk(2, dim=-1)
    for activation, function in ACTIVATIONS.items():
        expected = linear(function(gate) * up)  # type: ignore[operator]
        assert error(GatedLinear(linear, activation)(gate_up), expected) < 2e-3


def test_heads_are_turned_where_they_lie(rng: torch.Generator) -> None:
    qkv = torch.randn(9, 5, 24, generator=rng)
    x = qkv[:, :3]
    cos, sin = torch.randn(2, 9, 1, 24, generator=rng).unbind()
    expected = x * cos + x.roll(12, -1) * sin
    rest = qkv[:, 3:].clone()
    native.rotate(x, cos, sin)
    torch.testing.assert_close(x, expected)
    assert torch.equal(qkv[:, 3:], rest)


def attended(
    q_QHD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    *,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The last queries of a sequence, written out in double precision."""
    num_queries, num_heads, head_dim = q_QHD.shape
    num_keys, num_kv_heads, _ = k_LGD.shape
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1).double() for x in (k_LGD, v_LGD))
    scores = torch.einsum("qhd,lhd->hql", q_QHD.double(), k) * head_dim**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    own = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    keys = torch.arange(num_keys)
    hidden = (keys > own) | (keys <= own - (window or num_keys))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hql,lhd->qhd", weights, v).float()


def caches(num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Of keys and of values, with what nobody should read."""
    shape = (2, num_slots, num_kv_heads, held_width(dtype, head_dim))
    return torch.full(shape, 99 if dtype == torch.int8 else torch.nan, dtype=dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 144])
def test_a_cache_holds_what_torch_would_have_stored(
    rng: torch.Generator, kv_dtype: torch.dtype, head_dim: int
) -> None:
    sizes = torch.tensor([0.0, 1e-7, 1e-5, 1e-3, 0.3, 1.0, 20.0, 1e4, 1e6, 1e9]).view(-1, 1, 1)
    k_TGD = torch.randn(10, 2, head_dim, generator=rng) * sizes
    v_TGD = k_TGD.flip(0)
    slots_T = torch.tensor([3, 9, 1, 15, 0, 4, 12, 11, 6, 8])
    keys, values = caches(16, 2, head_dim, kv_dtype).unbind()
    native.store(keys, values, k_TGD, v_TGD, slots_T)
    for cache, x_TGD in ((keys, k_TGD), (values, v_TGD)):
        held = cache[slots_T]
        assert torch.equal(held, narrow(x_TGD, kv_dtype))
        usual = slice(3, 7)
        precise = {torch.float32: 0.0, torch.float16: 5e-4, torch.int8: 1e-2}[kv_dtype]
        assert error(widen(held, torch.float32)[usual], x_TGD[usual]) <= precise
    untouched = sorted(set(range(16)) - set(slots_T.tolist()))
    assert torch.equal(
        keys[untouched].nan_to_num(), caches(6, 2, head_dim, kv_dtype)[0].nan_to_num()
    )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 64), (3, 3, 40), (4, 1, 96)]
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (11, None), (None, 2.0), (9, 5.0)])
def test_attention_of_chunks_and_of_single_queries(
    rng: torch.Generator,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    kv_dtype: torch.dtype,
) -> None:
    num_keys, num_slots = 45, 64
    k_LGD, v_LGD = torch.randn(2, num_keys, num_kv_heads, head_dim, generator=rng).unbind()
    q_LHD = torch.randn(num_keys, num_heads, head_dim, generator=rng)
    slots_L = torch.randperm(num_slots, generator=rng)[:num_keys]
    keys, values = caches(num_slots, num_kv_heads, head_dim, kv_dtype).unbind()
    assert native.can_attend(q_LHD, keys)
    native.store(keys, values, k_LGD, v_LGD, slots_L)
    how = {"window": window, "softcap": softcap}

    def attend(first: int, stop: int) -> torch.Tensor:
        q = q_LHD[first:stop]
        out = torch.empty_like(q)
        positions = torch.arange(first, stop).unsqueeze(0)
        native.attend(
            q, keys, values, slots_L[None, :stop], positions, out, scale=head_dim**-0.5, **how
        )
        return out

    whole = attend(0, num_keys)
    k_LGD, v_LGD = (widen(cache[slots_L], torch.float32) for cache in (keys, values))
    torch.testing.assert_close(whole, attended(q_LHD, k_LGD, v_LGD, **how))
    for first, stop in ((0, 1), (7, 8), (8, 9), (44, 45), (3, 30), (17, 45)):
        assert torch.equal(attend(first, stop), whole[first:stop])


EDGES = (0, 7, 31, 32, 33, 254, 255, 256, 257, 288, 511, 512, 513, 529)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "softcap"),
    [(9, 3, 64, None, None), (5, 1, 80, 300, None), (8, 1, 128, 33, 4.0), (4, 2, 256, 257, None)],
)
def test_attention_does_not_know_how_keys_and_queries_are_shared_out(
    rng: torch.Generator,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    kv_dtype: torch.dtype,
) -> None:
    num_keys = EDGES[-1] + 1
    k_LGD, v_LGD = torch.randn(2, num_keys, num_kv_heads, head_dim, generator=rng).unbind()
    q_LHD = torch.randn(num_keys, num_heads, head_dim, generator=rng) * 3
    slots_L = torch.randperm(600, generator=rng)[:num_keys]
    keys, values = caches(600, num_kv_heads, head_dim, kv_dtype).unbind()
    native.store(keys, values, k_LGD, v_LGD, slots_L)

    def attend(positions_BQ: torch.Tensor) -> torch.Tensor:
        """Sequences that share their keys."""
        q, positions_BQ = q_LHD[positions_BQ.flatten()], positions_BQ.contiguous()
        out, slots_BL = torch.empty_like(q), slots_L.repeat(len(positions_BQ), 1)
        how = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
        native.attend(q, keys, values, slots_BL, positions_BQ, out, **how)
        return out

    edges = torch.tensor(EDGES)
    drafts = torch.tensor([254, 509, 27, 500]).unsqueeze(1) + torch.arange(5)
    # All at once; one query of each; a few of each; and each thread a span of one sequence.
    whole = attend(torch.arange(num_keys).unsqueeze(0))
    assert torch.equal(attend(edges.unsqueeze(1)), whole[edges])
    assert torch.equal(attend(drafts), whole[drafts.flatten()])
    for number in (1, 4):
        native.set_num_threads(number)
        for edge in (255, 256, 529):
            assert torch.equal(attend(torch.tensor([[edge]])), whole[edge : edge + 1])
        assert torch.equal(attend(torch.arange(250, 290).unsqueeze(0)), whole[250:290])
    k_LGD, v_LGD = (widen(cache[slots_L], torch.float32) for cache in (keys, values))
    last = attended(q_LHD[-40:], k_LGD, v_LGD, window=window, softcap=softcap)
    torch.testing.assert_close(whole[-40:], last, atol=2e-5, rtol=2e-5)


def test_a_key_that_is_not_a_number_stays_with_those_who_see_it(rng: torch.Generator) -> None:
    keys, values = torch.randn(2, 320, 1, 16, generator=rng).unbind()
    q = torch.randn(320, 3, 16, generator=rng)
    slots, positions = torch.arange(320).unsqueeze(0), torch.arange(320).unsqueeze(0)
    how = {"scale": 0.25, "window": 40, "softcap": None}
    out, marred = torch.empty_like(q), torch.empty_like(q)
    native.attend(q, keys, values, slots, positions, out, **how)
    keys[260] = values[270] = torch.nan
    native.attend(q, keys, values, slots, positions, marred, **how)
    sees = (torch.arange(320) >= 260) & (torch.arange(320) < 310)
    assert torch.equal(marred[~sees], out[~sees])
    assert marred[sees].isnan().all()


def test_sequences_of_a_group_do_not_meet(rng: torch.Generator) -> None:
    keys, values = torch.randn(2, 32, 1, 16, generator=rng).unbind()
    q = torch.randn(3, 2, 16, generator=rng)
    slots = torch.stack([torch.arange(i * 8, i * 8 + 8) for i in range(3)])
    positions = torch.tensor([[7], [2], [5]])
    out = torch.empty_like(q)
    how = {"scale": 0.25, "window": None, "softcap": None}
    native.attend(q, keys, values, slots, positions, out, **how)
    for i in range(3):
        alone = torch.empty_like(q[:1])
        native.attend(
            q[i : i + 1], keys, values, slots[i : i + 1], positions[i : i + 1], alone, **how
        )
        assert torch.equal(alone[0], out[i])


def test_a_slot_that_is_not_there_is_refused() -> None:
    keys, values = torch.zeros(2, 8, 1, 16).unbind()
    q, positions = torch.zeros(1, 2, 16), torch.tensor([[2]])
    how = {"scale": 1.0, "window": None, "softcap": None}
    for bad in (-1, 8):
        with pytest.raises(IndexError, match="does not have"):
            native.store(keys, values, q[:, :1], q[:, :1], torch.tensor([bad]))
        with pytest.raises(IndexError, match="does not have"):
            slots = torch.tensor([[0, bad, 1]])
            native.attend(q, keys, values, slots, positions, q.clone(), **how)
    with pytest.raises(IndexError, match="beyond"):
        native.attend(q, keys, values, torch.tensor([[0, 1]]), positions, q.clone(), **how)


def test_threads_share_what_there_is_to_do(rng: torch.Generator) -> None:
    linear = NativeLinear(torch.randn(512, 256, generator=rng))
    x = torch.randn(64, 256, generator=rng)
    expected = linear(x)
    for number in (1, 2, 5, 3):
        native.set_num_threads(number)
        assert kernels.num_threads() == number
        for _ in range(20):
            assert torch.equal(linear(x), expected)


def test_two_callers_at_once_get_what_each_would_alone(rng: torch.Generator) -> None:
    linear = NativeLinear(torch.randn(512, 256, generator=rng))
    inputs = [torch.randn(rows, 256, generator=rng) for rows in (1, 8, 64, 64)]
    expected = [linear(x) for x in inputs]

    def are_right(index: int) -> bool:
        return all(torch.equal(linear(inputs[index]), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(len(inputs)) as callers:
        answers = callers.map(are_right, range(len(inputs)))
        for number in (2, 3, 1, 4) * 5:
            native.set_num_threads(number)
        assert all(answers)
