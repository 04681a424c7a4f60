"""Builds a model, or one shard of it, from a checkpoint, reading only what the shard holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import torch

from shoal.compute.affine import Affine4
from shoal.compute.linear import Embedding, Scheme, make_embedding, make_head
from shoal.errors import InternalError
from shoal.models.config import DecoderConfig, EncoderConfig, decoder_config, encoder_config
from shoal.models.decoder import Decoder
from shoal.models.encoder import Encoder, EncoderLayer, LayerNorm
from shoal.models.layers import (
    Attention,
    DecoderLayer,
    GatedMLP,
    HeadNorm,
    Residual,
    RMSNorm,
    normed,
)
from shoal.models.vocabulary import Head, SlicedEmbedding, SlicedHead
from shoal.parallel.communicator import Communicator
from shoal.parallel.partition import Shard, Span
from shoal.weights import inventory
from shoal.weights.needed import needed_parts
from shoal.weights.parts import Parts
from shoal.weights.tensors import TensorSource

Table = torch.Tensor | Affine4
Part = TypeVar("Part")


def load_decoder(
    source: TensorSource,
    shard: Shard,
    *,
    scheme: Scheme,
    communicator: Communicator,
    held: Sequence[Decoder] = (),
) -> Decoder:
    """The shard's part of a decoder; its tensor ranks add up through the communicator.

    What decoders in `held` have of it is not read again but shared with them: they are of the same
    model and scheme, and those of the same rank were made with the same communicator.

    Raises UnsupportedModel, and SourceError listing every tensor that is missing, spare or
    misshapen, before any data is read.
    """
    config = decoder_config(source.config)
    _check_shard(config, shard)
    names = inventory.decoder_names(source, config)
    inventory.check(source, inventory.decoder_shapes(config), names, needed_parts(config, shard))
    parts = Parts(source, names, scheme)
    alike = [each for each in held if _is_same_slice(each.shard, shard)]
    return _DecoderBuilder(config, shard, parts, scheme, communicator, alike).decoder()


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


class _DecoderBuilder:
    def __init__(
        self,
        config: DecoderConfig,
        shard: Shard,
        parts: Parts,
        scheme: Scheme,
        communicator: Communicator,
        held: Sequence[Decoder],
    ) -> None:
        self.config = config
        self.shard = shard
        self.parts = parts
        self.scheme = scheme
        self.communicator = communicator
        self.held = held
        # The ranks' outputs are added up: only one of them may carry the bias.
        self.adds_bias = shard.rank == 0

    def decoder(self) -> Decoder:
        """By as many threads as compute: numpy, torch and the kernels do most of it."""
        with ThreadPoolExecutor(torch.get_num_threads(), "shoal-load") as threads:
            # First, because it takes the longest.
            ends = threads.submit(self.ends)
            span = range(self.shard.layers.start, self.shard.layers.stop)
            layers = list(threads.map(self.held_or_read_layer, span))
            embedding, head = ends.result()
        return Decoder(
            self.config,
            self.shard,
            dtype=self.scheme.dtype,
            layers=layers,
            embedding=embedding,
            final_norm=self.final_norm if self.shard.is_last else None,
            head=head,
            communicator=self.communicator,
        )

    @cached_property
    def final_norm(self) -> RMSNorm:
        held = _first(each.final_norm for each in self.held)
        return held or self.norm(inventory.FINAL_NORM)

    def held_or_read_layer(self, layer: int) -> DecoderLayer:
        return self.held_layer(layer) or self.layer(layer)

    def held_layer(self, layer: int) -> DecoderLayer | None:
        for decoder in self.held:
            span = decoder.shard.layers
            if span.start <= layer < span.stop:
                return decoder.layers[layer - span.start]
        return None

    def ends(self) -> tuple[Embedding | None, Head | None]:
        """The embedding of the first shard and the head of the last."""
        shard, is_tied = self.shard, self.config.tied_head
        if shard.is_first and shard.is_last and is_tied:
            return self.tied_ends()
        embedding, head = None, None
        if shard.is_first:
            embedding = _first(each.embedding for each in self.held)
            embedding = embedding or self.embedding(self.table(inventory.EMBEDDING))
        if shard.is_last:
            head = _first(each.head for each in self.held)
            name = inventory.EMBEDDING if is_tied else inventory.HEAD
            head = head or self.head(self.table(name))
        return embedding, head

    def tied_ends(self) -> tuple[Embedding, Head]:
        """Both from one reading, so that they share the table."""
        for decoder in self.held:
            if decoder.embedding is not None and decoder.head is not None:
                return decoder.embedding, decoder.head
        table = self.table(inventory.EMBEDDING)
        return self.embedding(table), self.head(table)

    def embedding(self, table: Table) -> Embedding:
        rows = make_embedding(table, self.scheme)
        if self.shard.num_ranks == 1:
            return rows
        return SlicedEmbedding(rows, self.shard.slice.vocab, self.communicator)

    def head(self, table: Table) -> Head:
        head = normed(self.final_norm, make_head(table, self.scheme))
        return head if self.shard.num_ranks == 1 else SlicedHead(head, self.communicator)

    def table(self, name: str) -> Table:
        table = self.parts.matrix(name, _part(self.shard.slice.vocab, self.config.vocab_size))
        if self.scheme.many == "dense" and isinstance(table, torch.Tensor):
            # Cast here, so that a tied embedding and head share the result.
            return table.to(self.scheme.dtype)
        return table

    def layer(self, layer: int) -> DecoderLayer:
        prefix = inventory.layer_prefix(layer)
        sandwich = self.config.sandwich_norms
        attention_end, mlp_end = "post_attention_layernorm", "post_feedforward_layernorm"
        mlp_start = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        after_attention, after_mlp = (
            self.residual(self.norm(f"{prefix}{name}.weight") if sandwich else None)
            for name in (attention_end, mlp_end)
        )
        before = self.norm(f"{prefix}input_layernorm.weight")
        return DecoderLayer(
            self.attention(layer, before, f"{prefix}self_attn.", after_attention),
            self.mlp(self.norm(f"{prefix}{mlp_start}.weight"), f"{prefix}mlp.", after_mlp),
        )

    def residual(self, norm: RMSNorm | None) -> Residual:
        is_alone = self.shard.num_ranks == 1
        return Residual(None if is_alone else self.communicator.all_reduce, norm)

    def attention(self, layer: int, norm: RMSNorm, prefix: str, residual: Residual) -> Attention:
        config, size = self.config, self.config.head_dim
        query_heads, kv_heads = self.shard.slice.query_heads, self.shard.slice.kv_heads
        q_rows = _part(query_heads.scaled(size), config.num_heads * size)
        kv_rows = _part(kv_heads.scaled(size), config.num_kv_heads * size)
        return Attention(
            config,
            layer,
            num_heads=len(query_heads),
            num_kv_heads=len(kv_heads),
            qkv=normed(
                norm,
                self.parts.linear(
                    (f"{prefix}q_proj", q_rows),
                    (f"{prefix}k_proj", kv_rows),
                    (f"{prefix}v_proj", kv_rows),
                ),
            ),
            output=self.parts.linear(
                (f"{prefix}o_proj", None), columns=q_rows, with_bias=self.adds_bias
            ),
            qk_norm=self.head_norm(prefix) if config.qk_norm else None,
            residual=residual,
        )

    def mlp(self, norm: RMSNorm, prefix: str, residual: Residual) -> GatedMLP:
        columns = _part(self.shard.slice.mlp_columns, self.config.mlp_size)
        gate_up = self.parts.linear((f"{prefix}gate_proj", columns), (f"{prefix}up_proj", columns))
        return GatedMLP(
            normed(norm, gate_up),
            self.parts.linear(
                (f"{prefix}down_proj", None), columns=columns, with_bias=self.adds_bias
            ),
            self.config.activation,
            residual,
        )

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.norm_weight(name), self.config.norm_eps)

    def head_norm(self, prefix: str) -> HeadNorm:
        part = self.shard.slice
        q_D = self.norm_weight(f"{prefix}q_norm.weight")
        k_D = self.norm_weight(f"{prefix}k_norm.weight")
        rows = [q_D] * len(part.query_heads) + [k_D] * len(part.kv_heads)
        return HeadNorm(torch.stack(rows), self.config.norm_eps)

    def norm_weight(self, name: str) -> torch.Tensor:
        if not self.config.norm_offset:
            return self.parts.vector(name)
        return self.parts.vector(name, torch.float32) + self.config.norm_offset


def _first(parts: Iterable[Part | None]) -> Part | None:
    return next((part for part in parts if part is not None), None)


def _is_same_slice(one: Shard, other: Shard) -> bool:
    return (one.slice, one.rank, one.num_ranks) == (other.slice, other.rank, other.num_ranks)


def _part(span: Span, size: int) -> Span | None:
    """None for all of it: a reader may have a shorter way to read a tensor whole."""
    return None if len(span) == size else span


def _encoder_layer(config: EncoderConfig, layer: int, parts: Parts) -> EncoderLayer:
    prefix = f"encoder.layer.{layer}."
    attention = f"{prefix}attention."
    return EncoderLayer(
        config,
        qkv=parts.linear(
            (f"{attention}self.query", None),
            (f"{attention}self.key", None),
            (f"{attention}self.value", None),
        ),
        output=parts.linear((f"{attention}output.dense", None)),
        attention_norm=_layer_norm(config, parts, f"{attention}output.LayerNorm"),
        up=parts.linear((f"{prefix}intermediate.dense", None)),
        down=parts.linear((f"{prefix}output.dense", None)),
        mlp_norm=_layer_norm(config, parts, f"{prefix}output.LayerNorm"),
    )


def _layer_norm(config: EncoderConfig, parts: Parts, name: str) -> LayerNorm:
    weight, bias = parts.vector(f"{name}.weight"), parts.vector(f"{name}.bias")
    return LayerNorm(weight, bias, config.norm_eps)


def _check_shard(config: DecoderConfig, shard: Shard) -> None:
    part = shard.slice
    limits = (
        ("layers", shard.layers, config.num_layers),
        ("query heads", part.query_heads, config.num_heads),
        ("KV heads", part.kv_heads, config.num_kv_heads),
        ("MLP columns", part.mlp_columns, config.mlp_size),
        ("vocabulary entries", part.vocab, config.vocab_size),
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
