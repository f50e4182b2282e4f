"""Residual quantisation of item vectors: k-means, OneRec's balanced k-means, and a better balanced one.

Shapes: I items, D width of vectors, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["balanced", "paper_balanced", "kmeans"]
Labels = Literal["assigned", "nearest"]


@dataclass(frozen=True, slots=True)
class Codebook:
    """centroids_KD and the label of every vector, [I]."""

    centroids_KD: Tensor
    labels_I: Tensor


def quantise(
    vectors_ID: Tensor,
    *,
    num_codes: int,
    levels: int,
    method: Method,
    labels: Labels = "assigned",
    generator: torch.Generator,
    num_iterations: int = 50,
) -> tuple[Tensor, list[Codebook]]:
    """Codes [I, L] and the codebook of every level; each level quantises what the ones before left over.

    labels: 'assigned' keeps the clusters that the method found, which for the balanced ones have sizes that
    differ by at most one; 'nearest' takes argmin_k ||r - c_k||, the text's formula in OneRec
    (2502.18965, 2.1), whose algorithm balances: the paper leaves open which of the two it uses.
    ValueError for vectors that are not finite or more codes than items.
    """
    if bool((~torch.isfinite(vectors_ID)).any()):
        odd = int((~torch.isfinite(vectors_ID)).any(1).nonzero()[0, 0])
        raise ValueError(f"the vector of item {odd} is not finite")
    if not 1 <= num_codes <= len(vectors_ID):
        raise ValueError(f"{num_codes} codes for {len(vectors_ID)} items; valid: 1 to the number of items")
    residual_ID, books = vectors_ID.double(), []
    for _ in range(levels):
        book = METHODS[method](residual_ID, num_codes, generator, num_iterations)
        if labels == "nearest":
            book = Codebook(book.centroids_KD, _distances(residual_ID, book.centroids_KD).argmin(1))
        books.append(book)
        residual_ID = residual_ID - book.centroids_KD[book.labels_I]
    return torch.stack([b.labels_I for b in books], 1), books


def kmeans(x_ID: Tensor, num_codes: int, generator: torch.Generator, num_iterations: int) -> Codebook:
    """Lloyd's algorithm from k-means++ seeds; a cluster that loses all its items takes the farthest one."""
    centroids, labels = _seeds(x_ID, num_codes, generator), None
    for _ in range(num_iterations):
        distance_IK = _distances(x_ID, centroids)
        new = distance_IK.argmin(1)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        centroids, counts = _means(x_ID, labels, num_codes)
        empty = (counts == 0).nonzero()[:, 0]
        farthest = distance_IK.amin(1).argsort(descending=True)[: len(empty)]
        centroids[empty] = x_ID[farthest]
    assert labels is not None
    return Codebook(centroids, _distances(x_ID, centroids).argmin(1))


