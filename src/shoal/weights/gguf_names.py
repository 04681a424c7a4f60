"""Hugging Face names for the tensors of a GGUF file."""

from __future__ import annotations

import re

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_LAYER_BY_ARCHITECTURE = {
    "llama": _LAYER,
    "qwen2": _LAYER,
    "qwen3": _LAYER,
    "gemma3": _LAYER | _SANDWICH_NORMS,
}

ARCHITECTURES = tuple(_LAYER_BY_ARCHITECTURE)
ROPE_FACTORS = "rope_freqs.weight"


def hugging_face_name(gguf_name: str, architecture: str) -> str:
    """A name it does not know is kept, so that whoever loads the model can name what is spare."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if layer:
        index, leaf, kind = layer.groups()
        known = _LAYER_BY_ARCHITECTURE[architecture].get(leaf)
        return f"model.layers.{index}.{known}.{kind}" if known else gguf_name
    leaf, _, kind = gguf_name.rpartition(".")
    return f"{_OUTER[leaf]}.{kind}" if leaf in _OUTER else gguf_name
