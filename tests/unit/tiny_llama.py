"""A Llama that benchmarks write and compute in a moment."""

from __future__ import annotations

from bench.llama_shapes import LlamaShape

TINY = LlamaShape(
    name="tiny",
    hidden_size=64,
    mlp_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=10,
    vocab_size=1000,
)
