"""Every on-policy objective: its gradient, summed over all that may be drawn, is that of what it claims.

Seven candidates of one or two units; groups of K = 2, all 49 of them with their chances, at drawing (ratios
of 1). Loss gradients are minus those of what is maximised.
"""

import math

import pytest
import torch
from tabular_cases import (
    D,
    bandit,
    like,
    lists,
    normal,
    one_by_one,
    pairs,
    policy,
    readout,
    rows,
    same,
    slope,
    terms,
    tuples,
)
from torch import Tensor

from triptych.modalities.tabular import exact, games
from triptych.modalities.tabular.policy import TabularPolicy, num_nodes_of
from triptych.objectives import build, names, spec
from triptych.objectives.advantages import centred, leave_one_out, z_score
from triptych.objectives.kl import exact_entropy, exact_kl

REWARD = torch.tensor([0.3, -1.0, 0.7, 1.4, 0.1, -0.4, 0.9], dtype=D)
# -grad E[R]: a sum over units, or the log-prob of the whole sample.
WHOLE = {"reinforce": {}, "rloo": {"clip": 0.2}, "dr_grpo": {"clip": 0.2}, "luspo": {"clip": 0.2}}
# -grad E[(R - b) / |y|], b = E[R] constant: a mean over the row's units.
PER_LENGTH = {
    "grpo": {"clip": 0.2},
    "gspo": {"clip": 0.2},
    "gmpo": {"clip": 0.4},
    "sapo": {},
    "ecpo": {"clip": 0.2},
    "ddpo": {"clip": 0.2},
}
# -grad E[R] / n, n the round's mean number of units: a sum over the batch's units divided by their number.
BATCH_MEAN = {
    "ppo": {"clip": 0.2},
    "dapo": {"clip": 0.2, "clip_high": 0.28},
    "cispo": {"clip_high": 0.28},
    "vespo": {},
}
TESTED_ALONE = {"gbpo", "a2po", "kl", "kl_leave_one_out", "entropy", "p3o", "p3o_joint", "brain"}
# The reason why no expectation over the policy's own samples is claimed.
NOT_AN_EXPECTATION = {
    "spo_step": "a preference loss on siblings, `dpo` with clipped ratios: they must come from the policy"
}


def test_every_on_policy_objective_is_tested_here_or_has_a_reason_not_to_be():
    on_policy = {n for n in names() if spec(n).on_policy}
    tested = WHOLE.keys() | PER_LENGTH.keys() | BATCH_MEAN.keys() | TESTED_ALONE
    assert on_policy == tested | NOT_AN_EXPECTATION.keys()
    assert not tested & NOT_AN_EXPECTATION.keys()


def group_slope(
    p: TabularPolicy, name: str, options: dict, credit=leave_one_out, num_units=None, size=2
) -> Tensor:
    """Population gradient of the objective, mean over the rows of a group, with the credit of its rewards."""
    drawn, chance = tuples(p, size)
    flat = drawn.flatten()
    fields = {"advantage": credit(REWARD[drawn]).flatten(), "old": terms(p)[0][flat]}
    if num_units is not None:
        fields["num_units"] = torch.full((len(flat),), num_units, dtype=D)
    if "old" not in spec(name).uses:
        del fields["old"]
    loss = build(name, **options)(rows(p, flat, **fields))
    return slope(p, chance, loss.view(drawn.shape).mean(-1))


def lengths(p: TabularPolicy) -> Tensor:
    return terms(p)[1].sum(-1).to(D)


def true_slope(p: TabularPolicy, reward: Tensor = REWARD) -> Tensor:
    return -exact.gradient(exact.expected(p, reward), p)


@pytest.mark.parametrize("name", WHOLE)
def test_sums_over_units_have_the_gradient_of_the_expected_reward(name):
    p = policy()
    same(group_slope(p, name, WHOLE[name]), true_slope(p))
    same(group_slope(p, name, WHOLE[name], centred), true_slope(p) / 2)


@pytest.mark.parametrize("name", PER_LENGTH)
def test_means_over_units_weigh_the_centred_reward_by_one_over_the_length(name):
    p = policy()
    baseline = exact.expected(p, REWARD).detach()
    found = group_slope(p, name, PER_LENGTH[name])
    same(found, true_slope(p, (REWARD - baseline) / lengths(p)))
    assert (found - true_slope(p)).abs().max() > 1e-2


@pytest.mark.parametrize("name", BATCH_MEAN)
def test_means_over_the_batch_have_the_gradient_of_the_expected_reward_over_the_number_of_units(name):
    p = policy()
    mean = exact.expected(p, lengths(p)).item()
    same(group_slope(p, name, BATCH_MEAN[name], num_units=mean), true_slope(p) / mean)


