"""Graded lists, labelled candidates and preferences of users, by hand-worked numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from judged import group

from triptych.objectives import ListLogLik, LogLik, PairLogLik, build
from triptych.training.groups import Group
from triptych.training.list_shapes import Conditioned, Labelled, Lists, steps_of
from triptych.training.shapes import left_out, shape_for


@dataclass(frozen=True)
class Asked:
    fields: dict[str, Any] = field(default_factory=dict)


def relevance(of: Group, **options: Any) -> list[float]:
    (sample,) = Lists(**options)([of], seed=0)
    return sample.fields["relevance"].tolist()


def test_a_list_holds_the_scores_of_all_candidates_as_they_were_drawn():
    groups = [group([0.5, 2.0, 0.5]), group([1.0]), group([3.0, 1.0])]
    samples = Lists()(groups, seed=0)
    assert [(s.group, s.candidates, s.fields["relevance"].tolist()) for s in samples] == [
        (0, (0, 1, 2), [0.5, 2.0, 0.5]),
        (2, (0, 1), [3.0, 1.0]),
    ]
    assert left_out(groups, samples) == 1


def test_ranks_are_in_0_to_1_ties_share_them_and_only_order_counts():
    assert relevance(group([0.5, 9.0, 0.5, -1.0]), relevance="rank") == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_win_shares_of_preferences_and_of_many_reward_models():
    cycle = [[0.5, 0.7, 0.4], [0.3, 0.5, 0.9], [0.6, 0.1, 0.5]]
    assert relevance(group({"preference": cycle}), relevance="win_share") == pytest.approx([0.55, 0.6, 0.35])
    # Model 1 ranks 0 > 1 > 2, model 2 has 1 on top and the others level: wins of (2 + .5, 1 + 2, 0 + .5) / 4.
    users = {"users": [[3.0, 0.0], [2.0, 5.0], [1.0, 0.0]]}
    assert relevance(group(users), relevance="users") == pytest.approx([0.625, 0.75, 0.125])


def test_rewards_and_proposals_give_the_golden_brain():
    of = group([1.0, 0.0, 0.5], logp=[[-2.2], [-2.8], [-2.4]])
    shape = shape_for(build("brain", gamma=1.0))
    (sample,) = shape([of], seed=0)
    assert shape.provides == {"reward", "proposal"}
    assert shape.needs == {"score|preference", "proposal|logp"}
    fields = {k: v.unsqueeze(0) for k, v in sample.fields.items()}
    logp, ref = torch.tensor([[-2.1, -2.9, -2.6]]), torch.tensor([[-2.0, -3.0, -2.5]])
    loss = build("brain", gamma=1.0)(ListLogLik(LogLik(logp, torch.ones(1, 3), ref), **fields))
    assert loss.item() == pytest.approx(0.104643, abs=1e-6)


def test_the_proposal_that_really_drew_comes_before_the_policy():
    of = group([1.0, 0.0], logp=[[-1.0], [-2.0]], proposal=[-3.0, -4.0])
    (sample,) = Lists(with_proposal=True)([of], seed=0)
    assert sample.fields["proposal"].tolist() == [-3.0, -4.0]


def test_the_best_k_keep_the_order_in_which_they_were_drawn():
    of = group([1.0, 4.0, 0.0, 2.0])
    (sample,) = Lists(top_k=3, with_reward=True)([of], seed=0)
    assert sample.candidates == (0, 1, 3)
    assert sample.fields["reward"].tolist() == [1.0, 4.0, 2.0]


def test_a_large_group_gives_a_random_part_that_the_seed_reproduces():
    groups = [group([0.0, 1.0, 2.0, 3.0, 4.0], key=f"g{i}") for i in range(40)]
    one, again, other = ([s.candidates for s in Lists(max_size=2)(groups, seed=s)] for s in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 10
    assert all(a < b for a, b in one)


def test_lists_of_equal_grades_may_be_left_out():
    groups = [group([1.0, 1.0]), group([1.0, 0.0])]
    assert [s.group for s in Lists(drop_equal=True)(groups, seed=0)] == [1]
    assert len(Lists()(groups, seed=0)) == 2


def test_steps_of_equal_weight_are_turns_or_units_that_are_no_tokens():
    of = group([1.0, 0.0], lengths=[3, 1], turn=[[0, 0, 1], [0, 5, 5]])
    found = steps_of(of)
    assert found["steps"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert found["step_weight"].tolist() == [[1.0, 1.0], [1.0, 0.0]]
    units = steps_of(group([1.0, 0.0], lengths=[2, 1], unit="denoise"))
    assert units["steps"].tolist() == [[0, 1], [0, 0]]
    assert units["step_weight"].tolist() == [[1.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="readout 'steps' needs turns"):
        steps_of(group([1.0, 0.0]))
    (sample,) = Lists(readout="steps")([of], seed=0)
    assert {"steps", "step_weight"} <= set(sample.fields)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": 2, "with_proposal": True}, "top_k=2 does not go with with_proposal"),
        ({"top_k": 2, "max_size": 4}, "top_k=2 does not go with max_size"),
        ({"max_size": 1}, "max_size=1 is less than min_size=2"),
        ({"relevance": "none", "drop_equal": True}, "drop_equal needs grades"),
        ({"relevance": "dcg"}, "relevance='dcg' is not one of score, win_share, rank, users, none"),
    ],
)
def test_lists_refuse_options_that_do_not_go_together(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        Lists(**options)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        ("mean", [False, True, False]),
        (0.5, [False, True, True]),
        (0.75, [False, True, False]),
        ("best", [False, True, False]),
        ("all", [True] * 3),
    ],
)
def test_candidates_above_the_threshold_are_desirable(threshold: Any, expected: list[bool]):
    samples = Labelled(threshold=threshold)([group([0.0, 3.0, 0.75])], seed=0)
    assert [s.candidates for s in samples] == [(0,), (1,), (2,)]
    assert [s.fields["desirable"].item() for s in samples] == expected


@pytest.mark.parametrize("threshold", ["mean", "best"])
def test_groups_of_equal_scores_label_nobody(threshold: Any):
    groups = [group([0.1, 0.1, 0.1]), group([0.0, 1.0])]
    samples = Labelled(threshold=threshold)(groups, seed=0)
    assert [s.group for s in samples] == [1, 1]
    assert left_out(groups, samples) == 1


def test_only_the_desirable_may_be_kept():
    samples = Labelled(threshold="best", keep="desirable")([group([0.0, 3.0, 0.75])], seed=0)
    assert [s.candidates for s in samples] == [(1,)]


def test_the_drawn_baseline_is_the_mean_k1_of_the_policys_own_candidates_over_the_round():
    groups = [
        group([0.0, 1.0], logp=[[-1.0], [-2.0]], ref=[[-1.4], [-2.2]]),
        group([0.0, 1.0], logp=[[-1.0], [-9.0]], ref=[[-1.3], [0.0]], origin=("policy", "reference")),
    ]
    samples = Labelled(baseline="drawn")(groups, seed=0)
    assert [s.fields["baseline"].item() for s in samples] == pytest.approx([0.3] * 4)
    assert Labelled(baseline="drawn").needs == {"score|preference", "logp", "ref"}
    closer = [group([0.0, 1.0], logp=[[-1.0], [-2.0]], ref=[[-0.5], [-2.0]])]
    assert Labelled(baseline="drawn")(closer, seed=0)[0].fields["baseline"].item() == 0


@pytest.mark.parametrize("threshold", ["median", float("nan"), True])
def test_a_threshold_that_is_neither_a_number_nor_known_is_refused(threshold: Any):
    with pytest.raises(ValueError, match="is not a number nor one of mean, best, all"):
        Labelled(threshold=threshold)


def test_a_direction_weighs_the_aspects_as_in_directional_preference_alignment():
    of = group({"users": [[80.0, 50.0], [90.0, 70.0], [40.0, 20.0]]})
    shape = Conditioned(direction=[0.8, -0.6])
    assert shape.liking(of).tolist() == pytest.approx([34.0, 30.0, 20.0])
    (sample,) = shape([of], seed=0)
    assert (sample.kind, sample.candidates, sample.fields["desirable"].item()) == ("labelled", (0,), True)
    (pair,) = Conditioned(direction=[0.8, -0.6], which="best_worst")([of], seed=0)
    assert (pair.kind, pair.candidates) == ("pair", (0, 2))
    assert Conditioned(which="best_worst").makes is PairLogLik


def test_each_context_may_bring_its_own_direction():
    users = {"users": [[1.0, 0.0], [0.0, 1.0]]}
    groups = [group(users, context=Asked({"direction": v})) for v in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])]
    samples = Conditioned()(groups, seed=0)
    assert [(s.group, s.candidates) for s in samples] == [(0, (0,)), (1, (1,))]
    assert left_out(groups, samples) == 1


def test_a_missing_or_unfitting_direction_is_named():
    of = group({"users": [[1.0, 0.0], [0.0, 1.0]]})
    with pytest.raises(ValueError, match="group g: preference_conditioned needs a direction"):
        Conditioned()([of], seed=0)
    with pytest.raises(ValueError, match="group g: the direction has 3 numbers for 2 users"):
        Conditioned(direction=[1.0, 0.0, 0.0])([of], seed=0)
