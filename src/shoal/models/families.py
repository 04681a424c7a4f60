"""The decoder families, as data: how each departs from the common trunk.

`defaults` are what `transformers` assumes for keys that a config.json leaves out.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """`qkv_bias` and `output_bias` None: the checkpoint's `attention_bias` decides.

    `windows`: no layer, every layer, or the layers that the checkpoint lists slide a window.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    defaults: dict[str, Any] = {}
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    windows: Literal["none", "all", "listed"] = "none"
    activation_key: str = "hidden_act"
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    scaled_embedding: bool = False


_COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = _COMMON | {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "use_sliding_window": True,
    "sliding_window": 4096,
}

FAMILIES = (
    Family(
        name="Llama",
        model_types=("llama",),
        architectures=("LlamaForCausalLM",),
        defaults=_COMMON | {"max_position_embeddings": 2048},
    ),
    Family(
        name="Mistral",
        model_types=("mistral",),
        architectures=("MistralForCausalLM",),
        defaults=_COMMON | {"max_position_embeddings": 131_072, "sliding_window": 4096},
        qkv_bias=False,
        output_bias=False,
        windows="all",
    ),
    Family(
        name="Qwen2",
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM",),
        defaults=_QWEN,
        qkv_bias=True,
        output_bias=False,
        windows="listed",
    ),
    Family(
        name="Qwen3",
        model_types=("qwen3",),
        architectures=("Qwen3ForCausalLM",),
        defaults=_QWEN | {"head_dim": 128},
        windows="listed",
        qk_norm=True,
    ),
    Family(
        name="Gemma 2",
        model_types=("gemma2",),
        architectures=("Gemma2ForCausalLM",),
        defaults=_GEMMA
        | {
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="listed",
        activation_key="hidden_activation",
        norm_offset=1.0,
        sandwich_norms=True,
        scaled_embedding=True,
    ),
    Family(
        name="Gemma 3",
        model_types=("gemma3_text", "gemma3"),
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        defaults=_GEMMA
        | {
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        windows="listed",
        activation_key="hidden_activation",
        qk_norm=True,
        norm_offset=1.0,
        sandwich_norms=True,
        scaled_embedding=True,
    ),
)

ENCODER_MODEL_TYPES = ("bert",)
ENCODER_ARCHITECTURES = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