def test_gbpo_is_the_per_length_gradient_where_rewards_are_positive_and_bounded_where_they_are_not():
    p = policy()
    positive = REWARD + 1.5
    found = group_slope(p, "gbpo", {}, lambda _: positive[tuples(p, 2)[0]])
    same(found, true_slope(p, positive / lengths(p)))
    logp, mask = terms(p)
    bound = torch.maximum(logp.exp(), 1 - logp.exp()).detach()
    weight = torch.where(mask, logp.exp().detach() / bound, 0.0)
    negative = REWARD - 1.5
    truth = -((weight * logp).sum(-1) / lengths(p) * negative)
    same(
        group_slope(p, "gbpo", {}, lambda _: negative[tuples(p, 2)[0]]),
        slope(p, p.distribution().exp(), truth),
    )


def bernoulli(chance: float, size: int) -> tuple[TabularPolicy, Tensor, Tensor, Tensor]:
    """A context that succeeds with a chance: policy, all groups of outcomes, their chances and rewards."""
    p = TabularPolicy(torch.tensor([chance, 1 - chance], dtype=D).log().view(1, 1, 2))
    drawn, weight = tuples(p, size)
    return p, drawn, weight, (drawn == 0).to(D)


def pull(chance: float, credit, size: int = 6) -> float:
    """Gradient of `grpo` in the logit of success over that of the chance of success itself."""
    p, drawn, weight, reward = bernoulli(chance, size)
    flat = drawn.flatten()
    x = rows(p, flat, advantage=credit(reward).flatten(), old=terms(p)[0][flat])
    loss = build("grpo", clip=0.2)(x).view(drawn.shape).mean(-1)
    return (slope(p, weight, loss)[0] / -exact.gradient(p.distribution().exp()[0], p)[0]).item()


def test_group_deviations_weigh_contexts_by_their_difficulty():
    """Without them every context counts the same; with them those where nearly all agree count most."""
    assert pull(0.05, leave_one_out) == pytest.approx(1.0)
    assert pull(0.5, leave_one_out) == pytest.approx(1.0)
    assert pull(0.05, z_score) > 1.2 * pull(0.5, z_score)
    assert pull(0.05, z_score) == pytest.approx(pull(0.95, z_score))


def test_the_weight_of_a_group_is_one_over_its_deviation():
    """sum over groups of chance / (std + 1e-4) * (R_i - mean) grad s_i / K, written out."""
    p, drawn, weight, reward = bernoulli(0.2, 4)
    away = reward - reward.mean(-1, keepdim=True)
    deviation = reward.std(-1) + 1e-4
    truth = -(away * p.distribution()[drawn]).mean(-1) / deviation
    flat = drawn.flatten()
    x = rows(p, flat, advantage=z_score(reward).flatten(), old=terms(p)[0][flat])
    loss = build("grpo", clip=0.2)(x).view(drawn.shape).mean(-1)
    same(slope(p, weight, loss), slope(p, weight, truth))


def test_a2po_is_the_gradient_of_the_regularised_reward_whatever_the_optimal_value():
    """-2 beta grad (E[R] - beta KL); V* is only a baseline."""
    p = policy()
    other, beta = like(p, seed=1), 0.5
    ref = other.distribution().detach()
    truth = -2 * beta * exact.gradient(exact.regularised_reward(p, REWARD, ref, beta=beta), p)
    for value in (exact.optimal_value(REWARD, ref, beta=beta), torch.tensor(0.0)):
        x = rows(p, torch.arange(7), advantage=REWARD - value, ref=terms(other)[0])
        same(slope(p, p.distribution().exp(), build("a2po", beta=beta)(x)), truth)


def test_pairs_of_p3o_have_the_gradient_of_the_expected_reward():
    """Twice it in the separate form, which sums over the pair; a shift of both rewards changes nothing."""
    p = policy()
    drawn, chance = tuples(p, 2)
    reward = REWARD[drawn] + normal(49, seed=4).unsqueeze(-1)
    x = pairs(p, p.distribution(), drawn, margin=reward[:, 0] - reward[:, 1])
    same(slope(p, chance, build("p3o", clip=0.2)(x)), 2 * true_slope(p))
    same(slope(p, chance, build("p3o_joint", delta=0.3)(x)), true_slope(p))


def test_brain_has_the_gradient_of_the_kl_to_the_posterior_in_each_set_that_was_drawn():
    """Self-normalised: in expectation over triples of a proposal it is not the KL over all candidates."""
    p, q, gamma = policy(), like(policy(), seed=2), 0.4
    ref = like(p, seed=1).distribution().detach()
    drawn, chance = tuples(q, 3)
    proposal = q.distribution().detach()
    x = lists(p, ref, drawn, proposal=proposal[drawn], reward=REWARD[drawn])
    found = slope(p, chance, build("brain", gamma=gamma)(x))
    posterior = (ref + REWARD / gamma - proposal)[drawn].log_softmax(-1)
    among = (p.distribution() - proposal)[drawn].log_softmax(-1)
    same(found, slope(p, chance, (posterior.exp() * (posterior - among)).sum(-1)))
    best = exact.optimum(REWARD, ref, beta=gamma)
    whole = exact.gradient((best.exp() * (best - p.distribution())).sum(), p)
    assert (found - whole).abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ["score", "k2", "k3_ratio"])