def paper_balanced(x_ID: Tensor, num_codes: int, generator: torch.Generator, num_iterations: int) -> Codebook:
    """OneRec's Algorithm 1, literally: each cluster in turn takes the |V| / K nearest of what is left.

    Its centroid becomes their mean at once. Where K does not divide |V| the first clusters take one more. The
    late clusters get the leftovers, which costs accuracy: `balanced` is the same without.
    """
    num = len(x_ID)
    centroids = x_ID[torch.randperm(num, generator=generator)[:num_codes]].clone()
    sizes = torch.full((num_codes,), num // num_codes)
    sizes[: num % num_codes] += 1
    labels = torch.full((num,), -1)
    for _ in range(num_iterations):
        left, new = torch.ones(num, dtype=torch.bool), torch.empty(num, dtype=torch.int64)
        for k, size in enumerate(sizes.tolist()):
            remaining = left.nonzero()[:, 0]
            distance = (x_ID[remaining] - centroids[k]).square().sum(1)
            taken = remaining[distance.argsort(stable=True)[:size]]
            centroids[k] = x_ID[taken].mean(0)
            new[taken], left[taken] = k, False
        if torch.equal(new, labels):
            break
        labels = new
    return Codebook(centroids, labels)


def balanced(x_ID: Tensor, num_codes: int, generator: torch.Generator, num_iterations: int) -> Codebook:
    """K-means whose clusters have sizes that differ by at most one, by optimal transport.

    Every round solves the entropic transport of items to clusters of equal capacity (Sinkhorn, Cuturi 2013,
    1306.0895), rounds it to whole items by how much each item would lose elsewhere, and takes means.
    """
    book = kmeans(x_ID, num_codes, generator, 10)
    centroids, best, least = book.centroids_KD, None, float("inf")
    for _ in range(min(num_iterations, 15)):
        labels = _rounded(_transport(_distances(x_ID, centroids)))
        centroids, _ = _means(x_ID, labels, num_codes)
        error = float((x_ID - centroids[labels]).square().sum())
        if error >= least * (1 - 1e-4):
            break
        best, least = Codebook(centroids, labels), error
    assert best is not None
    return best


METHODS: dict[str, Callable[[Tensor, int, torch.Generator, int], Codebook]] = {
    "balanced": balanced,
    "paper_balanced": paper_balanced,
    "kmeans": kmeans,
}


def _transport(cost_IK: Tensor, *, num_iterations: int = 50) -> Tensor:
    """Log of the entropic transport plan with uniform margins, [I, K]."""
    num, codes = cost_IK.shape
    score = -cost_IK / (0.05 * cost_IK.mean().clamp(min=1e-12))
    for _ in range(num_iterations):
        score = score - score.logsumexp(0) + torch.log(torch.tensor(num / codes))
        score = score - score.logsumexp(1, keepdim=True)
    return score


def _rounded(plan_IK: Tensor) -> Tensor:
    """Labels with clusters of floor or ceil(I / K) items: those who would lose most choose first."""
    num, codes = plan_IK.shape
    labels = torch.full((num,), -1)
    room = torch.full((codes,), num // codes)
    extra = num % codes
    score = plan_IK.clone()
    open_I = torch.arange(num)
    while len(open_I):
        # Wishes of all who have no place; each cluster takes those who would lose most elsewhere.
        two = score[open_I].topk(min(2, codes), dim=1)
        wish = two.indices[:, 0]
        regret = two.values[:, 0] - two.values[:, -1]
        order = regret.argsort(descending=True, stable=True)
        by_wish = order[wish[order].argsort(stable=True)]
        wishes = wish[by_wish]
        place = torch.arange(len(wishes)) - torch.searchsorted(wishes, wishes)
        taken = place < room[wishes]
        labels[open_I[by_wish[taken]]] = wishes[taken]
        room -= torch.bincount(wishes[taken], minlength=codes)
        # A full cluster may take one item more while there are such places.
        for row, k in zip(by_wish[~taken].tolist(), wishes[~taken].tolist(), strict=True):
            if extra and room[k] == 0:
                labels[open_I[row]], room[k], extra = k, -1, extra - 1
        score[:, room <= (-1 if extra else 0)] = -torch.inf
        open_I = open_I[labels[open_I] < 0]
    return labels


def _seeds(x_ID: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(x_ID), (1,), generator=generator))]
    distance_I = (x_ID - x_ID[chosen[0]]).square().sum(1)
    for _ in range(num_codes - 1):
        weight = distance_I if float(distance_I.sum()) > 0 else torch.ones_like(distance_I)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        distance_I = torch.minimum(distance_I, (x_ID - x_ID[chosen[-1]]).square().sum(1))
    return x_ID[chosen].clone()


def _distances(x_ID: Tensor, centroids_KD: Tensor) -> Tensor:
    """Squared distances, [I, K]."""
    product = x_ID @ centroids_KD.T
    square = x_ID.square().sum(1, keepdim=True) - 2 * product + centroids_KD.square().sum(1)
    return square.clamp(min=0)


def _means(x_ID: Tensor, labels_I: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(labels_I, minlength=num_codes)
    sums = torch.zeros(num_codes, x_ID.shape[1], dtype=x_ID.dtype).index_add(0, labels_I, x_ID)
    return sums / counts.clamp(min=1).unsqueeze(1), counts
