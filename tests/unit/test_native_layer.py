"""Half a layer in one native call against the same half in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from communicator_mesh import MEMORY_KERNELS, run_ranks, shared_memory
from each_isa import by_avx2_and_avx512
from msgspec.structs import replace
from shared_models import ALL, CONFIG

from shoal.compute.native import Activation, NativeLinear
from shoal.compute.native_layer import NativeLayers
from shoal.errors import PeerLost
from shoal.messages import Chunk
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.decoder import Decoder
from shoal.models.layers import (
    Attention,
    DecoderLayer,
    GatedMLP,
    HeadNorm,
    Residual,
    RMSNorm,
    gated,
    normed,
)
from shoal.models.rope import RotaryEmbedding
from shoal.parallel.communicator import Communicator, Solo
from shoal.parallel.shared_memory import SharedMemory
from shoal.worker.batch import Batch
from shoal.worker.kv_cache import KVCache
from shoal.worker.runner import PagedAttend

MODEL = decoder_config(CONFIG)
LAYER = MODEL.num_layers - 1
BLOCK = 4
# Two decodes, one of them of a cached token, one with guesses, a prompt's first chunk and a later
# one: 1 + 1 + 3 + 9 + 6 rows.
CHUNKS = [
    Chunk(request_id=0, start=5, tokens=[0], block_ids=[1, 0]),
    Chunk(request_id=1, start=6, tokens=[0, 0, 0], block_ids=[2, 3, 4], num_drafted=2),
    Chunk(request_id=2, start=0, tokens=[0] * 9, block_ids=[5, 7, 6]),
    Chunk(request_id=3, start=8, tokens=[0] * 6, block_ids=[8, 9, 10, 11]),
    Chunk(request_id=4, start=11, tokens=[0], block_ids=[14, 12, 13, 15], is_cached=True),
]
BATCH = Batch(CHUNKS, BLOCK)
ALONE = Residual(None, None)
RESIDUALS = (ALONE, Residual(lambda y_TE: y_TE, None))


class WithoutKernels(Solo):
    """Ranks that kernels cannot add up: each half of a layer is a call of its own."""

    num_ranks = 2


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def linear(rng: torch.Generator, rows: int, columns: int, *, with_bias: bool) -> NativeLinear:
    bias_N = torch.randn(rows, generator=rng) if with_bias else None
    return NativeLinear(torch.randn(rows, columns, generator=rng), bias_N)


def norm(rng: torch.Generator) -> RMSNorm:
    return RMSNorm(torch.randn(MODEL.hidden_size, generator=rng), 1e-5)


def attention(
    rng: torch.Generator,
    model: DecoderConfig,
    residual: Residual,
    *,
    with_bias: bool,
    with_qk_norm: bool,
    layer: int = LAYER,
) -> Attention:
    num_heads, num_kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim
    rows = (num_heads + 2 * num_kv_heads) * size
    weight_JD = torch.randn(num_heads + num_kv_heads, size, generator=rng)
    return Attention(
        model,
        layer,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        qkv=normed(norm(rng), linear(rng, rows, model.hidden_size, with_bias=with_bias)),
        output=linear(rng, model.hidden_size, num_heads * size, with_bias=with_bias),
        qk_norm=HeadNorm(weight_JD, 1e-6) if with_qk_norm else None,
        residual=residual,
    )


class InParts(PagedAttend):
    """Without the step that halves need."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        super().__init__(cache, batch)
        self.native_step = None


