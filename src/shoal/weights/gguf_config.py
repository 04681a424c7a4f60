"""A Hugging Face style config from the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

from shoal.errors import SourceError, UnsupportedModel
from shoal.weights.gguf_header import GgufHeader, TensorInfo
from shoal.weights.gguf_names import ARCHITECTURES

_MODEL_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

_OPTIONAL = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}

_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}

_YARN = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}

_MAX_LAYERS = 10_000
_GEMMA3_ROPE_THETA = 1_000_000.0
_GEMMA3_LOCAL_ROPE_THETA = 10_000.0
_GEMMA3_SLIDING_PATTERN = 6
_GEMMA3_27B_LAYERS = 62
_DEFAULT_ROPE_THETA = 10_000.0


class _Keys:
    """The metadata under one architecture's prefix, by the type it must have."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        """At least 1."""
        value = self._value(key, default)
        if isinstance(value, list):
            raise UnsupportedModel(
                f"{self._architecture}.{key} differs from layer to layer; Shoal runs models whose "
                "layers are alike"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value)
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value)
        return value

    def has(self, key: str) -> bool:
        return f"{self._architecture}.{key}" in self._metadata

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise SourceError(f"the GGUF file lacks {self._architecture}.{key} in its metadata")
        return value

    def _wrong(self, key: str, value: object) -> SourceError:
        return SourceError(
            f"the GGUF file says {self._architecture}.{key} is {value!r}: it is damaged"
        )


def architecture_of(metadata: dict[str, Any]) -> str:
    """Raises UnsupportedModel for an architecture Shoal does not run."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture '{architecture}' is not supported; Shoal runs "
            f"{', '.join(ARCHITECTURES)}"
        )
    return str(architecture)


def config_from(header: GgufHeader, rope_factors: list[float] | None) -> dict[str, Any]:
    """The `config.json` the checkpoint had before it was converted, as far as it was kept."""
    architecture = architecture_of(header.metadata)
    keys = _Keys(header.metadata, architecture)
    _refuse_experts_and_splits(header.metadata, keys)
    config = _sizes(keys, header.tensors) | _attention(keys, header.tensors)
    config["model_type"], class_name = _MODEL_TYPES[architecture]
    config["architectures"] = [class_name]
    config["rope_theta"] = keys.number("rope.freq_base", _DEFAULT_ROPE_THETA)
    config["rope_scaling"] = _rope_scaling(keys, rope_factors)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config |= {name: keys.number(key) for key, name in _OPTIONAL.items() if keys.has(key)}
    config |= _token_ids(header.metadata)
    if architecture == "gemma3":
        config |= _gemma3(keys, config)
    elif architecture == "llama" and "sliding_window" in config:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return config


def _refuse_experts_and_splits(metadata: dict[str, Any], keys: _Keys) -> None:
    if keys.number("expert_count", 0) > 0:
        raise UnsupportedModel(
            f"this model has {keys.number('expert_count')} experts per layer; "
            "Shoal runs dense models only"
        )
    if metadata.get("split.count") not in (None, 0, 1):
        raise UnsupportedModel(
            f"this is one of {metadata['split.count']} pieces of a split GGUF file; join them "
            "first with llama.cpp's llama-gguf-split --merge"
        )


def _sizes(keys: _Keys, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file holds no token_embd.weight: it is no language model")
    num_layers = keys.integer("block_count")
    if num_layers > _MAX_LAYERS:
        raise SourceError(f"the GGUF file says it has {num_layers} layers: it is damaged")
    return {
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": num_layers,
        "intermediate_size": keys.integer("feed_forward_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
    }


def _attention(keys: _Keys, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // num_heads)
    value_dim = keys.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModel(
            f"heads of {head_dim} for keys and {value_dim} for values; "
            "Shoal runs models where they are equal"
        )
    num_rotated = keys.integer("rope.dimension_count", head_dim)
    if num_rotated != head_dim:
        raise UnsupportedModel(
            f"only {num_rotated} of {head_dim} dims of a head are rotated; "
            "Shoal runs models that rotate them all"
        )
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _rope_scaling(keys: _Keys, factors: list[float] | None) -> dict[str, Any] | None:
    if factors is not None:
        return {"rope_type": "freq_factors", "factors": factors}
    rope_type = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if rope_type == "none" and factor in (0.0, 1.0):
        return None
    if rope_type in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if rope_type != "yarn":
        raise UnsupportedModel(f"rope scaling '{rope_type}' in a GGUF file is not supported")
    given = {name: keys.number(key) for key, name in _YARN.items() if keys.has(key)}
    return {"rope_type": "yarn", "factor": factor} | given


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for key, name in _TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int):
            ids[name] = token_id
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if isinstance(end_of_turn, int) and end_of_turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = (
            [ids["eos_token_id"], end_of_turn] if "eos_token_id" in ids else end_of_turn
        )
    return ids


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows by heart of Gemma 3 and does not write into the file."""
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = keys.integer("attention.sliding_window_pattern", _GEMMA3_SLIDING_PATTERN)
    # The 27B model alone scales its queries by hidden size over heads, not by the head's size.
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    query_scalar = config["hidden_size"] // num_heads if is_27b else config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "rope_local_base_freq": _GEMMA3_LOCAL_ROPE_THETA,
        "query_pre_attn_scalar": query_scalar,
        "rope_theta": keys.number("rope.freq_base", _GEMMA3_ROPE_THETA),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(num_layers)
        ],
    }
