"""What a model computes, as values: parsed once from a Hugging Face style configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from shoal.errors import SourceError, UnsupportedModel
from shoal.models.families import Family
from shoal.models.registry import find_family, model_kind
from shoal.models.rope_config import Rope, YarnRope, ropes_by_layer_type
from shoal.parallel.partition import Dims

Activation = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class LayerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`window` is the number of tokens a query sees, itself included; None is all of them."""

    rope: Rope
    window: int | None = None


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`norm_offset` is added to the weights of RMSNorm; `max_context` is in tokens."""

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    layers: tuple[LayerConfig, ...]
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dims(self) -> Dims:
        return Dims(
            num_layers=self.num_layers,
            num_query_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            num_mlp_columns=self.mlp_size,
            vocab_size=self.vocab_size,
        )


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A BERT encoder; `max_context` is in tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    vocab_size: int
    num_token_types: int
    max_context: int
    norm_eps: float
    activation: Activation

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Raises UnsupportedModel for what Shoal cannot run, SourceError for a broken configuration."""
    family = find_family(config)
    raw = {**family.defaults, **config, **(config.get("text_config") or {})}
    _refuse_unsupported(raw)
    hidden_size = _size(raw, "hidden_size")
    num_heads = _size(raw, "num_attention_heads")
    num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise SourceError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    head_dim = _size(raw, "head_dim", hidden_size // num_heads)
    max_positions = _size(raw, "max_position_embeddings")
    ropes = ropes_by_layer_type(raw, max_positions)
    attention_bias = bool(raw["attention_bias"])
    return DecoderConfig(
        family=family.name,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=_size(raw, "intermediate_size"),
        vocab_size=_size(raw, "vocab_size"),
        max_context=_max_context(max_positions, ropes["full_attention"]),
        norm_eps=_number(raw, "rms_norm_eps"),
        activation=_activation(raw[family.activation_key]),
        attention_scale=_number(raw, "query_pre_attn_scalar", head_dim) ** -0.5,
        layers=_layers(family, raw, ropes),
        tied_head=bool(raw["tie_word_embeddings"]),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(raw["mlp_bias"]),
        qk_norm=family.qk_norm,
        norm_offset=family.norm_offset,
        sandwich_norms=family.sandwich_norms,
        embedding_scale=hidden_size**0.5 if family.scaled_embedding else 1.0,
        attention_softcap=raw.get("attn_logit_softcapping"),
        final_softcap=raw.get("final_logit_softcapping"),
    )


def encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Raises UnsupportedModel for what Shoal cannot run, SourceError for a broken configuration."""
    if model_kind(config) != "encoder":
        raise UnsupportedModel(f"model_type '{config.get('model_type')}' is not an encoder")
    raw = config
    positions = raw.get("position_embedding_type") or "absolute"
    if positions != "absolute" or raw.get("is_decoder"):
        raise UnsupportedModel(
            "only bidirectional BERT with absolute positions is supported, got "
            f"position_embedding_type='{positions}', is_decoder={raw.get('is_decoder', False)}"
        )
    return EncoderConfig(
        hidden_size=_size(raw, "hidden_size"),
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=_size(raw, "num_attention_heads"),
        mlp_size=_size(raw, "intermediate_size"),
        vocab_size=_size(raw, "vocab_size"),
        num_token_types=_size(raw, "type_vocab_size", 2),
        max_context=_size(raw, "max_position_embeddings", 512),
        norm_eps=_number(raw, "layer_norm_eps", 1e-12),
        activation=_activation(raw.get("hidden_act", "gelu")),
    )


def _layers(
    family: Family, raw: Mapping[str, Any], ropes: Mapping[str, Rope]
) -> tuple[LayerConfig, ...]:
    layers = []
    for kind in _layer_types(family, raw):
        if kind not in ropes:
            raise UnsupportedModel(f"layer type '{kind}' is unsupported")
        sliding = kind == "sliding_attention"
        window = _size(raw, "sliding_window") if sliding else None
        layers.append(LayerConfig(rope=ropes[kind], window=window))
    return tuple(layers)


def _layer_types(family: Family, raw: Mapping[str, Any]) -> list[str]:
    num_layers = _size(raw, "num_hidden_layers")
    full, sliding = "full_attention", "sliding_attention"
    if family.windows == "all" and raw.get("sliding_window"):
        return [sliding] * num_layers
    if family.windows != "listed" or not raw["use_sliding_window"]:
        return [full] * num_layers
    if raw.get("layer_types"):
        if len(raw["layer_types"]) != num_layers:
            raise SourceError(
                f"layer_types names {len(raw['layer_types'])} layers, the model has {num_layers}"
            )
        return [str(kind) for kind in raw["layer_types"]]
    if "sliding_window_pattern" in raw:
        pattern = _size(raw, "sliding_window_pattern")
        return [sliding if (i + 1) % pattern else full for i in range(num_layers)]
    first_sliding = int(raw["max_window_layers"])
    return [sliding if i >= first_sliding else full for i in range(num_layers)]


def _max_context(max_positions: int, rope: Rope) -> int:
    """Checkpoints with YaRN state the context they were trained on, not what YaRN makes of it."""
    if isinstance(rope, YarnRope):
        return max(max_positions, int(rope.original_context * rope.factor))
    return max_positions


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    refused = {
        "quantization_config": "weights quantised by another tool",
        "num_local_experts": "mixture of experts",
        "num_experts": "mixture of experts",
        "use_bidirectional_attention": "bidirectional attention in a decoder",
    }
    for key, meaning in refused.items():
        if raw.get(key):
            raise UnsupportedModel(f"{meaning} ('{key}' in the configuration) is unsupported")


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"activation '{name}' is unsupported; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int) or value <= 0:
        raise SourceError(f"the configuration needs a positive integer '{key}', it says {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int | float) or value <= 0:
        raise SourceError(f"the configuration needs a positive number '{key}', it says {value!r}")
    return float(value)
