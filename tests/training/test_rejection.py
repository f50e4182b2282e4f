"""Statistical rejection sampling: what is accepted, and who meets whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judged import group

from triptych.training.rejection import Accept, acceptance, accepted


def test_rejection_sampling_accepts_with_the_golden_probabilities():
    assert acceptance(torch.tensor([1.0, 0.5, 0.0]), 0.5).tolist() == pytest.approx(
        [1, 0.367879, 0.135335], abs=1e-6
    )


def test_accepted_candidates_are_each_taken_once_and_no_more_than_there_are():
    generator = torch.Generator().manual_seed(0)
    assert sorted(accepted(torch.tensor([1.0, 1.0, 1.0]), 0.5, 8, generator)) == [0, 1, 2]
    assert len(accepted(torch.zeros(20), 0.5, 8, generator)) == 8


def test_cold_rejection_sampling_is_best_of_n_and_hot_is_plain_sampling():
    score = torch.arange(10).float()
    generator = torch.Generator().manual_seed(0)
    assert accepted(score, 1e-6, 3, generator) == [9, 8, 7]
    first = torch.tensor([accepted(score, 1e6, 1, generator)[0] for _ in range(600)])
    assert first.float().mean().item() == pytest.approx(4.5, abs=0.4)


def test_the_first_accepted_follows_the_optimal_policy_where_candidates_are_told_apart_by_index():
    proposal = torch.tensor([0.55, 0.2, 0.1, 0.08, 0.05, 0.02])
    reward = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.8, 0.6])
    optimal = (proposal.log() + reward / 0.5).softmax(0)
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(6)
    for _ in range(1500):
        drawn = torch.multinomial(proposal, 64, replacement=True, generator=generator)
        found[drawn[accepted(reward[drawn], 0.5, 1, generator)[0]]] += 1
    distance = 0.5 * (found / 1500 - optimal).abs().sum().item()
    assert 0.5 * (proposal - optimal).abs().sum().item() > 0.3
    assert distance < 0.04


@pytest.mark.parametrize(("rank", "num_pairs"), [("first_round", 4), ("tournament", 7), ("all", 28)])
def test_eight_accepted_candidates_meet_as_often_as_the_ranking_says(rank: Any, num_pairs: int):
    shape = Accept(gamma=0.5, num_samples=8, rank=rank)
    scores = torch.arange(16).float().mul(0.1).tolist()
    samples = shape([group(scores)], seed=3)
    assert len(samples) == num_pairs == shape.most(16)
    assert all(scores[w] > scores[l_] for w, l_ in (s.candidates for s in samples))
    assert samples == shape([group(scores)], seed=3)
    assert [s.candidates for s in samples] != [s.candidates for s in shape([group(scores)], seed=4)]


def test_a_tournament_of_an_odd_number_ends_with_the_best():
    (final,) = [s.candidates for s in Accept(gamma=9.0, rank="tournament")([group([0.0, 2.0, 1.0])], seed=0)][
        -1:
    ]
    assert final[0] == 1


def test_accepted_pairs_of_equal_scores_are_dropped_and_soft_labels_are_strengths():
    shape = Accept(gamma=0.5, rank="all", label="bt")
    samples = shape([group([1.0, 1.0, 0.0])], seed=0)
    assert {s.candidates for s in samples} == {(0, 2), (1, 2)}
    assert samples[0].fields["strength"].item() == pytest.approx(0.731059, abs=1e-6)
    assert (shape.needs, shape.provides) == ({"score"}, {"strength"})


@pytest.mark.parametrize(("gamma", "num"), [(0.0, 8), (0.5, 1)])
def test_a_temperature_of_0_and_a_single_accepted_candidate_are_refused(gamma: float, num: int):
    with pytest.raises(ValueError, match=r"must be (positive|at least 2)"):
        Accept(gamma=gamma, num_samples=num)
