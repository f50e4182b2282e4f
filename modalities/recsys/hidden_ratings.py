"""A judge without synthesis: some real ratings are hidden, and recommendations are read against them.

Only items that the user has rated say anything, so most recommendations are not judged, and those that are
were chosen by the user. It is a small judge, but a real one.

Shapes: R judged users, k places, I items, H hidden ratings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.ranking import top_items
from triptych.training.order import key
from triptych.training.stats import Estimate, bootstrap_interval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HiddenRatings:
    """known: the events that a recommender may see, of all users. users: numbers of the judged, R.

    items, ratings: what is hidden of each, in the order of users.
    """

    known: Interactions
    users: tuple[int, ...]
    items: tuple[Tensor, ...]
    ratings: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HiddenRows:
    """What the hidden ratings say of the recommendations to each user, a row a user, [R] float64.

    liked, disliked: recommended items with a hidden rating of at least `liked_from`, and below it. precision:
    liked / (liked + disliked), NaN when neither. base: that of all hidden ratings of the user, which is what
    recommending them at random gets. rating, against: mean hidden rating of the recommended, and of the
    recommendations compared with; lift: their difference; NaN where nothing recommended is rated.
    """

    users: tuple[int, ...]
    liked: Tensor
    disliked: Tensor
    precision: Tensor
    base: Tensor
    rating: Tensor
    against: Tensor
    lift: Tensor

    def summary(self, *, seed: int) -> dict[str, Estimate]:
        """Bootstrap intervals over users.

        precision: of all judged recommendations together; precision_lift: mean over users of precision -
        base; rating_lift: mean of lift. Of users for whom both parts are there; without any, left out.
        """
        judged = self.liked + self.disliked
        found: dict[str, Estimate] = {}
        rows = judged > 0
        if rows.any():
            pair = torch.stack([self.liked, judged], 1)[rows]
            found["precision"] = bootstrap_interval(pair, seed=seed, statistic=_ratio)
            found["precision_lift"] = bootstrap_interval((self.precision - self.base)[rows], seed=seed)
        if self.lift.isfinite().any():
            found["rating_lift"] = bootstrap_interval(self.lift[self.lift.isfinite()], seed=seed)
        return found


def hide_ratings(
    events: Interactions, users: Sequence[int], *, seed: int, share: float = 0.5
) -> HiddenRatings:
    """Hide floor(share * n) of each user's n rated items; all events of a hidden item go.

    Which ones depends on the seed, the user's name and the user's own items alone. Of an item that was rated
    more than once the last rating counts. ValueError for no users, a share outside 0 to 1, or no ratings.
    """
    if events.rating_E is None:
        raise ValueError("there are no ratings to hide: the events have none (rating_E)")
    if not users or not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1, of at least one user; got {len(users)}")
    keep_E = torch.ones(len(events.item_E), dtype=torch.bool)
    items, ratings = [], []
    for user in users:
        begin, end = int(events.offsets[user]), int(events.offsets[user + 1])
        places = {int(item): place for place, item in enumerate(events.item_E[begin:end].tolist())}
        every = torch.tensor(sorted(places), dtype=torch.int64)
        generator = torch.Generator().manual_seed(key("hidden", seed, events.users[user]))
        hidden = every[torch.randperm(len(every), generator=generator)[: int(share * len(every))]]
        hidden = hidden.sort().values
        last = torch.tensor([places[item] for item in hidden.tolist()], dtype=torch.int64)
        items.append(hidden)
        ratings.append(events.rating_E[begin:end][last].double())
        keep_E[begin:end] = ~torch.isin(events.item_E[begin:end], hidden)
    return HiddenRatings(
        known=events.kept(keep_E), users=tuple(users), items=tuple(items), ratings=tuple(ratings)
    )


def item_means(known: Interactions, *, prior: float = 5.0) -> Tensor:
    """Mean rating of every item, as if it also had `prior` ratings of the mean of all, [I] float64."""
    if known.rating_E is None or not len(known.rating_E):
        raise ValueError("items have no mean rating: the events have no ratings (rating_E)")
    rating_E = known.rating_E.double()
    total_I = torch.zeros(len(known.items), dtype=torch.float64).index_add(0, known.item_E, rating_E)
    count_I = torch.bincount(known.item_E, minlength=len(known.items))
    mean = rating_E.mean()
    if prior <= 0:
        return torch.where(count_I > 0, total_I / count_I.clamp(min=1), mean)
    return (total_I + prior * mean) / (count_I + prior)


def item_mean_rerank(candidates_Rc: Tensor, mean_I: Tensor, k: int) -> Tensor:
    """The k candidates of the highest item mean, the same for everybody, best first, [R, k]; -1 = none.

    Of equal means the earlier candidate comes first. A recommender that has only learnt which items are good
    does no better than this.
    """
    there = candidates_Rc >= 0
    score = torch.where(there, mean_I.double()[candidates_Rc.clamp(min=0)], -torch.inf)
    place_Rk = top_items(score, k)
    return torch.where(place_Rk >= 0, candidates_Rc.gather(1, place_Rk.clamp(min=0)), -1)


def judge_hidden(
    items_Rk: Tensor, hidden: HiddenRatings, *, against_Rk: Tensor, liked_from: float = 4.0
) -> HiddenRows:
    """Read the recommendations of each judged user against the hidden ratings; -1 is no item.

    against_Rk: other recommendations to the same users from the same candidates, such as
    `item_mean_rerank`'s. An item that is recommended twice counts once. ValueError when the rows are not
    those of hidden.users.
    """
    for name, items in (("items", items_Rk), ("against", against_Rk)):
        if items.ndim != 2 or len(items) != len(hidden.users):
            raise ValueError(
                f"{name} is {list(items.shape)}; expected [{len(hidden.users)}, k], a row a user"
            )
    ours = _found(items_Rk, hidden, liked_from)
    theirs = _found(against_Rk, hidden, liked_from)
    liked, disliked, rating = ours.unbind(1)
    share = [float((r >= liked_from).double().mean()) if len(r) else float("nan") for r in hidden.ratings]
    return HiddenRows(
        users=hidden.users,
        liked=liked,
        disliked=disliked,
        precision=liked / (liked + disliked),
        base=torch.tensor(share, dtype=torch.float64),
        rating=rating,
        against=theirs[:, 2],
        lift=rating - theirs[:, 2],
    )


def _found(items_Rk: Tensor, hidden: HiddenRatings, liked_from: float) -> Tensor:
    """Liked, disliked, and the mean hidden rating of what is recommended to each user, [R, 3] float64."""
    rows = []
    for row, items, ratings in zip(items_Rk, hidden.items, hidden.ratings, strict=True):
        rated = ratings[torch.isin(items, row)]
        liked = int((rated >= liked_from).sum())
        mean = float(rated.mean()) if len(rated) else float("nan")
        rows.append([liked, len(rated) - liked, mean])
    return torch.tensor(rows, dtype=torch.float64)


def _ratio(pairs_N2: Tensor) -> float:
    return float(pairs_N2[:, 0].sum() / pairs_N2[:, 1].sum())
