"""Attention over jagged rows, feed-forward layers and a sparse mixture of experts.

Shapes: T tokens in all, B users, M tokens of the longest history, D width, H heads, G key-value heads,
E head width, N sessions, C sessions of a user, S tokens of a session, X experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotated(x: Tensor, places: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, 2104.09864): x [..., E], places [...] up to broadcasting.

    Computed in float32 and cast back.
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = places.unsqueeze(-1).float() * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attend(q_BHQE: Tensor, k_BGME: Tensor, v_BGME: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k' / sqrt(E)) v, [B, H, Q, E]; mask True = may be seen; H a multiple of G."""
    grouped = q_BHQE.shape[1] != k_BGME.shape[1]
    return functional.scaled_dot_product_attention(
        q_BHQE, k_BGME, v_BGME, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped
    )


class FeedForward(nn.Module):
    """w_out(silu(w_gate x) * w_in x): SwiGLU (Shazeer 2020, 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.into = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.into(x).chunk(2, -1)
        return self.out(functional.silu(gate) * value)


class MixtureOfExperts(nn.Module):
    """sum over the top-k experts e of softmax(gate x)_e FFN_e(x), without renormalising.

    OneRec (2502.18965), eq. 2: the softmax is over all experts. Tokens are sorted by expert and each expert
    computes its own, so the work is that of k experts. balance_rate > 0 adds a bias to the choice, not to the
    weight, raised for experts with less than their share of a micro-batch and lowered for the others
    (loss-free balancing, Wang et al. 2024, 2408.15664); it is a parameter whose gradient is always zero, so
    that checkpoints keep it.
    """

    def __init__(self, width: int, hidden: int, *, num_experts: int, top_k: int, balance_rate: float = 0.0):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be from 1 to num_experts={num_experts}")
        self.top_k, self.balance_rate = top_k, balance_rate
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.into_XDF = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.out_XFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        for weight in (self.into_XDF, self.out_XFD):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.bias_X = nn.Parameter(torch.zeros(num_experts)) if balance_rate else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x_TD = x.reshape(-1, x.shape[-1])
        weight_TX = self.gate(x_TD).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        chosen_TJ = self._choose(weight_TX)
        weight_TJ = weight_TX.gather(1, chosen_TJ)
        order = chosen_TJ.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_TJ.flatten(), minlength=len(self.into_XDF))
        token_R = order // self.top_k
        rows_RD = x_TD.index_select(0, token_R)
        done = [self._expert(i, part) for i, part in enumerate(rows_RD.split(counts.tolist())) if len(part)]
        scaled_RD = torch.cat(done) * weight_TJ.flatten()[order].unsqueeze(-1).to(x.dtype)
        out_TD = scaled_RD.new_zeros(x_TD.shape).index_add(0, token_R, scaled_RD)
        if self.bias_X is not None:
            out_TD = out_TD + 0.0 * self.bias_X.sum().to(out_TD.dtype)
            if self.training and torch.is_grad_enabled():
                self._balance(counts)
        return out_TD.view(x.shape)

    def _choose(self, weight_TX: Tensor) -> Tensor:
        score = weight_TX.detach()
        return (score if self.bias_X is None else score + self.bias_X.detach()).topk(self.top_k, -1).indices

    def _expert(self, i: int, rows: Tensor) -> Tensor:
        gate, value = (rows @ self.into_XDF[i].to(rows.dtype)).chunk(2, -1)
        return (functional.silu(gate) * value) @ self.out_XFD[i].to(rows.dtype)

    @torch.no_grad()
    def _balance(self, counts: Tensor) -> None:
        assert self.bias_X is not None
        load = counts.float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.bias_X += self.balance_rate * torch.sign(load.mean() - load)
