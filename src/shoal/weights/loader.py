"""Builds a model, or one shard of it, from a checkpoint, reading only what the shard holds."""

from __future__ import annotations

import torch

from shoal.compute.affine import Affine4
from shoal.compute.linear import Embedding, Linear, Scheme, make_embedding, make_head
from shoal.errors import InternalError
from shoal.models.config import DecoderConfig, EncoderConfig, decoder_config, encoder_config
from shoal.models.decoder import Decoder
from shoal.models.encoder import Encoder, EncoderLayer, LayerNorm
from shoal.models.layers import AllReduce, Attention, DecoderLayer, GatedMLP, HeadNorm, RMSNorm
from shoal.parallel.communicator import Communicator
from shoal.parallel.partition import Shard, Span
from shoal.weights import inventory
from shoal.weights.parts import Parts
from shoal.weights.tensors import TensorSource


def load_decoder(
    source: TensorSource, shard: Shard, *, scheme: Scheme, communicator: Communicator
) -> Decoder:
    """The shard's part of a decoder; its tensor ranks add up through the communicator.

    Raises UnsupportedModel, and SourceError listing every tensor that is missing, spare or
    misshapen, before any data is read.
    """
    config = decoder_config(source.config)
    _check_shard(config, shard)
    names = inventory.decoder_names(source, config)
    needed = _needed(config, shard)
    inventory.check(source, inventory.decoder_shapes(config), names, needed)
    parts = Parts(source, names, scheme)
    embedding, head = _ends(config, shard, parts, scheme)
    return Decoder(
        config,
        shard,
        dtype=scheme.dtype,
        layers=[
            _decoder_layer(config, layer, shard, parts, scheme, communicator.all_reduce)
            for layer in range(shard.layers.start, shard.layers.stop)
        ],
        embedding=embedding,
        final_norm=_rms_norm(config, parts, inventory.FINAL_NORM, scheme)
        if shard.is_last
        else None,
        head=head,
    )


def load_encoder(source: TensorSource, *, scheme: Scheme) -> Encoder:
    """A whole encoder. Raises as `load_decoder` does."""
    config = encoder_config(source.config)
    names = inventory.encoder_names(source, config)
    inventory.check(source, inventory.encoder_shapes(config), names, names)
    parts = Parts(source, names, scheme)
    # Every token has type 0, so its row is as good as part of each position's.
    token_types = parts.vector("embeddings.token_type_embeddings.weight")
    return Encoder(
        config,
        embedding=make_embedding(parts.matrix("embeddings.word_embeddings.weight"), scheme),
        positions_PE=parts.vector("embeddings.position_embeddings.weight") + token_types[0],
        embedding_norm=_layer_norm(config, parts, "embeddings.LayerNorm"),
        layers=[_encoder_layer(config, layer, parts) for layer in range(config.num_layers)],
    )


def _needed(config: DecoderConfig, shard: Shard) -> list[str]:
    """The tensors that the shard reads, whole or in part."""
    head = inventory.EMBEDDING if config.tied_head else inventory.HEAD
    needed = [inventory.EMBEDDING] if shard.is_first else []
    for layer in range(shard.layers.start, shard.layers.stop):
        needed += inventory.decoder_layer_shapes(config, layer)
    if shard.is_last:
        needed += [inventory.FINAL_NORM] + [head] * (head not in needed)
    return needed


def _ends(
    config: DecoderConfig, shard: Shard, parts: Parts, scheme: Scheme
) -> tuple[Embedding | None, Linear | None]:
    """The embedding of the first shard and the head of the last; tied ones share one table."""
    table = None
    if shard.is_first or (shard.is_last and config.tied_head):
        table = _table(parts, inventory.EMBEDDING, scheme)
    embedding = make_embedding(table, scheme) if shard.is_first and table is not None else None
    if not shard.is_last:
        return embedding, None
    if table is None or not config.tied_head:
        table = _table(parts, inventory.HEAD, scheme)
    return embedding, make_head(table, scheme)


def _table(parts: Parts, name: str, scheme: Scheme) -> torch.Tensor | Affine4:
    table = parts.matrix(name)
    if scheme.quantize == "none" and isinstance(table, torch.Tensor):
        # Cast once, so that a tied embedding and head share the result instead of casting twice.
        return table.to(scheme.dtype)
    return table


