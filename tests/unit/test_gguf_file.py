"""GGUF files: every block type, permuted rows, slices, bytes read, and damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf_samples import HEAD_DIM, HIDDEN, MLP, NUM_HEADS, NUM_KV_HEADS, random_blocks, write_gguf

from shoal.errors import SourceError, UnsupportedModel
from shoal.weights.gguf_file import GgufFile

TYPES = [
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q8_0,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
]
FOUR_BITS = {Type.Q4_0, Type.Q4_1, Type.Q4_K}
GATE = "model.layers.0.mlp.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


Opener = Callable[[Path], GgufFile]


@pytest.fixture
def opened() -> Iterator[Opener]:
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(GgufFile(path)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter does it, copied from its LlamaModel.permute."""
    return (
        values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


@pytest.mark.parametrize("tensor_type", TYPES, ids=lambda kind: kind.name)
def test_every_type_reads_as_gguf_dequantises_it(
    tensor_type: Type, rng: np.random.Generator, tmp_path: Path, opened: Opener
) -> None:
    raw = random_blocks(rng, MLP, HIDDEN, tensor_type)
    path = write_gguf(tmp_path / "m.gguf", tensors={"blk.0.ffn_gate.weight": (raw, tensor_type)})
    source = opened(path)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, tensor_type).astype(np.float32))

    assert source.shape(GATE) == (MLP, HIDDEN)
    assert torch.equal(source.dense(GATE).float(), expected)
    part = source.dense(GATE, slice(3, 90), slice(40, 200))
    assert torch.equal(part.float(), expected[3:90, 40:200])

    packed = source.affine4(GATE)
    assert (packed is not None) == (tensor_type in FOUR_BITS)
    if packed is not None:
        assert torch.equal(packed.dense(), expected)
        part4 = source.affine4(GATE, slice(3, 90), slice(32, 160))
        assert part4 is not None
        assert torch.equal(part4.dense(), expected[3:90, 32:160])
        assert source.affine4(GATE, None, slice(16, 48)) is None


