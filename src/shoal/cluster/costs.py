"""What a model costs, as values: weights to go through, bytes to hold and bytes to send."""

from __future__ import annotations

import msgspec

from shoal.config import Quantize
from shoal.parallel.partition import Dims, Slice


class ModelCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder of equal layers in one precision.

    `precision` is a key of `NodeProfile.matrix_rates`. Bytes are per matrix element, for
    activations per element that travels; `is_tied` models hold one table for embedding and head
    where both are on one worker and in one precision. Biases and norms are too small to count.
    """

    name: str = "model"
    dims: Dims
    hidden_size: int
    head_dim: int
    precision: Quantize
    weight_bytes: float
    embedding_bytes: float
    head_bytes: float
    kv_element_bytes: float
    activation_bytes: int = 4
    is_tied: bool = False

    def layer_weights(self, part: Slice) -> int:
        """Matrix elements of one layer's slice: query and output, key and value, and the MLP."""
        heads = len(part.query_heads) + len(part.kv_heads)
        return self.hidden_size * (2 * self.head_dim * heads + 3 * len(part.mlp_columns))

    def layer_activations(self, part: Slice) -> int:
        """In- and out-features of one layer's four matrices, as NodeProfile counts them."""
        heads = len(part.query_heads) + len(part.kv_heads)
        return 4 * self.hidden_size + 2 * heads * self.head_dim + 3 * len(part.mlp_columns)

    def table_weights(self, part: Slice) -> int:
        """Elements of the slice of the embedding, or of the head."""
        return self.hidden_size * len(part.vocab)

    def kv_bytes(self, part: Slice) -> int:
        """Bytes that one token takes in one layer's cache."""
        return round(2 * self.head_dim * len(part.kv_heads) * self.kv_element_bytes)

    def layer_bytes(self, part: Slice, kv_tokens: int) -> float:
        """One layer's weights and its cache of `kv_tokens`."""
        return self.layer_weights(part) * self.weight_bytes + kv_tokens * self.kv_bytes(part)

    def table_bytes(self, part: Slice, *, is_first: bool, is_last: bool) -> float:
        """The embedding of the first stage and the head of the last."""
        if is_first and is_last and self.is_tied and self.embedding_bytes == self.head_bytes:
            is_first = False
        per_element = is_first * self.embedding_bytes + is_last * self.head_bytes
        return self.table_weights(part) * per_element

    def hidden_bytes(self, rows: float) -> float:
        return rows * self.hidden_size * self.activation_bytes
