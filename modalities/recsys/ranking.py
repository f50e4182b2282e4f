"""Metrics of rankings of the whole catalogue, at the level of items.

Shapes: U users, k places, I items, m items of a session, D width of item vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_items(score_UI: Tensor, k: int, seen: Sequence[Tensor] | None = None) -> Tensor:
    """The k best-scored items of each user, best first, [U, k]; of equal scores the lower number first.

    seen: items of each user that are not ranked. -1 where fewer than k items are left.
    """
    score = score_UI.to(torch.float64, copy=True)
    if seen is not None:
        rows = torch.repeat_interleave(torch.tensor([len(s) for s in seen]))
        score[rows, torch.cat(list(seen)) if len(seen) else rows] = -torch.inf
    k = min(k, score.shape[1])
    values, items = score.sort(dim=1, descending=True, stable=True)
    return torch.where(values[:, :k] > -torch.inf, items[:, :k], -1)


def ranking_metrics(items_Uk: Tensor, target_U: Tensor, ks: Sequence[int] = (5, 10, 20)) -> dict[str, Tensor]:
    """recall@k = [rank <= k] and ndcg@k = [rank <= k] / log2(1 + rank) of each user's target, [U] float64.

    ValueError when fewer than max(ks) places are given.
    """
    if items_Uk.shape[1] < max(ks):
        raise ValueError(f"recall@{max(ks)} needs {max(ks)} ranked items a user, not {items_Uk.shape[1]}")
    hit_Uk = items_Uk == target_U.unsqueeze(1)
    rank_U = torch.where(hit_Uk.any(1), hit_Uk.double().argmax(1) + 1.0, torch.inf)
    found: dict[str, Tensor] = {}
    for k in ks:
        inside = rank_U <= k
        found[f"recall@{k}"] = inside.double()
        found[f"ndcg@{k}"] = torch.where(inside, 1 / torch.log2(1 + rank_U), 0.0).double()
    return found


def coverage(items_Uk: Tensor, num_items: int) -> float:
    """Share of the catalogue that is recommended to anybody."""
    return len(items_Uk[items_Uk >= 0].unique()) / num_items


def popularity_share(items_Uk: Tensor, popularity_I: Tensor, share: float = 0.2) -> Tensor:
    """Share of each user's recommendations that are among the most popular items of the catalogue, [U]."""
    most = popularity_I.argsort(descending=True, stable=True)[: max(1, round(share * len(popularity_I)))]
    there = items_Uk >= 0
    return (torch.isin(items_Uk, most) & there).sum(1) / there.sum(1).clamp(min=1)


def diversity(items_Uk: Tensor, vectors_ID: Tensor) -> Tensor:
    """1 - mean cosine of the vectors of two recommendations of a user, [U]; 0 for fewer than two."""
    unit = torch.nn.functional.normalize(vectors_ID.double(), dim=-1)
    there = (items_Uk >= 0).double()
    vectors = unit[items_Uk.clamp(min=0)] * there.unsqueeze(-1)
    count = there.sum(1)
    pairs = count * (count - 1)
    similar = vectors.sum(1).square().sum(-1) - vectors.square().sum((1, 2))
    return torch.where(pairs > 0, 1 - similar / pairs.clamp(min=1), 0.0)


def repeats(sessions_NM: Tensor) -> Tensor:
    """Share of each session's items that it has already, [N]."""
    ordered = sessions_NM.sort(dim=1).values
    there = sessions_NM >= 0
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return again.sum(1) / there.sum(1).clamp(min=1)


def expected_metrics(
    group_Uk: Tensor, target_group_U: Tensor, sizes_G: Tensor, ks: Sequence[int] = (5, 10, 20)
) -> dict[str, Tensor]:
    """Metrics of rankings of groups of items that cannot be told apart, such as items of one semantic id.

    The target stands at a uniformly random place among its group's, which follows those of the groups ranked
    above: recall and NDCG are the mean over those places. A tokenizer that gives all items one id scores as
    chance does. group_Uk: -1 for none; sizes_G: items of each group.
    """
    sizes_Uk = torch.where(group_Uk >= 0, sizes_G[group_Uk.clamp(min=0)], 0)
    before_Uk = sizes_Uk.cumsum(1) - sizes_Uk
    hit_Uk = group_Uk == target_group_U.unsqueeze(1)
    found_U = hit_Uk.any(1)
    at = hit_Uk.double().argmax(1, keepdim=True)
    first = before_Uk.gather(1, at).squeeze(1)
    size = sizes_G[target_group_U.clamp(min=0)]
    gains = 1 / torch.log2(2 + torch.arange(max(ks), dtype=torch.float64))
    total = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    found: dict[str, Tensor] = {}
    for k in ks:
        low, high = first.clamp(max=k), (first + size).clamp(max=k)
        inside = torch.where(found_U, (high - low) / size, 0.0).double()
        found[f"recall@{k}"] = inside
        found[f"ndcg@{k}"] = torch.where(found_U, (total[high] - total[low]) / size, 0.0).double()
    return found
