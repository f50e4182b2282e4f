"""Identities between methods as statements about whole populations: exact sums over all that may be drawn."""

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

from triptych.modalities.tabular import exact, games
from triptych.modalities.tabular.policy import TabularPolicy
from triptych.objectives import LogLik, PairLogLik, build
from triptych.objectives.advantages import centred, leave_one_out
from triptych.objectives.kl import k3, kl_penalty

REWARD = torch.tensor([0.3, -1.0, 0.7, 1.4, 0.1, -0.4, 0.9], dtype=D)


def rloo_slope(p: TabularPolicy, advantage_of, size: int) -> torch.Tensor:
    """Population gradient of `rloo`, its mean over the rows of a group."""
    drawn, chance = tuples(p, size)
    x = rows(
        p, drawn.flatten(), advantage=advantage_of(REWARD[drawn]).flatten(), old=terms(p)[0][drawn.flatten()]
    )
    loss = build("rloo", clip=0.2)(x).view(drawn.shape).mean(-1)
    return slope(p, chance, loss)


def test_i1_p3o_on_its_own_samples_is_rloo_with_two_samples():
    """Summed over both samples by the separate form, averaged by the joint one."""
    p = policy()
    drawn, chance = tuples(p, 2)
    x = pairs(p, p.distribution(), drawn, margin=REWARD[drawn[:, 0]] - REWARD[drawn[:, 1]])
    expected = rloo_slope(p, leave_one_out, 2)
    same(slope(p, chance, build("p3o", clip=0.2)(x)), 2 * expected)
    same(slope(p, chance, build("p3o_joint", delta=0.3)(x)), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_i2_leave_one_out_is_the_group_mean_baseline_made_unbiased(size):
    p = policy()
    truth = -exact.gradient(exact.expected(p, REWARD), p)
    same(rloo_slope(p, leave_one_out, size), truth)
    same(rloo_slope(p, centred, size), (size - 1) / size * truth)


def self_play() -> tuple[TabularPolicy, torch.Tensor, torch.Tensor]:
    """A policy over the seven candidates, its reference's log-probs, and a game without a best answer."""
    p = policy()
    beats = torch.sigmoid(normal(7, 7, seed=3))
    return p, like(p, seed=1).distribution().detach(), (beats + 1 - beats.T) / 2


def test_i3_online_ipo_is_four_times_reinforce_on_the_log_ratio_less_the_win_rate():
    """Self-play, not the maximisation of a reward: the win rate is that against the policy itself."""
    p, ref, game = self_play()
    drawn, chance = tuples(p, 2)
    x = pairs(p, ref, drawn, strength=game[drawn[:, 0], drawn[:, 1]])
    found = slope(p, chance, build("ipo", tau=0.1, reduce="sum")(x))
    logp = p.distribution().detach()
    cost = (logp - ref) - (game @ logp.exp() - 0.5) / 0.1
    reinforce = build("reinforce")(rows(p, torch.arange(7), advantage=-cost))
    same(found, 4 * slope(p, logp.exp(), reinforce))
    assert found.abs().max() > 0.1


def test_i4_ipo_on_drawn_labels_is_a_regression_on_the_centred_preference():
    p, ref, game = self_play()
    drawn, chance = tuples(p, 2)
    wins = game[drawn[:, 0], drawn[:, 1]]
    hard, x = build("ipo", tau=0.1, reduce="sum"), pairs(p, ref, drawn)
    labelled = wins * hard(x) + (1 - wins) * hard(x.swapped())
    gap = x.chosen.log_ratio() - x.rejected.log_ratio()
    same(slope(p, chance, labelled), slope(p, chance, (gap - (wins - 0.5) / 0.1).square()))


def test_i5_brain_on_two_samples_of_its_prior_is_dpo_on_soft_labels():
    p, ref, _ = self_play()
    drawn, chance = tuples(p, 2)
    reward, gamma = REWARD[drawn], 0.4
    brain = build("brain", gamma=gamma)(lists(p, ref, drawn, proposal=ref[drawn], reward=reward))
    label = torch.sigmoid((reward[:, 0] - reward[:, 1]) / gamma)
    dpo = build("dpo", beta=1.0)(pairs(p, ref, drawn, strength=label))
    same(slope(p, chance, brain), slope(p, chance, dpo))
    # The losses differ by the entropy of the labels, which the policy does not change.
    same(brain + torch.special.entr(label) + torch.special.entr(1 - label), dpo)


def test_i6_the_gradient_of_brain_is_that_of_its_surrogate():
    """-sum_i (alpha_i - beta_i) s_i with alpha, beta constant, over all triples of a proposal."""
    p, ref, _ = self_play()
    q = like(p, seed=2)
    drawn, chance = tuples(q, 3)
    proposal, gamma = q.distribution().detach()[drawn], 0.4
    brain = build("brain", gamma=gamma)(lists(p, ref, drawn, proposal=proposal, reward=REWARD[drawn]))
    logp = p.distribution()[drawn]
    alpha = (ref[drawn] + REWARD[drawn] / gamma - proposal).softmax(-1)
    beta = (logp - proposal).softmax(-1).detach()
    same(slope(p, chance, brain), slope(p, chance, -((alpha - beta) * logp).sum(-1)))


def two_arms(margin: float) -> tuple[TabularPolicy, torch.Tensor]:
    """A policy whose first arm's log-ratio is above the second's by the margin; a skewed reference."""
    ref = torch.tensor([0.2, 0.8], dtype=D).log()
    return TabularPolicy((ref + torch.tensor([margin, 0.0], dtype=D)).view(1, 1, 2)), ref


@pytest.mark.parametrize(
    "label", [{"smoothing": 0.1}, {"smoothing": 2 / 20}, {"strength": 0.9}], ids=["cream", "mcts", "soft"]
)
def test_i7_soft_labels_of_any_kind_stop_the_policy_at_the_logit_of_the_label(label):
    """CREAM's agreement C = .9, MCTS-DPO's visits 18 and 2, P(w > l) = .9; beta = .1."""
    margin = math.log(0.9 / 0.1) / 0.1
    assert margin == pytest.approx(21.972246, abs=1e-6)
    fields = {name: torch.tensor([value], dtype=D) for name, value in label.items()}
    one = torch.ones(1, dtype=D)
    dpo, drawn = build("dpo", beta=0.1), torch.tensor([[0, 1]])
    for away, sign in ((0.0, 0), (-1.0, -1), (1.0, 1)):
        p, ref = two_arms(margin + away)
        found = slope(p, one, dpo(pairs(p, ref, drawn, **fields)))
        # Descent raises the chosen arm below the optimum and lowers it above.
        assert torch.sign(found.round(decimals=9))[0].item() == sign
    p, ref = two_arms(margin)
    assert slope(p, one, dpo(pairs(p, ref, drawn)))[0] < -1e-3


def test_dpo_on_bradley_terry_labels_is_at_rest_exactly_at_the_optimum_of_rlhf():
    p, ref, _ = self_play()
    beta = 0.5
    best = exact.optimum(REWARD, ref, beta=beta)
    q = from_distribution(p, best)
    drawn, chance = tuples(p, 2)
    label = torch.sigmoid(REWARD[drawn[:, 0]] - REWARD[drawn[:, 1]])
    dpo = build("dpo", beta=beta)
    assert slope(q, chance, dpo(pairs(q, ref, drawn, strength=label))).abs().max() < 1e-12
    assert slope(p, chance, dpo(pairs(p, ref, drawn, strength=label))).abs().max() > 1e-2
    assert exact.gradient(exact.regularised_reward(q, REWARD, ref, beta=beta), q).abs().max() < 1e-12


def from_distribution(p: TabularPolicy, logp: torch.Tensor) -> TabularPolicy:
    """The policy of given log-probs of candidates: each action as likely as the candidates behind it."""
    candidates = p.all_candidates()
    logits = torch.zeros_like(p.logits)
    for prefix, node in (((), 0), ((0,), 1), ((1,), 2)):
        for action in range(3):
            after = [i for i, c in enumerate(candidates) if c[: len(prefix) + 1] == (*prefix, action)]
            logits[0, node, action] = logp[after].logsumexp(0)
    return TabularPolicy(logits, length=p.length, stop=p.stop)


def kl_case() -> tuple[TabularPolicy, LogLik, torch.Tensor, torch.Tensor]:
    p = policy()
    ref = like(p, seed=1).distribution().detach()
    x = one_by_one(p.distribution(), ref)
    reverse = exact.gradient(exact.kl(p, ref), p)
    return p, x, reverse, exact.gradient((ref.exp() * (ref - p.distribution())).sum(), p)


@pytest.mark.parametrize("estimator", ["score", "k2", "k3_ratio"])
def test_i8_what_is_allowed_in_the_loss_has_the_gradient_of_the_reverse_kl(estimator):
    p, x, reverse, _ = kl_case()
    same(exact.gradient(exact.population(p, build("kl", estimator=estimator)(x)), p), reverse)


def test_i8_k1_in_the_loss_does_nothing_and_k3_there_follows_the_forward_kl():
    p, x, reverse, forward = kl_case()
    assert exact.gradient(exact.population(p, x.log_ratio()), p).abs().max() < 1e-14
    found = exact.gradient(exact.population(p, k3(x.log_ratio())), p)
    same(found, forward)
    assert (found - reverse).abs().max() > 0.1


def test_i8_k1_in_the_reward_maximises_the_regularised_reward():
    p, x, *_ = kl_case()
    advantage = REWARD - 0.3 * kl_penalty(x)
    truth = exact.gradient(exact.regularised_reward(p, REWARD, x.reference(), beta=0.3), p)
    same(exact.reinforce_gradient(p, advantage), truth)


def test_i9_each_tokens_own_log_ratio_is_not_the_gradient_of_the_kl_but_its_reward_to_go_is():
    """On answers of different lengths: Nash-MD's KL term as TRL had it, and two right forms."""
    p, x, reverse, _ = kl_case()
    logp, mask = terms(p)
    ratio = torch.where(mask, logp - terms(like(p, seed=1))[0], 0.0).detach()
    own = (ratio * logp).sum(-1)
    to_go = (ratio.flip(-1).cumsum(-1).flip(-1) * logp).sum(-1)
    chance = p.distribution().exp()
    assert (slope(p, chance, own) - reverse).abs().max() > 1e-2
    same(slope(p, chance, to_go), reverse)
    same(slope(p, chance, build("kl", estimator="score")(x)), reverse)


def game_policy(probs: torch.Tensor) -> TabularPolicy:
    return TabularPolicy(probs.log().view(1, 1, -1))


@pytest.mark.parametrize("coefficient", [0.0, 0.125], ids=["online_ipo", "ipo_md"])
def test_online_ipo_rests_at_the_fixed_point_of_the_regularised_game(coefficient):
    """Pairs from pi, or for IPO-MD from its mixture with the reference: pi = ref exp(P mu / tau) / Z."""
    game, ref = games.cyclic_game(), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=D)
    ipo = build("ipo", tau=0.1, reduce="sum")

    def pull(p: TabularPolicy) -> float:
        mixture = game_policy(games.blend(p.distribution().detach().exp(), ref, coefficient))
        drawn, chance = tuples(mixture, 2)
        x: PairLogLik = pairs(p, ref.log(), drawn, strength=game[drawn[:, 0], drawn[:, 1]])
        return slope(p, chance, ipo(x)).abs().max().item()

    rest = games.regularised_nash(game, ref, tau=0.1, coefficient=coefficient)
    assert pull(game_policy(rest)) < 1e-9
    assert pull(game_policy(ref)) > 0.1
    other = games.regularised_nash(game, ref, tau=0.1, coefficient=0.125 - coefficient)
    assert pull(game_policy(other)) > 1e-3


