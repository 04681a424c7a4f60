"""Causal attention over one whole sequence, without a cache: the plain statement of `Attend`."""

from __future__ import annotations

import torch


class DenseAttend:
    """An `Attend` for a step that is one sequence from position 0. Memory grows with T squared."""

    native_step = None

    def __call__(
        self,
        layer: int,  # noqa: ARG002 - part of the Attend protocol
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        num_tokens, num_heads, _ = q_THD.shape
        group_size = num_heads // k_TGD.shape[1]
        k_HTD = k_TGD.repeat_interleave(group_size, dim=1).transpose(0, 1)
        v_HTD = v_TGD.repeat_interleave(group_size, dim=1).transpose(0, 1)
        scores_HTT = q_THD.transpose(0, 1) @ k_HTD.transpose(1, 2) * scale
        if softcap is not None:
            scores_HTT = torch.tanh(scores_HTT / softcap) * softcap
        scores_HTT = scores_HTT.masked_fill(_hidden(num_tokens, window, q_THD.device), -torch.inf)
        weights_HTT = scores_HTT.softmax(dim=-1, dtype=torch.float32).to(v_TGD.dtype)
        return (weights_HTT @ v_HTD).transpose(0, 1)


def _hidden(num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where a query (row) must not see a key (column)."""
    everything = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    hidden = everything.triu(1)
    return hidden if window is None else hidden | everything.tril(-window)
