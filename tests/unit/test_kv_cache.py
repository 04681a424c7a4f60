"""KV caches in each type: what a token takes, and that both ways of computing hold the same."""

from __future__ import annotations

import pytest
import torch
from shared_models import ALL, CONFIG

from shoal.compute import native
from shoal.compute.attention import paged_attention
from shoal.compute.kv_types import head_bytes, narrow, widen
from shoal.messages import Chunk
from shoal.models.config import decoder_config
from shoal.worker.batch import Batch
from shoal.worker.kv_cache import KVCache, num_blocks_for, slot_bytes

MODEL = decoder_config(CONFIG)
NUM_SLOTS, BLOCK = 64, 4
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.int8: 2e-2}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize(
    ("dtype", "of_64", "of_256"),
    [(torch.float32, 256, 1024), (torch.float16, 128, 512), (torch.int8, 66, 264)],
)
def test_what_a_head_of_a_token_takes(dtype: torch.dtype, of_64: int, of_256: int) -> None:
    assert (head_bytes(dtype, 64), head_bytes(dtype, 256)) == (of_64, of_256)
    num_heads = 2 * MODEL.num_layers * MODEL.num_kv_heads
    assert slot_bytes(MODEL, ALL, dtype) == num_heads * head_bytes(dtype, MODEL.head_dim)
    cache = KVCache(MODEL, ALL, num_slots=NUM_SLOTS, dtype=dtype)
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert held == NUM_SLOTS * slot_bytes(MODEL, ALL, dtype)


def test_the_same_memory_holds_more_tokens_in_fewer_bits() -> None:
    exact, half, eighth = (
        num_blocks_for(MODEL, ALL, dtype, block_size=16, kv_memory_bytes=2**20)
        for dtype in (torch.float32, torch.float16, torch.int8)
    )
    assert half == pytest.approx(2 * exact, abs=1)
    assert eighth * head_bytes(torch.int8, MODEL.head_dim) == pytest.approx(
        half * 2 * MODEL.head_dim, rel=0.01
    )


def test_what_comes_out_is_what_went_in_but_for_its_rounding(rng: torch.Generator) -> None:
    x = torch.randn(5, 3, 64, generator=rng) * torch.tensor([1e-3, 1.0, 50.0]).unsqueeze(-1)
    for dtype, precision in PRECISION.items():
        back = widen(narrow(x, dtype), torch.float32)
        largest = x.abs().amax(dim=-1, keepdim=True)
        assert ((back - x).abs() <= precision / 2 * largest).all(), dtype
        assert torch.equal(narrow(x[3:4], dtype), narrow(x, dtype)[3:4])
    beyond = torch.full((1, 8), 1e9)
    assert widen(narrow(beyond, torch.float16), torch.float32).isfinite().all()


def attend(
    dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[KVCache, torch.Tensor]:
    """Of three sequences, all of whose tokens come in this step."""
    chunks = [
        Chunk(request_id=i, start=0, tokens=[0] * 12, block_ids=[i, 5 + i, 10 + i])
        for i in range(3)
    ]
    batch = Batch(chunks, BLOCK)
    cache = KVCache(MODEL, ALL, num_slots=NUM_SLOTS, dtype=dtype)
    keys, values = cache.write(0, batch.places.slots_T, k, v)
    return cache, paged_attention(q, keys, values, batch.places.groups, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_torch_and_the_native_kernels_agree(
    rng: torch.Generator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(36, MODEL.num_heads, MODEL.head_dim, generator=rng)
    k, v = torch.randn(2, 36, MODEL.num_kv_heads, MODEL.head_dim, generator=rng).unbind()
    _, exact = attend(torch.float32, q, k, v)
    cache, out = attend(dtype, q, k, v)
    monkeypatch.setattr(native, "kernels", None)
    plain_cache, plain_out = attend(dtype, q, k, v)
    assert torch.equal(cache.keys[0], plain_cache.keys[0])
    assert torch.equal(cache.values[0], plain_cache.values[0])
    torch.testing.assert_close(out, plain_out)
    assert (out - exact).norm() <= PRECISION[dtype] * exact.norm()


def test_activations_in_bfloat16_may_be_held_in_8_bits(rng: torch.Generator) -> None:
    q = torch.randn(36, MODEL.num_heads, MODEL.head_dim, generator=rng)
    k, v = torch.randn(2, 36, MODEL.num_kv_heads, MODEL.head_dim, generator=rng).unbind()
    _, exact = attend(torch.float32, q, k, v)
    _, out = attend(torch.int8, *(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 3e-2 * exact.norm()