@pytest.mark.parametrize("tensor_type", [Type.F32, Type.Q8_0, Type.Q4_1, Type.Q4_K])
@pytest.mark.parametrize("rows", [None, slice(HEAD_DIM, 3 * HEAD_DIM), slice(5, 70)])
def test_query_rows_are_those_of_the_checkpoint(
    tensor_type: Type, rows: slice | None, rng: np.random.Generator, tmp_path: Path, opened: Opener
) -> None:
    original = random_blocks(rng, HIDDEN, HIDDEN, tensor_type)
    tensors = {"blk.0.attn_q.weight": (permuted(original, NUM_HEADS), tensor_type)}
    source = opened(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    expected = torch.from_numpy(gguf.quants.dequantize(original, tensor_type))[rows or slice(None)]

    assert torch.equal(source.dense(QUERY, rows), expected)
    packed = source.affine4(QUERY, rows)
    if packed is not None:
        assert torch.equal(packed.dense(), expected)


def test_key_rows_and_biases_are_permuted_back_by_kv_head(
    rng: np.random.Generator, tmp_path: Path, opened: Opener
) -> None:
    num_rows = NUM_KV_HEADS * HEAD_DIM
    weight = random_blocks(rng, num_rows, HIDDEN, Type.F32)
    bias = weight[:, 0].copy()
    tensors = {
        "blk.0.attn_k.weight": (permuted(weight, NUM_KV_HEADS), Type.F32),
        "blk.0.attn_k.bias": (permuted(bias, NUM_KV_HEADS), Type.F32),
    }
    source = opened(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(source.dense(f"{name}.weight"), torch.from_numpy(weight))
    assert torch.equal(source.dense(f"{name}.bias", slice(64, 128)), torch.from_numpy(bias[64:]))


def test_only_llama_is_permuted(rng: np.random.Generator, tmp_path: Path, opened: Opener) -> None:
    weight = random_blocks(rng, HIDDEN, HIDDEN, Type.F32)
    tensors = {"blk.0.attn_q.weight": (weight, Type.F32)}
    path = write_gguf(tmp_path / "m.gguf", architecture="qwen2", tensors=tensors)
    assert torch.equal(opened(path).dense(QUERY), torch.from_numpy(weight))


def test_gemma_norms_lose_the_one_that_the_converter_adds(tmp_path: Path, opened: Opener) -> None:
    norm = np.linspace(-1, 1, HIDDEN, dtype=np.float32)
    tensors = {
        "blk.0.post_ffw_norm.weight": (norm + 1, Type.F32),
        "blk.0.ffn_norm.weight": (norm + 1, Type.F32),
    }
    path = write_gguf(tmp_path / "m.gguf", architecture="gemma3", tensors=tensors, num_layers=7)
    source = opened(path)
    for name in ("post_feedforward_layernorm", "pre_feedforward_layernorm"):
        read = source.dense(f"model.layers.0.{name}.weight")
        assert torch.allclose(read, torch.from_numpy(norm), atol=1e-6)
    assert source.config["layer_types"] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]


def test_half_the_layers_cost_half_the_bytes(
    rng: np.random.Generator, tmp_path: Path, opened: Opener
) -> None:
    tensors = {
        f"blk.{layer}.ffn_gate.weight": (random_blocks(rng, MLP, HIDDEN, Type.Q4_1), Type.Q4_1)
        for layer in range(4)
    }
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors, num_layers=4)

    def cost(layers: int, rows: slice | None = None) -> int:
        source = opened(path)
        for layer in range(layers):
            source.dense(f"model.layers.{layer}.mlp.gate_proj.weight", rows)
        return source.bytes_read

    assert cost(4) == 4 * MLP * HIDDEN // 32 * 20
    assert cost(2) * 2 == cost(4)
    assert cost(4, slice(0, MLP // 2)) * 2 == cost(4)


def test_config_has_the_names_of_hugging_face(tmp_path: Path, opened: Opener) -> None:
    factors = np.array([1.0, 2.0, 8.0], np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        tensors={"rope_freqs.weight": (factors, Type.F32)},
        metadata={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2},
    )
    source = opened(path)
    expected = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "freq_factors", "factors": [1.0, 2.0, 8.0]},
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: source.config[key] for key in expected} == expected
    assert source.names() == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0},
            {"rope_type": "linear", "factor": 8.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(metadata: dict, scaling: dict | None, tmp_path: Path, opened: Opener) -> None:
    assert opened(write_gguf(tmp_path / "m.gguf", metadata=metadata)).config["rope_scaling"] == (
        scaling
    )


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.dimension_count": 32}, "32 of 64"),
        ({"llama.attention.value_length": 32}, "64 for keys and 32"),
    ],
)
def test_models_that_do_not_run_are_refused(metadata: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        GgufFile(write_gguf(tmp_path / "m.gguf", metadata=metadata))


def test_an_unknown_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    raw = np.zeros((4, 84), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", tensors={"blk.0.ffn_gate.weight": (raw, Type.Q2_K)})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_gate\.weight has type Q2_K"):
        GgufFile(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'mamba'"):
        GgufFile(write_gguf(tmp_path / "m.gguf", architecture="mamba"))


def test_a_file_cut_anywhere_is_a_source_error(rng: np.random.Generator, tmp_path: Path) -> None:
    raw = random_blocks(rng, MLP, HIDDEN, Type.Q4_1)
    tensors = {"blk.0.ffn_gate.weight": (raw, Type.Q4_1)}
    whole = write_gguf(tmp_path / "m.gguf", tensors=tensors).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 20, *range(24, 3000, 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            GgufFile(cut)


def test_flipped_header_bytes_never_raise_anything_else(
    rng: np.random.Generator, tmp_path: Path, opened: Opener
) -> None:
    tensors = {"blk.0.attn_q.weight": (random_blocks(rng, HIDDEN, HIDDEN, Type.Q8_0), Type.Q8_0)}
    whole = bytearray(write_gguf(tmp_path / "m.gguf", tensors=tensors).read_bytes())
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(300):
        copy = whole.copy()
        copy[int(rng.integers(0, 1200))] ^= int(rng.integers(1, 256))
        damaged.write_bytes(copy)
        try:
            source = opened(damaged)
            for name in source.names():
                source.dense(name)
        except SourceError:
            refused += 1
    assert refused > 100


def test_unknown_names_and_closed_files(tmp_path: Path) -> None:
    source = GgufFile(write_gguf(tmp_path / "m.gguf"))
    with pytest.raises(SourceError, match="no tensor named x"):
        source.dense("x")
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.dense("model.embed_tokens.weight")
