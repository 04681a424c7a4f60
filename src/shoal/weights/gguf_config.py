"""A Hugging Face style config from the metadata of a GGUF file."""

from __future__ import annotations

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

_ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
_GEMMA3_LOCAL_ROPE_THETA = 10_000.0
_GEMMA3_SLIDING_PATTERN = 6
_GEMMA3_27B_LAYERS = 62
_DEFAULT_ROPE_THETA = 10_000.0


class _Keys:
    """The metadata under one architecture's prefix."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceError(f"the GGUF file lacks {self._architecture}.{key} in its metadata")
        return value


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
    config["rope_theta"] = keys.get("rope.freq_base", _DEFAULT_ROPE_THETA)
    config["rope_scaling"] = _rope_scaling(keys, rope_factors)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config |= {name: keys.get(key) for key, name in _OPTIONAL.items() if keys.get(key) is not None}
    config |= _token_ids(header.metadata)
    if architecture == "gemma3":
        config |= _gemma3(keys, config)
    elif architecture == "llama" and "sliding_window" in config:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return config


def _refuse_experts_and_splits(metadata: dict[str, Any], keys: _Keys) -> None:
    if keys.get("expert_count", 0) > 0:
        raise UnsupportedModel(
            f"this model has {keys.get('expert_count')} experts per layer; "
            "Shoal runs dense models only"
        )
    if metadata.get("split.count", 0) > 1:
        raise UnsupportedModel(
            f"this is one of {metadata['split.count']} pieces of a split GGUF file; join them "
            "first with llama.cpp's llama-gguf-split --merge"
        )


def _sizes(keys: _Keys, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file holds no token_embd.weight: it is no language model")
    return {
        "hidden_size": keys.need("embedding_length"),
        "num_hidden_layers": keys.need("block_count"),
        "intermediate_size": keys.need("feed_forward_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.need("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
    }


def _attention(keys: _Keys, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    num_heads = keys.need("attention.head_count")
    head_dim = keys.get("attention.key_length", keys.need("embedding_length") // num_heads)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(
            f"heads of {head_dim} for keys and {keys.get('attention.value_length')} for values; "
            "Shoal runs models where they are equal"
        )
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(
            f"only {keys.get('rope.dimension_count')} of {head_dim} dims of a head are rotated; "
            "Shoal runs models that rotate them all"
        )
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _rope_scaling(keys: _Keys, factors: list[float] | None) -> dict[str, Any] | None:
    if factors is not None:
        return {"rope_type": "freq_factors", "factors": factors}
    rope_type = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    if rope_type == "none" and factor in (0.0, 1.0):
        return None
    if rope_type in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if rope_type != "yarn":
        raise UnsupportedModel(f"rope scaling '{rope_type}' in a GGUF file is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    original = keys.get(_ORIGINAL_CONTEXT)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for key, name in {
        "attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }.items():
        value = keys.get(f"rope.scaling.{key}")
        if value is not None:
            scaling[name] = value
    return scaling


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ids = {}
    for key, name in _TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None:
            ids[name] = token_id
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = (
            [ids["eos_token_id"], end_of_turn] if "eos_token_id" in ids else end_of_turn
        )
    return ids


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows by heart of Gemma 3 and does not write into the file."""
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = keys.get("attention.sliding_window_pattern", _GEMMA3_SLIDING_PATTERN)
    # The 27B model alone scales its queries by hidden size over heads, not by the head's size.
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "rope_local_base_freq": _GEMMA3_LOCAL_ROPE_THETA,
        "query_pre_attn_scalar": config["hidden_size"] // num_heads
        if is_27b
        else config["head_dim"],
        "rope_theta": keys.get("rope.freq_base", 1_000_000.0),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(num_layers)
        ],
    }