def cache_with_past(rng: torch.Generator, dtype: torch.dtype) -> KVCache:
    cache = KVCache(MODEL, ALL, num_slots=16 * BLOCK, dtype=dtype)
    slots_S = torch.arange(cache.num_slots)
    past = torch.randn(
        2, cache.num_slots, MODEL.num_kv_heads, MODEL.head_dim, generator=rng
    ).unbind()
    cache.write(LAYER, slots_S, *past)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("with_bias", "with_qk_norm", "window", "softcap"),
    [(False, False, None, None), (True, True, None, 3.0), (False, True, 5, None)],
)
def test_attention_at_once_is_what_its_parts_make(
    rng: torch.Generator,
    dtype: torch.dtype,
    with_bias: bool,
    with_qk_norm: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    layers = [replace(layer, window=window) for layer in MODEL.layers]
    model = replace(MODEL, layers=tuple(layers), attention_softcap=softcap)
    first = rng.get_state()
    one, in_two = (
        attention(rng.set_state(first), model, each, with_bias=with_bias, with_qk_norm=with_qk_norm)
        for each in RESIDUALS
    )
    rotation = RotaryEmbedding(model.layers[0].rope, model.head_dim, torch.float32)(BATCH.positions)
    x_TE = torch.randn(len(BATCH.tokens), model.hidden_size, generator=rng)
    state = rng.get_state()
    caches = []
    for _ in range(2):
        rng.set_state(state)
        caches.append(cache_with_past(rng, dtype))
    at_once = PagedAttend(caches[0], BATCH)
    assert at_once.native_step is not None
    y_TE = one(x_TE, rotation, at_once)
    assert torch.equal(in_two(x_TE, rotation, at_once), y_TE)
    expected_TE = one(x_TE, rotation, InParts(caches[1], BATCH))
    # Norms of heads are torch's in parts, and round otherwise.
    tolerance = 1e-2 if with_qk_norm else 0.0
    assert float((y_TE - expected_TE).norm() / expected_TE.norm()) <= tolerance
    written = BATCH.places.slots_T
    for kept, expected in zip(caches[0].keys, caches[1].keys, strict=True):
        assert with_qk_norm or torch.equal(kept[written], expected[written])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_an_mlp_at_once_is_what_its_parts_make(
    rng: torch.Generator, activation: Activation, num_rows: int
) -> None:
    hidden, inner = MODEL.hidden_size, 72
    gate_up = normed(norm(rng), linear(rng, 2 * inner, hidden, with_bias=True))
    down = linear(rng, hidden, inner, with_bias=True)
    x_TE = torch.randn(num_rows, hidden, generator=rng)
    expected_TE = x_TE + gated(activation, down)(gate_up(x_TE))
    for residual in RESIDUALS:
        assert torch.equal(GatedMLP(gate_up, down, activation, residual)(x_TE), expected_TE)


def layers_of(model: DecoderConfig, residual: Residual, seed: int = 5) -> list[DecoderLayer]:
    rng = torch.Generator().manual_seed(seed)
    return [
        DecoderLayer(
            attention(rng, model, residual, with_bias=True, with_qk_norm=False, layer=layer),
            GatedMLP(
                normed(norm(rng), linear(rng, 2 * 72, MODEL.hidden_size, with_bias=True)),
                linear(rng, MODEL.hidden_size, 72, with_bias=False),
                "silu",
                residual,
            ),
        )
        for layer in range(model.num_layers)
    ]


def decoder_of(
    model: DecoderConfig, communicator: Communicator, residual: Residual = ALONE, seed: int = 5
) -> Decoder:
    layers = layers_of(model, residual, seed)
    return Decoder(model, ALL, dtype=torch.float32, layers=layers, communicator=communicator)


def test_all_layers_at_once_are_what_each_of_them_makes(rng: torch.Generator) -> None:
    # Every other layer's heads are turned otherwise.
    other = replace(MODEL.layers[0].rope, theta=500.0)
    layers = [replace(one, rope=other) if i % 2 else one for i, one in enumerate(MODEL.layers)]
    model = replace(MODEL, layers=tuple(layers))
    x_TE = torch.randn(len(BATCH.tokens), model.hidden_size, generator=rng)
    before_TE = x_TE.clone()
    state = rng.get_state()
    outputs, caches = [], []
    for communicator in (Solo(), WithoutKernels()):
        caches.append(cache_with_past(rng.set_state(state), torch.float16))
        decoder = decoder_of(model, communicator)
        attend = PagedAttend(caches[-1], BATCH)
        outputs.append(decoder(x_TE, BATCH.positions, attend))
        apart_TE = torch.zeros(len(x_TE), model.hidden_size + 3)[:, 1:-2].copy_(x_TE)
        assert torch.equal(decoder(apart_TE, BATCH.positions, attend), outputs[-1])
        for rows in ([], [0], [len(x_TE) - 1], [1, 2, len(x_TE) - 2], list(range(len(x_TE)))):
            read_RE = decoder(apart_TE, BATCH.positions, attend, rows)
            assert torch.equal(read_RE, outputs[-1][rows])
    assert torch.equal(*outputs)
    assert torch.equal(x_TE, before_TE)
    for kept, expected in zip(caches[0].keys, caches[1].keys, strict=True):
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("slot_bytes", [4096, 1 << 20])
def test_ranks_add_up_in_the_midst_of_all_layers(
    rng: torch.Generator, tmp_path: Path, slot_bytes: int
) -> None:
    """In one piece and in several, and as ranks do that add each half of a layer by itself."""
    x_TE = torch.randn(len(BATCH.tokens), MODEL.hidden_size, generator=rng)
    read = [1, 5, len(x_TE) - 1]
    groups, sent_bytes = [], []
    for kernels in MEMORY_KERNELS.values():
        ranks = shared_memory(3, tmp_path, timeout_s=20, slot_bytes=slot_bytes, kernels=kernels)

        def decoded(rank: int, ranks: list[SharedMemory] = ranks) -> list[torch.Tensor]:
            residual = Residual(ranks[rank].all_reduce, None)
            decoder = decoder_of(MODEL, ranks[rank], residual, seed=rank)
            own = torch.Generator().manual_seed(rank)
            attend = PagedAttend(cache_with_past(own, torch.float16), BATCH)
            return [decoder(x_TE, BATCH.positions, attend, rows) for rows in (None, read, [])]

        groups.append(run_ranks(3, decoded))
        assert len({each.sent_bytes for each in ranks}) == 1
        sent_bytes.append(ranks[0].sent_bytes)
    first = groups[0][0]
    for group in groups:
        for outputs in group:
            assert all(map(torch.equal, outputs, first))
    assert torch.equal(first[1], first[0][read])
    # Kernels leave out, in the last layer, rows that nobody reads.
    assert sent_bytes[0] < sent_bytes[1] == sent_bytes[2]


def test_a_rank_that_does_not_come_in_the_midst_of_layers_is_lost(
    rng: torch.Generator, tmp_path: Path
) -> None:
    x_TE = torch.randn(len(BATCH.tokens), MODEL.hidden_size, generator=rng)
    attend = PagedAttend(cache_with_past(rng, torch.float16), BATCH)
    waits, _ = shared_memory(2, tmp_path, timeout_s=0.2)
    decoder = decoder_of(MODEL, waits, Residual(waits.all_reduce, None))
    assert waits.native_ranks is not None
    with pytest.raises(PeerLost, match="rank 1 has been silent"):
        decoder(x_TE, BATCH.positions, attend)
    waits.close()
    with pytest.raises(PeerLost, match="has closed"):
        decoder(x_TE, BATCH.positions, attend)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8])
