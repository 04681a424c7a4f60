"""Quantised linears and paged attention against plain torch."""

from __future__ import annotations

import pytest
import torch

from shoal.compute.affine import Affine4, quantize_affine4
from shoal.compute.attention import paged_attention
from shoal.compute.linear import LinearByRows, Scheme, make_embedding, make_linear
from shoal.compute.quantized import DynamicInt8Linear, Float16Linear, Int4Linear, Int8Linear
from shoal.messages import Chunk
from shoal.worker.batch import Batch

BLOCK = 4


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "bound"), [(Int8Linear, 0.01), (DynamicInt8Linear, 0.03), (Float16Linear, 1e-3)]
)
def test_narrow_weights_stay_close_however_unequal_the_rows_are(
    rng: torch.Generator, kind: type[Int8Linear], bound: float
) -> None:
    weight_NK = torch.randn(96, 128, generator=rng)
    x_MK = torch.randn(5, 128, generator=rng) * torch.tensor([[1.0], [1e3], [1e-2], [1.0], [30.0]])
    linear = kind(weight_NK, torch.ones(96))
    expected = x_MK @ weight_NK.T + 1
    for row in range(5):
        assert relative_error(linear(x_MK)[row], expected[row]) < bound
    assert relative_error(linear(x_MK[0]), expected[0]) < bound
    assert torch.equal(linear(torch.zeros(3, 128)), torch.ones(3, 96))


def test_int4_computes_what_its_blocks_stand_for(rng: torch.Generator) -> None:
    blocks = quantize_affine4(torch.randn(64, 64, generator=rng))
    x_MK = torch.randn(3, 64, generator=rng).bfloat16().float()
    # bfloat16 scales and activations: 8 bits of precision.
    assert relative_error(Int4Linear(blocks)(x_MK), x_MK @ blocks.dense().T) < 0.01