def test_kl_of_candidates_and_of_units(estimator):
    """Of whole candidates the KL; of units the mean of their conditionals' KL where they are met."""
    p = policy()
    ref = like(p, seed=1).distribution().detach()
    kl = build("kl", estimator=estimator)
    found = slope(p, p.distribution().exp(), kl(one_by_one(p.distribution(), ref)))
    same(found, exact.gradient(exact.kl(p, ref), p))
    fixed = policy(stop=None)
    other = like(fixed, seed=1)
    x = rows(fixed, torch.arange(9), ref=terms(other)[0], old=terms(fixed)[0])
    met = exact.visit_chances(fixed).detach()
    truth = (met * exact_kl(fixed.conditionals()[0], other.conditionals()[0])).sum() / 2
    same(slope(fixed, fixed.distribution().exp(), kl(x)), exact.gradient(truth, fixed))


def test_the_leave_one_out_kl_has_the_gradient_of_the_kl():
    p = policy()
    ref = like(p, seed=1).distribution().detach()
    drawn, chance = tuples(p, 2)
    found = slope(p, chance, build("kl_leave_one_out")(lists(p, ref, drawn)))
    same(found, exact.gradient(exact.kl(p, ref), p))


def test_the_entropy_bonus_has_the_gradient_of_the_conditionals_entropy_where_they_are_met():
    """For one action that is the policy's entropy; for more it leaves out where the policy goes."""
    p = bandit()
    x = rows(p, torch.arange(4), entropy=readout(p, "entropy"))
    found = slope(p, p.distribution().exp(), build("entropy")(x))
    same(found, -exact.gradient(exact.entropy(p), p))
    p = policy(stop=None)
    x = rows(p, torch.arange(9), entropy=readout(p, "entropy"))
    found = slope(p, p.distribution().exp(), build("entropy")(x))
    met = exact.visit_chances(p).detach()
    same(found, -exact.gradient((met * exact_entropy(p.conditionals()[0])).sum() / 2, p))
    assert (found + exact.gradient(exact.entropy(p), p) / 2).abs().max() > 1e-3


def test_nash_md_climbs_the_win_rate_against_the_mixture_less_the_kl():
    """reinforce with A = P(y > y') - 1/2 - tau sg(log-ratio), y ~ pi, y' ~ pi^(1 - b) ref^b."""
    p, tau = bandit(), 0.1
    game, ref = games.cyclic_game(), normal(4, seed=6).log_softmax(-1)
    probs = p.distribution().detach().exp()
    mixture = games.blend(probs, ref.exp(), 0.125)
    drawn = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    chance = probs[drawn[:, 0]] * mixture[drawn[:, 1]]
    advantage = game[drawn[:, 0], drawn[:, 1]] - 0.5 - tau * (probs.log() - ref)[drawn[:, 0]]
    loss = build("reinforce")(rows(p, drawn[:, 0], advantage=advantage))
    truth = exact.expected(p, game @ mixture) - tau * exact.kl(p, ref)
    same(slope(p, chance, loss), -exact.gradient(truth, p))


def test_a_spread_minimax_reward_is_the_win_share_less_a_half():
    """SPO: win shares among K samples have the gradient of the win rate against the policy itself."""
    p, game = bandit(), games.cyclic_game()
    drawn, chance = tuples(p, 3)
    wins = game[drawn.unsqueeze(-1), drawn.unsqueeze(-2)]
    share = (wins.sum(-1) - 0.5) / 2
    x = rows(p, drawn.flatten(), advantage=share.flatten() - 0.5)
    loss = build("reinforce")(x).view(drawn.shape).mean(-1)
    against_itself = (game @ p.distribution().exp()).detach()
    same(slope(p, chance, loss), true_slope(p, against_itself))


def test_the_exact_policy_gradient_of_a_bandit_is_the_one_worked_by_hand():
    """grad_k E[R] = pi_k (R_k - E[R]): pi = (.5, .3, .2), R = (1, 0, 2), E = .9 give (.05, -.27, .22)."""
    p = TabularPolicy(torch.tensor([0.5, 0.3, 0.2], dtype=D).log().view(1, num_nodes_of(3, 1), 3))
    reward = torch.tensor([1.0, 0.0, 2.0], dtype=D)
    assert exact.expected(p, reward).item() == pytest.approx(0.9)
    for found in (exact.gradient(exact.expected(p, reward), p), exact.reinforce_gradient(p, reward)):
        assert found.tolist() == pytest.approx([0.05, -0.27, 0.22])
    uniform = torch.full((3,), -math.log(3), dtype=D)
    by_hand = [q * (math.log(3 * q) - exact.kl(p, uniform).item()) for q in (0.5, 0.3, 0.2)]
    assert exact.gradient(exact.kl(p, uniform), p).tolist() == pytest.approx(by_hand)
