"""Checkpoints of random weights in the shapes of Llama 3.2, as folders that any user could have.

Hidden size, heads and MLP are the published ones. There are fewer layers and a smaller vocabulary,
so that they are written and computed in seconds; every layer holds the same numbers. The tokenizer
knows bytes only, which is all that a benchmark's text needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal.models.config import decoder_config
from shoal.weights.inventory import decoder_shapes, layer_prefix

_SPREAD = 0.02
_PREFIX = "model."
_SHARED = "shared.safetensors"


class LlamaShape(msgspec.Struct, frozen=True, kw_only=True):
    """`num_layers` and `vocab_size` are of the whole model."""

    name: str
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int = 128_256
    max_context: int = 131_072

    def config(self, *, num_layers: int, vocab_size: int) -> dict[str, Any]:
        """As its config.json says it. RoPE is the plain one: its scaling costs nothing."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
        }


LLAMA_SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape(
            name="llama-1b",
            hidden_size=2048,
            mlp_size=8192,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            num_layers=16,
        ),
        LlamaShape(
            name="llama-3b",
            hidden_size=3072,
            mlp_size=8192,
            num_heads=24,
            num_kv_heads=8,
            head_dim=128,
            num_layers=28,
        ),
    )
}


def write_checkpoints(
    shape: LlamaShape, layer_counts: list[int], vocab_size: int, folder: Path
) -> dict[int, Path]:
    """One for each number of layers. They share their files: a layer is written once."""
    config = shape.config(num_layers=max(layer_counts), vocab_size=vocab_size)
    torch.manual_seed(0)
    tensors = {
        name: _random(size)
        for name, size in decoder_shapes(decoder_config(config)).items()
        if name.startswith(layer_prefix(0)) or not name.startswith("layers.")
    }
    first = {name: t for name, t in tensors.items() if name.startswith(layer_prefix(0))}
    folder.mkdir(parents=True, exist_ok=True)
    shared = {_PREFIX + name: t for name, t in tensors.items() if name not in first}
    save_file(shared, folder / _SHARED)
    file_of = dict.fromkeys(shared, _SHARED)
    for layer in range(max(layer_counts)):
        own = {
            _PREFIX + name.replace(layer_prefix(0), layer_prefix(layer)): tensor
            for name, tensor in first.items()
        }
        save_file(own, folder / _file_of_layer(layer))
        file_of |= dict.fromkeys(own, _file_of_layer(layer))
    return {
        number: _checkpoint(shape, number, vocab_size, file_of, folder) for number in layer_counts
    }


def _checkpoint(
    shape: LlamaShape, num_layers: int, vocab_size: int, file_of: dict[str, str], folder: Path
) -> Path:
    path = folder / f"{shape.name}-{num_layers}"
    path.mkdir()
    files = [_SHARED, *(_file_of_layer(layer) for layer in range(num_layers))]
    for file in files:
        (path / file).symlink_to(folder.resolve() / file)
    weight_map = {name: file for name, file in file_of.items() if file in files}
    index = {"weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = shape.config(num_layers=num_layers, vocab_size=vocab_size)
    (path / "config.json").write_text(json.dumps(config))
    _byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def _file_of_layer(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _random(size: tuple[int, ...]) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size).mul_(_SPREAD).to(torch.bfloat16)


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
