import math

import pytest
import torch

from triptych.modalities.recsys.hidden_ratings import (
    HiddenRatings,
    hide_ratings,
    item_mean_rerank,
    item_means,
    judge_hidden,
)
from triptych.modalities.recsys.interactions import Interactions


def events(*rows, num_items=20, rated=True):
    """Users a, b, ... with [(item, rating), ...] each."""
    lengths = torch.tensor([len(row) for row in rows])
    flat = [pair for row in rows for pair in row]
    return Interactions(
        users=tuple("abcdefgh"[: len(rows)]),
        items=tuple(str(n) for n in range(num_items)),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        item_E=torch.tensor([item for item, _ in flat]),
        time_E=torch.arange(len(flat)).double(),
        rating_E=torch.tensor([float(r) for _, r in flat]) if rated else None,
    )


def hidden(*rows):
    """Hidden ratings by hand, {item: rating} a user."""
    return HiddenRatings(
        known=events([(0, 3)]),
        users=tuple(range(len(rows))),
        items=tuple(torch.tensor(list(row), dtype=torch.int64) for row in rows),
        ratings=tuple(torch.tensor(list(row.values()), dtype=torch.float64) for row in rows),
    )


def judged(items, against, *rows):
    return judge_hidden(torch.tensor(items), hidden(*rows), against_Rk=torch.tensor(against))


THREE = [[(n, n % 5 + 1) for n in range(9)], [(n, 4) for n in range(5, 15)], [(2, 1)]]


def test_half_of_the_judged_users_ratings_are_hidden_and_the_rest_is_known():
    whole = events(*THREE)
    found = hide_ratings(whole, [0, 2], seed=0)
    assert [len(items) for items in found.items] == [4, 0]
    known = [set(found.known.of(u).tolist()) for u in range(3)]
    assert known[0] | set(found.items[0].tolist()) == set(range(9))
    assert known[0].isdisjoint(found.items[0].tolist())
    assert found.ratings[0].tolist() == [n % 5 + 1 for n in found.items[0].tolist()]
    assert known[1:] == [set(range(5, 15)), {2}]
    assert len(found.known.rating_E) == 20 - 4


def test_what_is_hidden_depends_on_the_user_and_the_seed_alone():
    first = hide_ratings(events(*THREE), [0], seed=0).items[0].tolist()
    assert hide_ratings(events(*THREE), [1, 0], seed=0).items[1].tolist() == first
    assert hide_ratings(events(THREE[0]), [0], seed=0).items[0].tolist() == first
    others = [hide_ratings(events(*THREE), [0], seed=s).items[0].tolist() for s in range(1, 6)]
    assert any(other != first for other in others)


def test_all_events_of_a_hidden_item_go_and_its_last_rating_counts():
    whole = events([(3, 1), (3, 5), (3, 4)])
    found = hide_ratings(whole, [0], seed=0, share=0.5)
    assert found.items[0].tolist() == []
    for seed in range(8):
        found = hide_ratings(events([(3, 1), (4, 2), (3, 5)]), [0], seed=seed)
        (item,) = found.items[0].tolist()
        assert found.ratings[0].tolist() == [{3: 5.0, 4: 2.0}[item]]
        assert set(found.known.of(0).tolist()) == {3, 4} - {item}


def test_nothing_to_hide_is_refused():
    with pytest.raises(ValueError, match="there are no ratings to hide"):
        hide_ratings(events(*THREE, rated=False), [0], seed=0)
    with pytest.raises(ValueError, match=r"share=1.0 must be between 0 and 1"):
        hide_ratings(events(*THREE), [0], seed=0, share=1.0)
    with pytest.raises(ValueError, match="got 0"):
        hide_ratings(events(*THREE), [], seed=0)


