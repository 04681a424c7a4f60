"""Small random checkpoints of each family, made by transformers, and what it computes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from shoal.compute.linear import Scheme
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.dense_attention import DenseAttend
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import Shard, whole_shard
from shoal.weights.loader import load_decoder

NUM_TOKENS = 40
VOCAB_SIZE = 200

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# At these lengths every branch of each variant is taken: frequencies kept, blended and divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, head_dim=16),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: transformers.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama({"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}),
    "llama-llama3": lambda: _llama(_LLAMA3),
    "llama-yarn": lambda: _llama(_YARN),
    "llama-yarn-factor": lambda: _llama(_YARN | {"attention_factor": 1.7, "truncate": False}),
    "llama-yarn-mscale": lambda: _llama(_YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**_SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, **_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, **_GEMMA, sliding_window_pattern=3),
    "gemma3-scaled": lambda: transformers.Gemma3TextConfig(
        **_SIZES,
        **_GEMMA,
        sliding_window_pattern=2,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
}


def _llama(rope_parameters: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(**_SIZES, head_dim=16, rope_parameters=dict(rope_parameters))


@dataclass
class Golden:
    """A checkpoint in a folder and what transformers made of `tokens_T` in float32."""

    folder: Path
    tokens_T: torch.Tensor
    logits_TV: torch.Tensor


def randomise(model: torch.nn.Module) -> None:
    """Every parameter, norms and biases included, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data.mul_(float(parameter.ndim == 1)).add_(noise, alpha=spread)


@torch.inference_mode()
def make_golden(config: Any, folder: Path) -> Golden:
    # Soft caps exist only in the eager attention of transformers.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model.eval())
    model.save_pretrained(folder)
    tokens_T = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    return Golden(folder, tokens_T, model(tokens_T[None], use_cache=False).logits[0])


def computed(source: Any, tokens_T: torch.Tensor, scheme: Scheme | None = None) -> torch.Tensor:
    """What Shoal makes of them: float32 logits [T, V] of the whole model."""
    shard = whole(decoder_config(source.config))
    decoder = load_decoder(source, shard, scheme=scheme or Scheme(), communicator=Solo())
    tokens: list[int] = tokens_T.tolist()
    x_TE = decoder(decoder.embed(tokens), list(range(len(tokens))), DenseAttend())
    return decoder.logits(x_TE)


def whole(config: DecoderConfig) -> Shard:
    return whole_shard(config.dims)
