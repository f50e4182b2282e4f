import math

import pytest
import torch

from triptych.modalities.recsys.ranking import (
    coverage,
    diversity,
    expected_metrics,
    popularity_share,
    ranking_metrics,
    repeats,
    top_items,
)


def test_the_best_items_come_first_ties_by_number_and_seen_ones_not_at_all():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_items(score, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    seen = [torch.tensor([1]), torch.tensor([0, 2, 3])]
    assert top_items(score, 3, seen).tolist() == [[2, 3, 0], [1, -1, -1]]


def test_recall_and_ndcg_by_hand():
    items = torch.tensor([[4, 7, 1], [4, 7, 1], [4, 7, -1]])
    found = ranking_metrics(items, torch.tensor([4, 1, 9]), (1, 3))
    assert found["recall@1"].tolist() == [1.0, 0.0, 0.0]
    assert found["recall@3"].tolist() == [1.0, 1.0, 0.0]
    assert found["ndcg@3"].tolist() == pytest.approx([1.0, 1 / math.log2(4), 0.0])
    with pytest.raises(ValueError, match="needs 5 ranked items a user, not 3"):
        ranking_metrics(items, torch.tensor([4, 1, 9]), (5,))


def test_metrics_equal_a_loop_over_users():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(5, (30, 12), generator=generator).float()
    target = torch.randint(12, (30,), generator=generator)
    found = ranking_metrics(top_items(score, 12), target, (3,))
    for u in range(30):
        order = sorted(range(12), key=lambda i: (-float(score[u, i]), i))
        rank = order.index(int(target[u])) + 1
        assert float(found["recall@3"][u]) == (rank <= 3)
        assert float(found["ndcg@3"][u]) == pytest.approx(1 / math.log2(1 + rank) if rank <= 3 else 0)


def test_one_id_for_all_items_scores_as_chance_does():
    groups, target = torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    found = expected_metrics(groups, target, torch.tensor([100]), (10,))
    assert found["recall@10"].tolist() == pytest.approx([0.1] * 5)
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / 100
    assert found["ndcg@10"].tolist() == pytest.approx([chance] * 5)


def test_a_shared_id_counts_the_mean_over_its_places():
    # Groups of 2, 1 and 3 items, ranked 1, 0, 2: the target's group has places 2 and 3.
    found = expected_metrics(torch.tensor([[1, 0, 2]]), torch.tensor([0]), torch.tensor([2, 1, 3]), (1, 2, 3))
    assert [float(found[f"recall@{k}"]) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert float(found["ndcg@3"]) == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 2)


def test_ids_of_one_item_each_give_the_plain_metrics():
    generator = torch.Generator().manual_seed(1)
    items = torch.stack([torch.randperm(9, generator=generator) for _ in range(6)])
    target = torch.arange(6)
    one = expected_metrics(items, target, torch.ones(9, dtype=torch.int64), (2, 5))
    for name, values in ranking_metrics(items, target, (2, 5)).items():
        torch.testing.assert_close(one[name], values)


def test_what_is_recommended_is_counted():
    items = torch.tensor([[0, 1], [0, -1]])
    assert coverage(items, 8) == 0.25
    assert popularity_share(items, torch.tensor([9, 1, 1, 1, 1]), 0.2).tolist() == [0.5, 1.0]
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert diversity(items, vectors).tolist() == pytest.approx([1.0, 0.0])
    assert diversity(torch.tensor([[0, 0]]), vectors).tolist() == pytest.approx([0.0])
    assert repeats(torch.tensor([[3, 3, 1], [1, 2, -1], [5, 5, 5]])).tolist() == pytest.approx(
        [1 / 3, 0, 2 / 3]
    )