def test_precision_and_lift_are_those_worked_by_hand():
    first, second = {10: 5, 11: 3, 12: 4, 13: 1}, {1: 4, 2: 5, 3: 2}
    rows = judged([[10, 11, 19], [3, -1, 1]], [[10, 12, 19], [3, 7, -1]], first, second)
    assert rows.liked.tolist() == [1, 1]
    assert rows.disliked.tolist() == [1, 1]
    assert rows.precision.tolist() == [0.5, 0.5]
    assert rows.base.tolist() == pytest.approx([0.5, 2 / 3])
    assert rows.rating.tolist() == [4.0, 3.0]
    assert rows.against.tolist() == [4.5, 2.0]
    assert rows.lift.tolist() == [-0.5, 1.0]


def test_a_rating_of_3_and_a_half_is_not_liked_and_an_item_recommended_twice_counts_once():
    rows = judged([[1, 1, 2]], [[1, 2, 3]], {1: 3.5, 2: 4, 3: 5})
    assert (rows.liked.item(), rows.disliked.item()) == (1, 1)
    assert rows.rating.item() == 3.75


def test_users_of_whom_nothing_recommended_is_rated_are_not_judged():
    rows = judged([[5, 6], [1, 2]], [[1, 2], [8, 9]], {1: 4, 2: 2}, {1: 4, 2: 2})
    assert [math.isnan(v) for v in rows.precision.tolist()] == [True, False]
    assert all(math.isnan(v) for v in rows.lift.tolist())
    found = rows.summary(seed=0)
    assert set(found) == {"precision", "precision_lift"}
    assert (found["precision"].mean, found["precision"].n) == (0.5, 1)
    assert not judged([[5]], [[5]], {1: 4}).summary(seed=0)
    assert not judged([[5]], [[5]], {}).summary(seed=0)


def test_the_summary_pools_recommendations_and_averages_users():
    ratings = {1: 5, 2: 4, 3: 4, 4: 1}
    rows = judged([[1, 2, 3], [4, -1, -1]], [[4, -1, -1], [1, 4, -1]], ratings, ratings)
    found = rows.summary(seed=0)
    assert found["precision"].mean == pytest.approx(3 / 4)
    assert found["precision_lift"].mean == pytest.approx(((1 - 0.75) + (0 - 0.75)) / 2)
    assert found["rating_lift"].mean == pytest.approx(((13 / 3 - 1) + (1 - 3)) / 2)
    assert found["rating_lift"].n == 2
    assert found["rating_lift"].low == pytest.approx(-2.0)
    assert found["rating_lift"].high == pytest.approx(10 / 3)
    assert rows.summary(seed=0) == found


def test_rows_that_are_not_those_of_the_judged_users_are_refused():
    with pytest.raises(ValueError, match=r"items is \[2, 1\]; expected \[1, k\]"):
        judged([[1], [2]], [[1]], {1: 4})
    with pytest.raises(ValueError, match=r"against is \[2, 1\]"):
        judged([[1]], [[1], [2]], {1: 4})


def test_item_means_are_drawn_to_the_mean_of_all():
    known = events([(0, 5), (1, 1)], [(0, 3), (2, 3)], num_items=4)
    assert item_means(known, prior=0.0).tolist() == [4.0, 1.0, 3.0, 3.0]
    # The mean of all is 3; two ratings of it are added to each item.
    assert item_means(known, prior=2.0).tolist() == [(8 + 6) / 4, (1 + 6) / 3, 3.0, 3.0]
    with pytest.raises(ValueError, match="no mean rating"):
        item_means(events([(0, 3)], rated=False))


def test_the_rerank_by_item_means_takes_the_best_candidates_and_the_earlier_of_equals():
    mean = torch.tensor([3.0, 4.0, 4.0, 1.0])
    candidates = torch.tensor([[3, 2, 0, 1], [-1, 3, -1, 0], [-1, -1, -1, -1]])
    assert item_mean_rerank(candidates, mean, 3).tolist() == [[2, 1, 0], [0, 3, -1], [-1, -1, -1]]
