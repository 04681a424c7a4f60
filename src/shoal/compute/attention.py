"""Attention over a paged KV cache, for a step's mix of decodes and prompt chunks.

Shapes: T tokens of the step, B sequences of a group, Q queries each, L keys, H query heads,
G key-value heads, D head width. A slot is a token's place in the cache:
block * block_size + offset; W is what it holds of a head, see `kv_types`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from shoal.compute import native
from shoal.compute.kv_types import widen


@dataclass(frozen=True, slots=True)
class Keys:
    """Where a group's keys lie, [B, L], and which each query may see, bool [B, 1, Q, L]."""

    slots_BL: torch.Tensor
    visible_B1QL: torch.Tensor


@dataclass(slots=True)
class Group:
    """Sequences with the same number of queries, adjacent in the step: rows [start, stop)."""

    start: int
    stop: int
    slots_BL: torch.Tensor
    positions_BQ: torch.Tensor
    keys_by_window: dict[int | None, Keys] = field(default_factory=dict)

    def keys(self, window: int | None) -> Keys:
        """Computed once per step and kind of layer, not once per layer."""
        if window not in self.keys_by_window:
            self.keys_by_window[window] = _keys(self.slots_BL, self.positions_BQ, window)
        return self.keys_by_window[window]


def paged_attention(
    q_THD: torch.Tensor,
    keys_SGW: torch.Tensor,
    values_SGW: torch.Tensor,
    groups: list[Group],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a step's queries to their own sequences' keys, [T, H, D].

    `keys_SGW` and `values_SGW` are one layer's cache, already holding the step's own tokens.
    """
    out_THD = q_THD.new_empty(q_THD.shape)
    are_native = native.can_attend(q_THD, keys_SGW)
    for group in groups:
        rows = slice(group.start, group.stop)
        if are_native:
            native.attend(
                q_THD[rows],
                keys_SGW,
                values_SGW,
                group.slots_BL,
                group.positions_BQ,
                out_THD[rows],
                scale=scale,
                window=window,
                softcap=softcap,
            )
            continue
        keys = group.keys(window)
        k_BGLD = _gather(keys_SGW, keys.slots_BL, q_THD.dtype)
        v_BGLD = _gather(values_SGW, keys.slots_BL, q_THD.dtype)
        out_THD[rows] = _attend(
            q_THD[rows], k_BGLD, v_BGLD, keys.visible_B1QL, scale=scale, softcap=softcap
        )
    return out_THD


def _keys(slots_BL: torch.Tensor, positions_BQ: torch.Tensor, window: int | None) -> Keys:
    num_keys = slots_BL.shape[1]
    first = 0
    if window is not None:
        first = min(max(0, int(positions_BQ.min()) - window + 1), num_keys - 1)
    key_positions = torch.arange(first, num_keys, device=slots_BL.device)
    visible = key_positions <= positions_BQ.unsqueeze(-1)
    if window is not None:
        visible &= key_positions > positions_BQ.unsqueeze(-1) - window
    return Keys(slots_BL[:, first:], visible.unsqueeze(1))


def _gather(cache_SGW: torch.Tensor, slots_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    num_sequences, num_keys = slots_BL.shape
    gathered = widen(cache_SGW.index_select(0, slots_BL.reshape(-1)), dtype)
    return gathered.view(num_sequences, num_keys, *gathered.shape[1:]).transpose(1, 2)


def _attend(
    q_THD: torch.Tensor,
    k_BGLD: torch.Tensor,
    v_BGLD: torch.Tensor,
    visible_B1QL: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    num_sequences, num_kv_heads, _, head_dim = k_BGLD.shape
    num_queries = visible_B1QL.shape[2]
    if softcap is not None:
        return _attend_softcapped(q_THD, k_BGLD, v_BGLD, visible_B1QL, scale, softcap)
    if num_queries == 1:
        # The query heads of a group pass as queries of one head: no copy of keys per head.
        q_BGRD = q_THD.view(num_sequences, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(
            q_BGRD, k_BGLD, v_BGLD, attn_mask=visible_B1QL, scale=scale
        )
        return out.reshape(q_THD.shape)
    q_BHQD = q_THD.view(num_sequences, num_queries, -1, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q_BHQD, k_BGLD, v_BGLD, attn_mask=visible_B1QL, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(q_THD.shape)


def _attend_softcapped(
    q_THD: torch.Tensor,
    k_BGLD: torch.Tensor,
    v_BGLD: torch.Tensor,
    visible_B1QL: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Scores squashed to ±softcap before the softmax (Gemma 2), which no fused kernel does."""
    num_sequences, num_kv_heads, _, head_dim = k_BGLD.shape
    num_queries = visible_B1QL.shape[2]
    q = q_THD.view(num_sequences, num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores_BGRQL = torch.matmul(q, k_BGLD.unsqueeze(2).transpose(-1, -2)).float() * scale
    scores_BGRQL = torch.tanh(scores_BGRQL / softcap) * softcap
    scores_BGRQL = scores_BGRQL.masked_fill(~visible_B1QL.unsqueeze(2), -torch.inf)
    weights = scores_BGRQL.softmax(dim=-1).to(v_BGLD.dtype)
    out_BGRQD = torch.matmul(weights, v_BGLD.unsqueeze(2))
    return out_BGRQD.permute(0, 3, 1, 2, 4).reshape(q_THD.shape)