def test_oreo_rests_at_the_soft_optimum_of_the_tree_from_unpaired_trajectories():
    """Any weights of the trajectories: each one's residuals are 0 by themselves."""
    start = policy(critic=True)
    table = like(start, seed=1).conditionals()[0].detach()
    values, logps = exact.soft_values(start, REWARD, table, beta=0.3)
    best = TabularPolicy(logps.unsqueeze(0), length=2, stop=2, critic=True)
    assert best.critic is not None
    with torch.no_grad():
        best.critic.copy_(values.unsqueeze(0))
    for p, most in ((best, 1e-12), (start, None)):
        ref = terms(like(start, seed=1))[0]
        x = rows(p, torch.arange(7), ref=ref, value=readout(p, "value"), target=REWARD)
        for name in ("oreo_value", "oreo_policy"):
            size = slope(p, torch.full((7,), 1 / 7, dtype=D), build(name, beta=0.3)(x)).abs().max().item()
            assert size < most if most else size > 1e-2


def test_brain_on_everything_has_the_gradient_of_the_kl_from_the_posterior():
    """Under a uniform proposal they are no estimate: the posterior is ref exp(R / gamma) / Z."""
    p = bandit(arms=7)
    ref, gamma = normal(7, seed=5).log_softmax(-1), 0.4
    uniform = torch.full((1, 7), -math.log(7), dtype=D)
    x = lists(p, ref, torch.arange(7).unsqueeze(0), proposal=uniform, reward=REWARD.unsqueeze(0))
    loss = build("brain", gamma=gamma)(x)
    posterior = exact.optimum(REWARD, ref, beta=gamma)
    truth = (posterior.exp() * (posterior - p.distribution())).sum()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-12)
    same(slope(p, torch.ones(1, dtype=D), loss), exact.gradient(truth, p))
