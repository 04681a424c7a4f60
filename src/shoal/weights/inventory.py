"""Which tensors a checkpoint must hold, in which shapes, and what may lie beside them.

Names are those of Hugging Face checkpoints without the prefix of the trunk ("model.").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from shoal.errors import SourceError
from shoal.models.config import DecoderConfig, EncoderConfig
from shoal.weights.tensors import TensorSource

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
HEAD = "lm_head.weight"

_HEAD_NAMES = (HEAD, "language_model.lm_head.weight")
_DECODER_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
_ENCODER_PREFIXES = ("", "bert.")
_HARMLESS = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$"
    r"|^(model\.)?(vision_tower|multi_modal_projector)\."
    r"|^(bert\.)?pooler\.|^cls\."
)


def layer_prefix(layer: int) -> str:
    return f"layers.{layer}."


def decoder_layer_shapes(config: DecoderConfig, layer: int) -> Shapes:
    """The tensors of one decoder layer, whole."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.sandwich_norms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head_dim,)
        shapes["self_attn.k_norm.weight"] = (head_dim,)
    for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        shapes |= _linear(f"self_attn.{name}_proj", size, hidden, config.qkv_bias)
    shapes |= _linear("self_attn.o_proj", hidden, q_size, config.output_bias)
    for name in ("gate", "up"):
        shapes |= _linear(f"mlp.{name}_proj", config.mlp_size, hidden, config.mlp_bias)
    shapes |= _linear("mlp.down_proj", hidden, config.mlp_size, config.mlp_bias)
    return {layer_prefix(layer) + name: shape for name, shape in shapes.items()}


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """Every tensor of the model; a tied head is the embedding."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {EMBEDDING: table, FINAL_NORM: (config.hidden_size,)}
    if not config.tied_head:
        shapes[HEAD] = table
    for layer in range(config.num_layers):
        shapes |= decoder_layer_shapes(config, layer)
    return shapes


def encoder_shapes(config: EncoderConfig) -> Shapes:
    hidden = config.hidden_size
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.max_context, hidden),
        "embeddings.token_type_embeddings.weight": (config.num_token_types, hidden),
        **_layer_norm("embeddings.LayerNorm", hidden),
    }
    for layer in range(config.num_layers):
        prefix = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{prefix}attention.self.{name}", hidden, hidden, bias=True)
        shapes |= _linear(f"{prefix}attention.output.dense", hidden, hidden, bias=True)
        shapes |= _layer_norm(f"{prefix}attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{prefix}intermediate.dense", config.mlp_size, hidden, bias=True)
        shapes |= _linear(f"{prefix}output.dense", hidden, config.mlp_size, bias=True)
        shapes |= _layer_norm(f"{prefix}output.LayerNorm", hidden)
    return shapes


def decoder_names(source: TensorSource, config: DecoderConfig) -> dict[str, str]:
    """Each name of `decoder_shapes`, as this checkpoint spells it."""
    present = source.names()
    prefix = _prefix(present, _DECODER_PREFIXES, layer_prefix(0), EMBEDDING)
    names = {name: prefix + name for name in decoder_shapes(config)}
    if HEAD in names:
        names[HEAD] = next((name for name in _HEAD_NAMES if name in present), HEAD)
    return names


def encoder_names(source: TensorSource, config: EncoderConfig) -> dict[str, str]:
    prefix = _prefix(source.names(), _ENCODER_PREFIXES, "encoder.", "embeddings.")
    return {name: prefix + name for name in encoder_shapes(config)}


def check(
    source: TensorSource, shapes: Shapes, names: Mapping[str, str], needed: Iterable[str]
) -> None:
    """Compare the checkpoint with what the model needs; reads no data.

    `shapes` and `names` describe the whole model, `needed` is what this shard reads. Raises
    SourceError listing every missing, spare and misshapen tensor.
    """
    present = source.names()
    problems = []
    for name in needed:
        if names[name] not in present:
            problems.append(f"missing: {names[name]} {shapes[name]}")
        elif (found := source.shape(names[name])) != shapes[name]:
            problems.append(f"misshapen: {names[name]} is {found}, must be {shapes[name]}")
    known = set(names.values()) | set(_HEAD_NAMES if HEAD not in names else ())
    spare = sorted(name for name in present - known if not _HARMLESS.search(name))
    problems += [f"spare: {name} {source.shape(name)}" for name in spare]
    if problems:
        raise SourceError(
            f"the checkpoint does not fit its configuration ({len(problems)} tensors):\n  "
            + "\n  ".join(problems)
        )


def _prefix(present: frozenset[str], prefixes: tuple[str, ...], *starts: str) -> str:
    for prefix in prefixes:
        if any(name.startswith(tuple(prefix + start for start in starts)) for name in present):
            return prefix
    return prefixes[0]


def _linear(name: str, num_rows: int, num_columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (num_rows, num_columns)}
    return weight | {f"{name}.bias": (num_rows,)} if bias else weight


def _layer_norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