def test_rounding_to_4_bits_keeps_representable_weights(rng: torch.Generator) -> None:
    codes = torch.randint(0, 16, (8, 64), generator=rng, dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    blocks = Affine4(codes, torch.full((8, 2), 0.5), torch.full((8, 2), -3.0))
    assert torch.equal(quantize_affine4(blocks.dense()).codes_NK, codes)
    assert torch.equal(blocks.cat(blocks).dense(), blocks.dense().repeat(2, 1))


def test_as_stored_keeps_4_bit_blocks_and_rounds_the_rest_to_8(rng: torch.Generator) -> None:
    blocks = quantize_affine4(torch.randn(64, 64, generator=rng))
    scheme = Scheme(many="float16", few="as_stored", few_rows=3)
    for weight, kind in ((blocks, Int4Linear), (blocks.dense(), Int8Linear)):
        linear = make_linear(weight, None, scheme)
        assert isinstance(linear, LinearByRows)
        assert isinstance(linear.few, kind)
        assert isinstance(linear.many, Float16Linear)


def test_rows_choose_the_kernel() -> None:
    linear = LinearByRows(lambda x: x * 0, lambda x: x * 0 + 1, few_rows=2)
    assert linear(torch.ones(2, 3)).sum() == 0
    assert linear(torch.ones(3, 3)).sum() == 9


def test_bfloat16_weights_are_widened_for_many_rows(rng: torch.Generator) -> None:
    weight_NK = torch.randn(32, 64, generator=rng)
    linear = make_linear(weight_NK, None, Scheme(dtype=torch.bfloat16, widen_rows=2))
    x_MK = torch.randn(4, 64, generator=rng).bfloat16()
    expected = x_MK.float() @ weight_NK.bfloat16().float().T
    for rows in (x_MK[:1], x_MK):
        assert linear(rows).dtype == torch.bfloat16
        assert relative_error(linear(rows).float(), expected[: len(rows)]) < 0.01


def test_an_embedding_is_looked_up_in_the_activations_type(rng: torch.Generator) -> None:
    table_VE = torch.randn(10, 4, generator=rng)
    for scheme in (Scheme(), Scheme(many="int8"), Scheme(dtype=torch.bfloat16)):
        x_TE = make_embedding(table_VE, scheme)([3, 1])
        assert x_TE.dtype == scheme.dtype
        assert relative_error(x_TE.float(), table_VE[[3, 1]]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_table_is_widened_exactly(rng: torch.Generator, dtype: torch.dtype) -> None:
    table_VE = (torch.randn(10, 37, generator=rng) * 1e-3).to(dtype)
    table_VE[3, :4] = torch.tensor([0.0, -0.0, 1e-7, -65504.0])
    embedding = make_embedding(table_VE, Scheme(many="int8"))
    assert torch.equal(embedding([3, 9, 3]), table_VE[[3, 9, 3]].float())
    for token in (10, -1):
        with pytest.raises(IndexError):
            embedding([3, token])


def reference(
    q_QHD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of queries at start, start + 1, … written out."""
    num_queries, num_heads, head_dim = q_QHD.shape
    k_LHD = k_LGD.repeat_interleave(num_heads // k_LGD.shape[1], dim=1)
    v_LHD = v_LGD.repeat_interleave(num_heads // v_LGD.shape[1], dim=1)
    scores_HQL = torch.einsum("qhd,lhd->hql", q_QHD, k_LHD) * head_dim**-0.5
    if softcap is not None:
        scores_HQL = softcap * torch.tanh(scores_HQL / softcap)
    for query in range(num_queries):
        position = start + query
        for key in range(k_LGD.shape[0]):
            if key > position or (window is not None and key <= position - window):
                scores_HQL[:, query, key] = -torch.inf
    return torch.einsum("hql,lhd->qhd", scores_HQL.softmax(-1), v_LHD)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_paged_attention_of_a_mixed_step(
    rng: torch.Generator, window: int | None, softcap: float | None
) -> None:
    """Decodes of unequal length, a chunk in the middle and a fresh prompt, in scattered blocks."""
    num_heads, num_kv_heads, head_dim = 6, 2, 8
    spans = [(0, 5), (1, 1), (17, 1), (6, 4), (9, 1)]  # start, number of new tokens
    free = torch.randperm(40, generator=rng).tolist()
    chunks = []
    for request_id, (start, number) in enumerate(spans):
        num_blocks = -(-(start + number) // BLOCK)
        blocks, free = free[:num_blocks], free[num_blocks:]
        chunks.append(
            Chunk(request_id=request_id, start=start, tokens=[0] * number, block_ids=blocks)
        )
    batch = Batch(chunks, BLOCK)
    keys_SGD = torch.randn(40 * BLOCK, num_kv_heads, head_dim, generator=rng)
    values_SGD = torch.randn(40 * BLOCK, num_kv_heads, head_dim, generator=rng)
    q_THD = torch.randn(len(batch.tokens), num_heads, head_dim, generator=rng)

    out_THD = paged_attention(
        q_THD,
        keys_SGD,
        values_SGD,
        batch.places.groups,
        scale=head_dim**-0.5,
        window=window,
        softcap=softcap,
    )

    assert sorted(chunk.request_id for chunk in batch.chunks) == list(range(len(spans)))
    for chunk, last_row in zip(batch.chunks, batch.last_rows, strict=True):
        length = chunk.start + len(chunk.tokens)
        slots = [chunk.block_ids[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)]
        rows = slice(last_row + 1 - len(chunk.tokens), last_row + 1)
        assert batch.places.slots_T[rows].tolist() == slots[chunk.start :]
        assert batch.positions[rows] == list(range(chunk.start, length))
        expected = reference(
            q_THD[rows], keys_SGD[slots], values_SGD[slots], chunk.start, window, softcap
        )
        torch.testing.assert_close(out_THD[rows], expected, atol=1e-5, rtol=1e-4)


def test_a_cached_token_is_read_where_it_lies_and_stored_where_the_next_will() -> None:
    chunks = [
        Chunk(request_id=0, start=7, tokens=[3], block_ids=[5, 2, 6], is_cached=True),
        Chunk(request_id=1, start=7, tokens=[3], block_ids=[5, 2]),
    ]
    batch = Batch(chunks, 4)
    (group,) = batch.places.groups
    assert group.slots_BL.tolist() == [[20, 21, 22, 23, 8, 9, 10, 11]] * 2
    assert group.positions_BQ.tolist() == [[7], [7]]
    assert batch.places.slots_T.tolist() == [6 * 4, 2 * 4 + 3]


def test_decodes_of_very_unequal_length_are_not_padded_to_the_longest() -> None:
    lengths = [10, 300, 310, 2000]
    chunks = [
        Chunk(request_id=i, start=n - 1, tokens=[1], block_ids=list(range(-(-n // 16))))
        for i, n in enumerate(lengths)
    ]
    groups = Batch(chunks, 16).places.groups
    assert [g.slots_BL.shape for g in groups] == [(1, 10), (2, 310), (1, 2000)]