def _decoder_layer(
    config: DecoderConfig,
    layer: int,
    shard: Shard,
    parts: Parts,
    scheme: Scheme,
    all_reduce: AllReduce,
) -> DecoderLayer:
    prefix = inventory.layer_prefix(layer)

    def norm(name: str) -> RMSNorm:
        return _rms_norm(config, parts, f"{prefix}{name}.weight", scheme)

    sandwich = config.sandwich_norms
    return DecoderLayer(
        attention_norm=norm("input_layernorm"),
        attention=_attention(config, layer, shard, parts, scheme, all_reduce),
        post_attention_norm=norm("post_attention_layernorm") if sandwich else None,
        mlp_norm=norm("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        mlp=_mlp(config, f"{prefix}mlp.", shard, parts, all_reduce),
        post_mlp_norm=norm("post_feedforward_layernorm") if sandwich else None,
    )


def _attention(
    config: DecoderConfig,
    layer: int,
    shard: Shard,
    parts: Parts,
    scheme: Scheme,
    all_reduce: AllReduce,
) -> Attention:
    prefix = f"{inventory.layer_prefix(layer)}self_attn."
    q_span = shard.kv_heads.scaled(config.group_size * config.head_dim)
    kv_span = shard.kv_heads.scaled(config.head_dim)
    q_rows = _part_of(q_span, config.num_heads * config.head_dim)
    kv_rows = _part_of(kv_span, config.num_kv_heads * config.head_dim)
    return Attention(
        config,
        layer,
        len(shard.kv_heads),
        qkv=parts.linear(
            [
                (f"{prefix}q_proj", q_rows),
                (f"{prefix}k_proj", kv_rows),
                (f"{prefix}v_proj", kv_rows),
            ]
        ),
        output=parts.linear(
            [(f"{prefix}o_proj", None)], columns=q_rows, with_bias=_adds_bias(shard)
        ),
        qk_norm=_head_norm(config, prefix, len(shard.kv_heads), parts, scheme),
        all_reduce=all_reduce,
    )


def _mlp(
    config: DecoderConfig, prefix: str, shard: Shard, parts: Parts, all_reduce: AllReduce
) -> GatedMLP:
    columns = _part_of(shard.mlp_columns, config.mlp_size)
    return GatedMLP(
        parts.linear([(f"{prefix}gate_proj", columns), (f"{prefix}up_proj", columns)]),
        parts.linear([(f"{prefix}down_proj", None)], columns=columns, with_bias=_adds_bias(shard)),
        config.activation,
        all_reduce,
    )


def _adds_bias(shard: Shard) -> bool:
    """The ranks' outputs are added up: only one of them may carry the bias."""
    return shard.rank == 0


def _part_of(span: Span, size: int) -> Span | None:
    return None if len(span) == size else span


def _norm_weight(config: DecoderConfig, parts: Parts, name: str, scheme: Scheme) -> torch.Tensor:
    if not config.norm_offset:
        return parts.vector(name, scheme.dtype)
    return parts.vector(name, torch.float32) + config.norm_offset


def _rms_norm(config: DecoderConfig, parts: Parts, name: str, scheme: Scheme) -> RMSNorm:
    return RMSNorm(_norm_weight(config, parts, name, scheme), config.norm_eps)


def _head_norm(
    config: DecoderConfig, prefix: str, num_kv_heads: int, parts: Parts, scheme: Scheme
) -> HeadNorm | None:
    if not config.qk_norm:
        return None
    q_D = _norm_weight(config, parts, f"{prefix}q_norm.weight", scheme)
    k_D = _norm_weight(config, parts, f"{prefix}k_norm.weight", scheme)
    rows = [q_D] * (num_kv_heads * config.group_size) + [k_D] * num_kv_heads
    return HeadNorm(torch.stack(rows), config.norm_eps)


def _encoder_layer(config: EncoderConfig, layer: int, parts: Parts) -> EncoderLayer:
    prefix = f"encoder.layer.{layer}."
    attention = f"{prefix}attention."
    return EncoderLayer(
        config,
        qkv=parts.linear([(f"{attention}self.{name}", None) for name in ("query", "key", "value")]),
        output=parts.linear([(f"{attention}output.dense", None)]),
        attention_norm=_layer_norm(config, parts, f"{attention}output.LayerNorm"),
        up=parts.linear([(f"{prefix}intermediate.dense", None)]),
        down=parts.linear([(f"{prefix}output.dense", None)]),
        mlp_norm=_layer_norm(config, parts, f"{prefix}output.LayerNorm"),
    )


def _layer_norm(config: EncoderConfig, parts: Parts, name: str) -> LayerNorm:
    weight, bias = parts.vector(f"{name}.weight"), parts.vector(f"{name}.bias")
    return LayerNorm(weight, bias, config.norm_eps)


def _check_shard(config: DecoderConfig, shard: Shard) -> None:
    limits = (
        ("layers", shard.layers, config.num_layers),
        ("KV heads", shard.kv_heads, config.num_kv_heads),
        ("MLP columns", shard.mlp_columns, config.mlp_size),
    )
    for what, span, size in limits:
        if not 0 <= span.start < span.stop <= size:
            raise InternalError(
                f"a shard of {what} [{span.start}, {span.stop}) does not fit a model with {size}"
            )
    if shard.num_layers != config.num_layers:
        raise InternalError(
            f"the shard is of {shard.num_layers} layers, the model has {config.num_layers}"
        )
