"""The BERT encoder over a flattened batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from shoal.compute.linear import Embedding, Linear
from shoal.models.config import EncoderConfig
from shoal.models.layers import ACTIVATIONS


class LayerNorm:
    def __init__(self, weight_E: torch.Tensor, bias_E: torch.Tensor, eps: float) -> None:
        self.weight_E = weight_E
        self.bias_E = bias_E
        self.eps = eps

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_TE, self.weight_E.shape, self.weight_E, self.bias_E, self.eps)


class EncoderLayer:
    """Norms come after each residual sum. `qkv` holds the rows of q, then k, then v."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        qkv: Linear,
        output: Linear,
        attention_norm: LayerNorm,
        up: Linear,
        down: Linear,
        mlp_norm: LayerNorm,
    ) -> None:
        self._num_heads = config.num_heads
        self._activation = ACTIVATIONS[config.activation]
        self._qkv = qkv
        self._output = output
        self._attention_norm = attention_norm
        self._up = up
        self._down = down
        self._mlp_norm = mlp_norm

    def __call__(self, x_TE: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        x_TE = self._attention_norm(x_TE + self._output(self._attend(x_TE, lengths)))
        return self._mlp_norm(x_TE + self._down(self._activation(self._up(x_TE))))

    def _attend(self, x_TE: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        num_tokens = x_TE.shape[0]
        qkv_3HTD = self._qkv(x_TE).view(num_tokens, 3, self._num_heads, -1).permute(1, 2, 0, 3)
        # One call per sequence: padding would compute, and a mask would store, what nobody reads.
        outputs = [
            F.scaled_dot_product_attention(*sequence_3HTD.unsqueeze(1)).squeeze(0)
            for sequence_3HTD in torch.split(qkv_3HTD, list(lengths), dim=2)
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1).reshape(num_tokens, -1)


class Encoder:
    """Every token sees all tokens of its own sequence. All token types are 0."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        embedding: Embedding,
        positions_PE: torch.Tensor,
        embedding_norm: LayerNorm,
        layers: Sequence[EncoderLayer],
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._positions_PE = positions_PE
        self._embedding_norm = embedding_norm
        self._layers = layers

    def __call__(self, tokens: list[int], lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, E] of sequences that lie one after the other in `tokens`."""
        positions_TE = torch.cat([self._positions_PE[:length] for length in lengths])
        x_TE = self._embedding_norm(self._embedding(tokens) + positions_TE)
        for layer in self._layers:
            x_TE = layer(x_TE, lengths)
        return x_TE
