"""Tiny GGUF files with random blocks of any type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

HIDDEN, MLP, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 4, 2, 64, 64


def random_blocks(
    rng: np.random.Generator, rows: int, columns: int, tensor_type: GGMLQuantizationType
) -> np.ndarray[Any, Any]:
    """Blocks quantised by gguf where it can; else random bytes with finite fp16 scales."""
    if tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.float32 if tensor_type == GGMLQuantizationType.F32 else np.float16
        return rng.standard_normal((rows, columns)).astype(dtype)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    try:
        return gguf.quants.quantize(values, tensor_type)
    except NotImplementedError:
        block_values, block_bytes = GGML_QUANT_SIZES[tensor_type]
        raw = rng.integers(0, 256, (rows, columns // block_values, block_bytes), dtype=np.uint8)
        scale_at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[tensor_type.name]
        for offset in scale_at:
            halves = rng.uniform(0.001, 0.1, (*raw.shape[:2], 1)).astype(np.float16)
            raw[..., offset : offset + 2] = halves.view(np.uint8)
        return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tensors: dict[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]] | None = None,
    num_layers: int = 1,
    metadata: dict[str, Any] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"token {index}" for index in range(VOCAB)])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key, value)
    embedding = np.zeros((VOCAB, HIDDEN), np.float32)
    named = {"token_embd.weight": (embedding, GGMLQuantizationType.F32)} | (tensors or {})
    for name, (values, tensor_type) in named.items():
        writer.add_tensor(name, values, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