def test_layers_give_the_same_bits_with_avx2_and_avx512(
    rng: torch.Generator, kv_dtype: torch.dtype
) -> None:
    x_TE = torch.randn(len(BATCH.tokens), MODEL.hidden_size, generator=rng)
    state = rng.get_state()

    def decoded() -> torch.Tensor:
        decoder = decoder_of(MODEL, Solo())
        attend = PagedAttend(cache_with_past(rng.set_state(state), kv_dtype), BATCH)
        return decoder(x_TE, BATCH.positions, attend)

    assert torch.equal(*by_avx2_and_avx512(decoded))


def test_caches_of_other_layers_are_refused(rng: torch.Generator) -> None:
    layers = [one for layer in layers_of(MODEL, ALONE) if (one := layer.native_halves)]
    ropes = [(torch.ones(MODEL.head_dim // 2), 1.0)]
    attend = PagedAttend(cache_with_past(rng, torch.float32), BATCH)
    x_TE = torch.zeros(len(BATCH.tokens), MODEL.hidden_size)
    assert attend.native_step is not None
    with pytest.raises(ValueError, match="other layers"):
        NativeLayers(layers[:1], ropes, [0])(x_TE, attend.native_step)


def test_rows_that_a_step_has_not_cannot_be_read(rng: torch.Generator) -> None:
    decoder = decoder_of(MODEL, Solo())
    attend = PagedAttend(cache_with_past(rng, torch.float32), BATCH)
    x_TE = torch.zeros(len(BATCH.tokens), MODEL.hidden_size)
    for rows in ([-1], [len(x_TE)], [1, 1], [2, 0]):
        with pytest.raises(IndexError, match="rows that the step"):
            decoder(x_TE, BATCH.positions, attend, rows)


def test_a_step_of_other_rows_is_refused(rng: torch.Generator) -> None:
    one = attention(rng, MODEL, RESIDUALS[0], with_bias=False, with_qk_norm=False)
    rotary = RotaryEmbedding(MODEL.layers[0].rope, MODEL.head_dim, torch.float32)
    attend = PagedAttend(cache_with_past(rng, torch.float32), BATCH)
    with pytest.raises(ValueError, match="another step"):
        one(torch.zeros(2, MODEL.hidden_size), rotary([0, 1]), attend)


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(request_id=0, start=7, tokens=[0, 0], block_ids=[0, 1]),
        Chunk(request_id=0, start=7, tokens=[0], block_ids=[0, 1], is_cached=True),
        Chunk(request_id=0, start=-1, tokens=[0], block_ids=[0]),
    ],
    ids=["too few", "none for the next", "before the first"],
)
def test_tokens_that_no_block_holds_are_refused(chunk: Chunk) -> None:
    with pytest.raises(IndexError, match="no block"):
        Batch([chunk], BLOCK).native_places()


def test_a_slot_that_the_cache_has_not_is_refused(rng: torch.Generator) -> None:
    batch = Batch([Chunk(request_id=0, start=1, tokens=[0], block_ids=[16])], BLOCK)
    attend = PagedAttend(cache_with_past(rng, torch.float32), batch)
    decoder = decoder_of(MODEL, Solo())
    with pytest.raises(IndexError, match="a slot"):
        decoder(torch.zeros(1, MODEL.hidden_size), batch.positions, attend)
