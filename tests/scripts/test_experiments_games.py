"""The experiments on games and bandits: what they measure is right, and small runs already show it."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from triptych.modalities.tabular import games
from triptych.objectives import build
from triptych.scripts.experiments import (
    arms,
    coverage_hypo,
    cyclic_game,
    exploration_vpo,
    on_policy_labels,
    online_ipo,
    small_identities,
)

MODULES = (cyclic_game, online_ipo, coverage_hypo, exploration_vpo, on_policy_labels, small_identities)


@pytest.fixture(scope="module")
def outcomes():
    """Every experiment once, in its small size."""
    return {module.NAME: module.run(seeds=4, quick=True) for module in MODULES}


def holds(outcome):
    return [(claim.method, claim.holds) for claim in outcome.claims]


def test_small_runs_of_the_games_already_show_the_claims(outcomes):
    assert holds(outcomes["cyclic_game"])[2] == ("DNO", True)
    found = outcomes["online_ipo"].claims
    assert [c.method for c in found] == ["Online IPO", "IPO-MD", "Nash-MD"]
    assert all(c.holds is not False for c in found)


def test_small_runs_of_the_exact_checks_already_show_the_claims(outcomes):
    found = dict(holds(outcomes["small_identities"])[2:])
    assert found == {"P3O": True, "GRPO": True}
    assert outcomes["coverage_hypo"].claims[0].holds is not False


def test_every_outcome_draws_and_every_claim_names_a_paper_and_its_command(outcomes):
    for name, outcome in outcomes.items():
        figure = Figure(figsize=outcome.size)
        outcome.figure(figure)
        assert all(ax.get_title(loc="left") or ax.get_title() for ax in figure.axes)
        for claim in outcome.claims:
            assert "arXiv" in claim.paper
            assert claim.command == f"python -m triptych.scripts.experiments.{name}"
            assert any(character.isdigit() for character in claim.result)


def test_the_same_seeds_give_the_same_numbers(outcomes):
    again = on_policy_labels.run(seeds=4, quick=True)
    assert [c.result for c in again.claims] == [c.result for c in outcomes["on_policy_labels"].claims]


def test_every_game_is_one_and_the_first_is_the_fixed_one():
    found = cyclic_game.games(5)
    for game in found:
        games.check_game(game)
    assert torch.equal(found[0], games.cyclic_game())
    assert bool((found[1:, [0, 1, 2], [1, 2, 0]] > 0.5).all())


def test_exploitability_of_many_games_is_that_of_each():
    found = cyclic_game.games(3)
    probs = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs /= probs.sum(-1, keepdim=True)
    each = torch.stack([games.exploitability(p, q) for p, q in zip(found, probs, strict=True)])
    assert torch.allclose(arms.exploitability(found, probs), each)


def test_spo_by_natural_gradient_is_multiplicative_weights():
    game = games.cyclic_game()
    visited = cyclic_game.spo(game.unsqueeze(0), eta=0.5, num_steps=6)
    last, _ = games.multiplicative_weights(game, torch.full((4,), 0.25), eta=0.5, num_steps=5)
    assert torch.allclose(visited[-1, 0], last, atol=1e-12)


def test_an_sppo_iteration_ends_at_the_optimum_of_its_loss():
    game = games.cyclic_game().unsqueeze(0)
    visited = cyclic_game.sppo(game, eta=1.0, num_steps=2)
    old, policy = visited[0].log(), arms.policy_of(visited[1].log())
    share, (first, second) = arms.wins(game, visited[0]), arms.ordered_pairs(4)
    won = {"win_chosen": share[:, first], "win_rejected": share[:, second]}
    pairs = arms.pairs_of(arms.logp_of(policy), old, first, second, **won)
    weight = visited[0][:, first] * visited[0][:, second]
    loss = arms.expected(build("sppo", beta=1.0), pairs, weight)
    (gradient,) = torch.autograd.grad(loss, [policy.logits])
    assert gradient.abs().max() < 1e-3
    assert visited[1].sub(visited[0]).abs().max() > 0.01


@pytest.mark.parametrize("mixture", [0.0, 0.125])
def test_ipo_rests_where_the_game_says_and_nash_md_at_the_same_place(mixture):
    game, ref = games.cyclic_game(), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rest = games.regularised_nash(game, ref, tau=0.3, coefficient=mixture)
    aim = arms.exploitability(game.unsqueeze(0), rest.unsqueeze(0))
    for method in (online_ipo.ipo, online_ipo.nash_md):
        path = method(game.unsqueeze(0), ref.log().unsqueeze(0), tau=0.3, mixture=mixture)
        assert path.residual.item() < 1e-8
        assert path.exploited[-1].item() == pytest.approx(aim.item(), abs=1e-8)


def test_the_residual_sees_a_policy_that_is_not_at_rest():
    game, ref = games.cyclic_game().unsqueeze(0), torch.full((1, 4), -math.log(4), dtype=torch.float64)
    # Uniform: log-ratio 0, win rates (.5, .5, .575, .425), so the gap at tau .1 is (0, 0, -.75, .75).
    assert online_ipo.residual(game, ref, ref, tau=0.1, mixture=0.0).item() == pytest.approx(0.75)


def test_features_of_separate_contexts_do_not_touch_each_other():
    features = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy = arms.TabularPolicy(torch.zeros(3, 1, 4).double(), features=arms.separate(features))
    assert policy.theta is not None
    arms.logp_of(policy)[1, 2].backward()
    gradient = policy.theta.grad.view(3, 2)
    assert gradient[[0, 2]].abs().max() == 0
    assert torch.allclose(gradient[1], features[1, 2] - features[1].mean(0))


def test_a_natural_step_undoes_the_fisher_matrix():
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64)
    policy, advantage = arms.policy_of(logits), torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    logp = arms.logp_of(policy)
    loss = -(logp.detach().exp() * advantage * logp).sum()
    arms.natural_step(policy, loss, 0.1)
    moved = policy.logits.detach().view(1, 3) - logits
    aim = 0.1 * advantage
    assert torch.allclose(moved - moved.mean(), aim - aim.mean())


def test_expected_gradients_of_a_group_of_two_by_hand():
    found = small_identities.expected_gradients(torch.tensor([0.25], dtype=torch.float64), 2)
    # One of two right has chance 3/8 and credit +-1/2 (centred): mean of A (1[right] - p) is 1/4.
    assert found["Dr. GRPO"].item() == pytest.approx(0.375 * 0.25)
    assert found["RLOO"].item() == pytest.approx(0.25 * 0.75)
    # z-score: +-1/2 over a deviation of 1/sqrt(2), plus 1e-4.
    assert found["GRPO"].item() == pytest.approx(0.375 * 0.25 / (math.sqrt(0.5) + 1e-4))


def test_labels_follow_bradley_terry():
    reward = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    a, b = torch.zeros(1, 4000, dtype=torch.int64), torch.ones(1, 4000, dtype=torch.int64)
    chosen, rejected = on_policy_labels.labelled(reward, a, b, torch.Generator().manual_seed(0))
    assert bool((chosen + rejected == 1).all())
    # P(arm 1 preferred) = 3/4; three standard errors are 0.02.
    assert chosen.double().mean().item() == pytest.approx(0.75, abs=0.021)


def test_optimism_lowers_what_the_reference_likes():
    logits = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    policy, ref = arms.policy_of(logits), logits.log_softmax(-1)
    pair = exploration_vpo.calibrated(arms.logp_of(policy), ref, torch.tensor([1]), torch.tensor([2]))
    objective = build("vpo", beta=0.5, alpha=1.0, regime="online")
    plain = build("vpo", beta=0.5, alpha=0.0, regime="online")
    (objective(pair) - plain(pair)).sum().backward()
    # The gradient of alpha beta E_ref[log pi] in the logits is alpha beta (ref - pi): 0 where they agree.
    assert policy.logits.grad.abs().max() < 1e-12
    moved = arms.policy_of(torch.zeros(1, 3))
    pair = exploration_vpo.calibrated(arms.logp_of(moved), ref, torch.tensor([1]), torch.tensor([2]))
    (objective(pair) - plain(pair)).sum().backward()
    assert torch.allclose(moved.logits.grad.view(-1), 0.5 * (ref.exp()[0] - 1 / 3))


def test_hypo_at_weight_zero_is_dpo_and_a_large_weight_keeps_the_policy_home():
    mass, kl = coverage_hypo.hypo(0.0, 2, 600)
    assert mass[-1].min() > 0.95
    assert torch.equal(mass[:, 0], mass[:, 1])
    held, low = coverage_hypo.hypo(0.5, 2, 600)
    assert held[-50:].mean() < 0.06
    assert low[-50:].mean() < 0.05 < kl[-1].min()
