"""The trunk that every decoder family shares, over any range of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from shoal.compute import native
from shoal.compute.linear import Embedding
from shoal.compute.native_layer import NativeLayers
from shoal.errors import InternalError
from shoal.models.config import DecoderConfig
from shoal.models.layers import Attend, DecoderLayer, RMSNorm
from shoal.models.rope import NativeRotaryEmbedding, RotaryEmbedding
from shoal.models.vocabulary import Head
from shoal.parallel.communicator import Communicator, Solo
from shoal.parallel.partition import Shard

Part = TypeVar("Part")


class Decoder:
    """One shard. Only the first has an embedding; only the last a final norm and a head, which
    norms what it is given."""

    def __init__(
        self,
        config: DecoderConfig,
        shard: Shard,
        *,
        dtype: torch.dtype,
        layers: Sequence[DecoderLayer],
        embedding: Embedding | None = None,
        final_norm: RMSNorm | None = None,
        head: Head | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.config = config
        self.shard = shard
        self.layers = layers
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head
        self._communicator = communicator or Solo()
        # Rounded to the dtype before it multiplies, as the models were trained.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()
        ropes = [layer.rope for layer in config.layers[shard.layers.as_slice()]]
        kinds = list(dict.fromkeys(ropes))
        self._rope_of_layer = [kinds.index(rope) for rope in ropes]
        self._rotary: Sequence[RotaryEmbedding | NativeRotaryEmbedding]
        self._native: NativeLayers | None = None
        if all(layer.is_native for layer in layers):
            self._rotary = rotary = [NativeRotaryEmbedding(rope, config.head_dim) for rope in kinds]
            self._native = _as_native(layers, self._rope_of_layer, rotary)
        else:
            self._rotary = [RotaryEmbedding(rope, config.head_dim, dtype) for rope in kinds]

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """Token ids to the first layer's input [T, E]."""
        x_TE = _held(self.embedding, "embedding", self.shard)(tokens)
        return x_TE if self._embedding_scale == 1.0 else x_TE * self._embedding_scale

    def __call__(
        self,
        x_TE: torch.Tensor,
        positions: list[int],
        attend: Attend,
        rows: list[int] | None = None,
    ) -> torch.Tensor:
        """Run this shard's layers over the step's tokens [T, E] at `positions`.

        Returns the states of `rows`, ascending, for who reads no others; None: all.
        """
        if rows is not None and len(rows) == len(x_TE):
            rows = None
        step = attend.native_step
        if self._native is not None and step is not None and native.is_plain(x_TE):
            ranks = self._communicator.native_ranks
            if ranks is not None or self._communicator.num_ranks == 1:
                return self._native(x_TE, step, rows, ranks)
        rotations = [rotary(positions) for rotary in self._rotary]
        for layer, rope in zip(self.layers, self._rope_of_layer, strict=True):
            x_TE = layer(x_TE, rotations[rope], attend)
        return x_TE if rows is None else x_TE[rows]

    def norm(self, x_TE: torch.Tensor) -> torch.Tensor:
        """The final norm over the last layer's output."""
        return _held(self.final_norm, "final norm", self.shard)(x_TE)

    def logits(self, x_NE: torch.Tensor) -> torch.Tensor | None:
        """Float32 logits [N, V] of the last layer's output, soft cap included.

        Tensor ranks compute a part of the vocabulary each; rank 0 has them all, others None.
        """
        head_logits_NV = _held(self.head, "head", self.shard)(x_NE)
        if head_logits_NV is None:
            return None
        logits_NV = head_logits_NV.float()
        softcap = self.config.final_softcap
        return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


def _as_native(
    layers: Sequence[DecoderLayer],
    rope_of_layer: Sequence[int],
    rotary: Sequence[NativeRotaryEmbedding],
) -> NativeLayers | None:
    halves = [halves for layer in layers if (halves := layer.native_halves) is not None]
    if not halves or len(halves) != len(layers):
        return None
    ropes = [(each.inv_freq_F, each.scaling) for each in rotary]
    return NativeLayers(halves, ropes, rope_of_layer)


def _held(part: Part | None, name: str, shard: Shard) -> Part:
    if part is None:
        raise InternalError(
            f"the shard of layers [{shard.layers.start}, {shard.layers.stop}) of "
            f"{shard.num_layers} holds no {name}"
        )
    return part
