"""Credit: from rewards to advantages, per group [B, K] or per unit [B, U]. Nothing here carries a gradient.

Groups are K samples of one context; mask False marks samples that do not exist. Padding may hold anything,
and gets 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.objectives.aggregation import clean


def _valid(reward: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(reward, dtype=torch.bool) if mask is None else mask


@torch.no_grad()
def centred(reward: Tensor, mask: Tensor | None = None) -> Tensor:
    """R_i - mean_j R_j, [B, K] (Dr. GRPO)."""
    valid = _valid(reward, mask)
    known = clean(reward, valid)
    mean = known.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return clean(known - mean, valid)


@torch.no_grad()
def leave_one_out(reward: Tensor, mask: Tensor | None = None) -> Tensor:
    """R_i - mean_{j != i} R_j = K/(K - 1) (R_i - mean R), [B, K] (RLOO); 0 for a sample on its own."""
    count = _valid(reward, mask).sum(-1, keepdim=True)
    return centred(reward, mask) * count / (count - 1).clamp(min=1)


@torch.no_grad()
def z_score(reward: Tensor, mask: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """(R_i - mean R) / (std R + eps), [B, K] (GRPO); sample deviation (K - 1), as in TRL.

    Weighs contexts by 1 / std: those where nearly all samples agree count most (the known difficulty bias).
    """
    away = centred(reward, mask)
    count = _valid(reward, mask).sum(-1, keepdim=True)
    return away / ((away.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)


@torch.no_grad()
def win_share(preference: Tensor) -> Tensor:
    """mean_{j != i} P(y_i preferred to y_j), [B, K]; preference [B, K, K] (minimaximalist SPO).

    Swamy et al. 2024, arXiv 2401.04056. As an advantage subtract one half.
    """
    own = preference.diagonal(dim1=-2, dim2=-1)
    return (preference.sum(-1) - own) / (preference.shape[-1] - 1)


@torch.no_grad()
def win_share_with_self(preference: Tensor) -> Tensor:
    """mean_j P(y_i preferred to y_j), P_ii = 1/2 included, [B, K]; preference [B, K, K] (SPPO)."""
    k = preference.shape[-1]
    return (win_share(preference) * (k - 1) + 0.5) / k


@torch.no_grad()
def per_unit(advantage: Tensor, mask: Tensor) -> Tensor:
    """The advantage of each row at every unit of it, [B] -> [B, U]."""
    return clean(advantage.unsqueeze(-1).expand(mask.shape), mask)


@torch.no_grad()
def kl_shaped_reward(score: Tensor, log_ratio: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """-beta log_ratio_u at every unit, plus the row's score at its last one, [B, U].

    score [B]; log_ratio = logp - ref [B, U] (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).
    """
    remaining = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (remaining == 1)
    return clean(-beta * log_ratio, mask) + clean(score.unsqueeze(-1).expand(mask.shape), last)


@torch.no_grad()
def gae(
    reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and their returns, both [B, U].

    A_t = sum_k (gamma lam)^k d_{t+k}, d_t = R_t + gamma V_{t+1} - V_t, return_t = A_t + V_t; nothing
    follows a row's last unit. Units that the mask leaves out are stepped over. Schulman et al. 2015, arXiv
    1506.02438, eq. 16.
    """
    value = clean(value, mask)
    advantage = torch.zeros_like(value)
    following, ahead = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        error = reward[:, t] + gamma * following - value[:, t]
        ahead = torch.where(mask[:, t], error + gamma * lam * ahead, ahead)
        following = torch.where(mask[:, t], value[:, t], following)
        advantage[:, t] = torch.where(mask[:, t], ahead, 0.0)
    return advantage, advantage + value


@torch.no_grad()
def whiten(advantage: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(var + eps) over all units of the batch, [B, U]; sample variance. Couples the batch.

    For the policy only: returns and values stay as `gae` has them.
    """
    total = mask.sum()
    away = clean(advantage - clean(advantage, mask).sum() / total.clamp(min=1), mask)
    variance = away.square().sum() / (total - 1).clamp(min=1)
    return away * (variance + eps).rsqrt()
