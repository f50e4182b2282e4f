"""Classical recommenders: the bars that a generative model has to pass.

Each `fit` takes events and gives a scorer: histories -> score of every item, [U, I] float32. They look at the
items of the histories that they are asked about, so users need not be among those of the events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.recsys.interactions import Interactions

Scorer = Callable[[Sequence[Tensor]], Tensor]
MOST_DENSE = 30_000


def most_popular(events: Interactions) -> Scorer:
    """Number of events of an item, the same for everybody."""
    score_I = torch.bincount(events.item_E, minlength=len(events.items)).float()
    return lambda histories: score_I.expand(len(histories), -1)


def item_knn(events: Interactions, *, neighbours: int = 50) -> Scorer:
    """Sum of the cosines of an item's users with those of the history's items, of the nearest."""
    gram_II = _gram(events)
    norm_I = gram_II.diagonal().sqrt().clamp(min=1)
    cosine_II = gram_II / norm_I / norm_I.unsqueeze(1)
    cosine_II.fill_diagonal_(0.0)
    least = cosine_II.topk(min(neighbours, len(norm_I)), dim=1).values[:, -1:]
    kept_II = torch.where(cosine_II >= least, cosine_II, 0.0)
    return lambda histories: _profiles(histories, len(norm_I)) @ kept_II.T


def sequential_rules(events: Interactions, *, window: int = 5) -> Scorer:
    """Sum over events of the history's last item and a later one, at most `window` apart, of 1 / distance.

    Ludewig and Jannach 2018 (1803.09587), 'sequential rules'.
    """
    num = _refuse_many(events, "Rules")
    rule_II = torch.zeros(num, num)
    for distance in range(1, window + 1):
        same = events.user_E[distance:] == events.user_E[:-distance]
        before, after = events.item_E[:-distance][same], events.item_E[distance:][same]
        rule_II.index_put_((before, after), torch.full((len(before),), 1 / distance), accumulate=True)
    return lambda histories: torch.stack([rule_II[h[-1]] if len(h) else torch.zeros(num) for h in histories])


def ease(events: Interactions, *, penalty: float = 500.0) -> Scorer:
    """x B with B = I - P / diag(P), P = (X'X + penalty I)^-1: EASE (Steck 2019, 1905.03375), eq. 8."""
    weight_II = _ease(events, penalty)
    return lambda histories: _profiles(histories, len(weight_II)) @ weight_II


def ease_recency(events: Interactions, *, penalty: float = 500.0, decay: float = 0.8) -> Scorer:
    """EASE of a history whose items weigh decay ** age, the latest's age 0."""
    weight_II = _ease(events, penalty)
    return lambda histories: _profiles(histories, len(weight_II), decay=decay) @ weight_II


def implicit_als(events: Interactions, *, factors: int = 64, num_iterations: int = 15) -> Scorer:
    """Weighted matrix factorisation of implicit feedback (Hu et al. 2008), of the package `implicit`."""
    try:
        from implicit.cpu.als import AlternatingLeastSquares
    except ImportError as error:
        raise ValueError("evaluation.bars=iALS needs the package implicit: pip install implicit") from error
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    def matrix(users: Tensor, items: Tensor, num: int) -> csr_matrix:
        ones = np.ones(len(items), dtype=np.float32)
        made = csr_matrix((ones, (users.numpy(), items.numpy())), shape=(num, len(events.items)))
        made.data[:] = 1.0
        return made

    model = AlternatingLeastSquares(
        factors=factors, iterations=num_iterations, random_state=0, num_threads=1, use_cg=True
    )
    with threadpool_limits(limits=1, user_api="blas"):
        model.fit(matrix(events.user_E, events.item_E, len(events.users)), show_progress=False)

    def score(histories: Sequence[Tensor]) -> Tensor:
        users = torch.repeat_interleave(torch.tensor([len(h) for h in histories]))
        rows = matrix(users, torch.cat(list(histories)), len(histories))
        with threadpool_limits(limits=1, user_api="blas"):
            found = model.recalculate_user(np.arange(len(histories)), rows)
        return torch.from_numpy(np.asarray(found @ model.item_factors.T, dtype=np.float32))

    return score


BARS: dict[str, Callable[[Interactions], Scorer]] = {
    "MostPop": most_popular,
    "ItemKNN": item_knn,
    "Rules": sequential_rules,
    "EASE": ease,
    "EASE x recency": ease_recency,
    "iALS": implicit_als,
}


def _refuse_many(events: Interactions, name: str) -> int:
    num = len(events.items)
    if num > MOST_DENSE:
        raise ValueError(
            f"evaluation.bars={name} keeps a table of items by items: {num:,} are more than {MOST_DENSE:,}; "
            "leave it out"
        )
    return num


def _users_items(events: Interactions) -> Tensor:
    """1 where a user has an item, [U, I] sparse."""
    shape = (len(events.users), len(events.items))
    pairs = (events.user_E * shape[1] + events.item_E).unique()
    places = torch.stack([pairs // shape[1], pairs % shape[1]])
    return torch.sparse_coo_tensor(places, torch.ones(len(pairs)), shape, check_invariants=False)


def _gram(events: Interactions) -> Tensor:
    _refuse_many(events, "ItemKNN or EASE")
    from scipy.sparse import csr_matrix

    found = _users_items(events).coalesce()
    rows, columns = found.indices().numpy()
    matrix = csr_matrix((found.values().numpy(), (rows, columns)), shape=tuple(found.shape))
    return torch.from_numpy((matrix.T @ matrix).toarray())


def _ease(events: Interactions, penalty: float) -> Tensor:
    gram_II = _gram(events)
    gram_II.diagonal().add_(penalty)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    weight_II = -inverse_II / inverse_II.diagonal()
    return weight_II.fill_diagonal_(0.0)


def _profiles(histories: Sequence[Tensor], num_items: int, *, decay: float = 1.0) -> Tensor:
    """Weight of every item in each history, [U, I]; an item that comes twice has its latest weight."""
    found = np.zeros((len(histories), num_items), dtype=np.float32)
    for row, history in zip(found, histories, strict=True):
        # Of an index that comes twice numpy keeps the last value, the latest event's.
        row[history.numpy()] = decay ** np.arange(len(history) - 1, -1, -1)
    return torch.from_numpy(found)
