"""Preference games: equilibria against what is known of them, and what self-play does."""

import pytest
import torch
from tabular_cases import D, bandit, like, policy, same

from triptych.modalities.tabular import exact, games
from triptych.modalities.tabular.policy import TabularPolicy

SKEWED = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=D)


def test_nash_of_rock_paper_scissors_with_different_stakes():
    """A beats B .8, B beats C .7, C beats A .9: each is played as often as the other two are decided."""
    found = games.nash(games.cyclic_game())
    # Margins .3, .2, .4 of A-B, B-C, C-A: A : B : C = .2 : .4 : .3.
    assert found.tolist() == pytest.approx([2 / 9, 4 / 9, 3 / 9, 0.0])
    assert games.exploitability(games.cyclic_game(), found).item() == pytest.approx(0, abs=1e-12)


def test_nash_of_a_bradley_terry_game_is_its_best_action():
    game = games.bradley_terry_game(torch.tensor([0.1, 0.9, 0.3]))
    assert games.nash(game).tolist() == [0.0, 1.0, 0.0]
    # The worst action loses to the best one with sigmoid(.8).
    worst = torch.tensor([1.0, 0.0, 0.0])
    assert games.exploitability(game, worst).item() == pytest.approx(0.689974 - 0.5, abs=1e-6)
    assert games.win_rate(game, worst, torch.tensor([0.0, 1.0, 0.0])).item() == pytest.approx(
        1 - 0.689974, abs=1e-6
    )


def test_nash_of_random_games_cannot_be_exploited():
    for seed in range(10):
        beats = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=D)
        game = (beats + 1 - beats.T) / 2
        found = games.nash(game)
        assert found.sum().item() == pytest.approx(1)
        assert games.exploitability(game, found).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("game", "message"),
    [
        (torch.full((2, 3), 0.5), "square matrix"),
        (torch.full((2, 2), 0.6), "P\\[i, j\\] \\+ P\\[j, i\\] = 1"),
        (torch.tensor([[0.5, 1.5], [-0.5, 0.5]]), "in \\[0, 1\\]"),
        (torch.full((13, 13), 0.5), "13 actions; supports are tried one by one up to 12"),
    ],
)
def test_what_is_no_game_is_refused(game, message):
    with pytest.raises(ValueError, match=message):
        games.nash(game)


def test_in_a_cycle_the_last_policy_of_self_play_goes_round_and_the_average_comes_to_nash():
    game = games.cyclic_game()
    for eta, last_at_least in ((0.1, 0.03), (1.0, 0.2)):
        last, average = games.multiplicative_weights(game, SKEWED, eta=eta, num_steps=4000)
        assert games.exploitability(game, average).item() < 0.005
        assert games.exploitability(game, last).item() > last_at_least


def test_one_step_of_multiplicative_weights_by_hand():
    """(.5, .5) against P(A > B) = .9: P pi = (.7, .3), so log-odds eta * .4."""
    game = torch.tensor([[0.5, 0.9], [0.1, 0.5]])
    last, average = games.multiplicative_weights(game, torch.tensor([0.5, 0.5]), eta=2.0, num_steps=1)
    assert last.tolist() == pytest.approx([0.689974, 0.310026], abs=1e-6)
    same(last, average)


@pytest.mark.parametrize("coefficient", [0.0, 0.125])
def test_the_regularised_game_has_its_fixed_point_and_is_exploited_less_as_tau_falls(coefficient):
    game = games.cyclic_game()
    left: list[float] = []
    for tau in (1.0, 0.3, 0.1):
        rest = games.regularised_nash(game, SKEWED, tau=tau, coefficient=coefficient)
        assert games.residual(game, rest, SKEWED, tau=tau, coefficient=coefficient).item() < 1e-11
        rival = games.blend(rest, SKEWED, coefficient)
        unnormalised = SKEWED * ((game @ rival) / tau).exp()
        same(rest, unnormalised / unnormalised.sum(), atol=1e-9)
        left.append(games.exploitability(game, rest).item())
    assert left == sorted(left, reverse=True)
    assert games.residual(game, SKEWED, SKEWED, tau=0.1).item() > 0.01


def test_a_fixed_point_that_is_not_reached_says_so():
    with pytest.raises(ValueError, match=r"no fixed point to 1e-12 in 3 steps at tau=0\.1"):
        games.regularised_nash(games.cyclic_game(), SKEWED, tau=0.1, num_steps=3)


def test_the_optimum_of_rlhf_by_hand():
    """ref (.5, .5), R = (1, 0), beta = 1: pi* = sigmoid(1), value log((e + 1) / 2)."""
    ref, reward = torch.tensor([0.5, 0.5], dtype=D).log(), torch.tensor([1.0, 0.0], dtype=D)
    assert exact.optimum(reward, ref, beta=1.0).exp()[0].item() == pytest.approx(0.731059, abs=1e-6)
    assert exact.optimal_value(reward, ref, beta=1.0).item() == pytest.approx(0.620115, abs=1e-6)
    best = TabularPolicy(exact.optimum(reward, ref, beta=1.0).view(1, 1, 2))
    found = exact.regularised_reward(best, reward, ref, beta=1.0)
    assert found.item() == pytest.approx(0.620115, abs=1e-6)


def test_no_policy_is_better_than_the_optimum():
    p, beta = bandit(), 0.4
    ref = like(p, seed=1).distribution().detach()
    reward = torch.tensor([0.2, -0.3, 1.0, 0.4], dtype=D)
    best = exact.optimal_value(reward, ref, beta=beta)
    values = [exact.regularised_reward(bandit(seed=s), reward, ref, beta=beta) for s in range(20)]
    assert max(values) < best


def test_soft_values_of_a_tree_are_those_of_whole_candidates():
    """The root's value is beta log sum ref exp(R / beta), and the steps multiply to the optimum."""
    p = policy()
    other = like(p, seed=1)
    reward = exact.rewards(p, dict(zip(p.all_candidates(), [0.3, -1, 0.7, 1.4, 0.1, -0.4, 0.9], strict=True)))
    ref = other.distribution().detach()
    values, logps = exact.soft_values(p, reward, other.conditionals()[0].detach(), beta=0.3)
    assert values[0].item() == pytest.approx(exact.optimal_value(reward, ref, beta=0.3).item())
    best = TabularPolicy(logps.unsqueeze(0), length=2, stop=2)
    same(best.distribution(), exact.optimum(reward, ref, beta=0.3))


def test_visits_of_nodes_are_the_chances_of_their_prefixes():
    p = policy()
    found = exact.visit_chances(p)
    first = p.conditionals()[0, 0].exp()
    same(found, torch.stack([torch.ones((), dtype=D), first[0], first[1], torch.zeros((), dtype=D)]))


def test_visits_multiply_along_the_way():
    """Three steps of 1/4 or 3/4 each: the node after (1, 1) is met with 9/16, that after (0, 1) with 3/16."""
    p = TabularPolicy(torch.tensor([0.25, 0.75], dtype=D).log().expand(1, 7, 2), length=3)
    assert (exact.visit_chances(p) * 16).tolist() == pytest.approx([16, 4, 12, 1, 3, 3, 9])


def test_rewards_must_be_of_every_candidate():
    with pytest.raises(ValueError, match="2 rewards for 7 candidates"):
        exact.rewards(policy(), [1.0, 2.0])
