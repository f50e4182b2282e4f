"""The experiments of reasoning, trees, users and steps: what they measure with is right, and they run."""

import importlib
import math

import pytest
import torch

from triptych.objectives import ListLogLik, LogLik
from triptych.scripts.experiments import (
    brain_variance,
    diffusion_steps,
    groupwise_regret,
    oreo_values,
    pit_gap,
    score_credit,
    tree_ordering,
)
from triptych.scripts.experiments.common import save_figure

HOLDS = {
    "brain_variance": (True, True, True),
    "oreo_values": (None, True, True),  # the quick run stops before V has converged
    "score_credit": (None, True, True),
    "groupwise_regret": (True, None, None),  # so few rounds are too few to tell weights from shares
    "tree_ordering": (True, True, True),
    "pit_gap": (None, True, None),
    "diffusion_steps": (True, None, True),
}


@pytest.mark.parametrize("name", HOLDS)
def test_an_experiment_runs_small_and_its_firm_claims_hold(name, tmp_path):
    module = importlib.import_module(f"triptych.scripts.experiments.{name}")
    outcome = module.run(seeds=8, quick=True)
    for claim, expected in zip(outcome.claims, HOLDS[name], strict=True):
        assert claim.command.endswith(f".{name}")
        assert f"python -m triptych.scripts.experiments.{name}" in module.__doc__
        if expected:
            assert claim.holds, f"{claim.statement}: {claim.result}"
    assert save_figure(outcome, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def example_list() -> ListLogLik:
    mean = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    logp, ref, proposal = (brain_variance.normal(x, m) for m in (mean, 0.0, 0.5))
    zero = torch.zeros_like(x)
    return ListLogLik(LogLik(logp, zero + 1, ref), zero, proposal=proposal, reward=zero)


def test_gradient_weights_of_the_three_estimators_are_those_worked_by_hand():
    # At x = 0 and 2, ref / q is e^(1/8) and e^(-7/8), policy / q is e^(-3/8) and e^(5/8).
    ref, policy = (math.exp(1 / 8), math.exp(-7 / 8)), (math.exp(-3 / 8), math.exp(5 / 8))
    expected = {
        "DPG": [-w / 2 for w in ref],
        "GDC++": [-(w - p) / 2 for w, p in zip(ref, policy, strict=True)],
        "BRAIn": [-(w / sum(ref) - p / sum(policy)) for w, p in zip(ref, policy, strict=True)],
    }
    for name, weights in expected.items():
        ranked = example_list()
        (found,) = torch.autograd.grad(brain_variance.ESTIMATORS[name](ranked).sum(), ranked.loglik.logp)
        assert found.squeeze(0).tolist() == pytest.approx(weights, abs=1e-9), name


def test_dpg_and_gdc_are_unbiased_and_brain_is_not():
    found = brain_variance.gradients(0.5, num_draws=40_000, seed=3)
    assert found["DPG"].mean().item() == pytest.approx(1.0, abs=0.02)
    assert found["GDC++"].mean().item() == pytest.approx(1.0, abs=0.02)
    assert found["BRAIn"].mean().item() < 0.95


def test_soft_optimal_values_are_those_of_a_uniform_reference():
    # Two of three first steps can end right, one of three second steps does: 2/9 of the paths.
    ref = torch.full((1, 27, 3), -math.log(3), dtype=torch.float64)
    value, terms = oreo_values.soft_optimum(ref)
    gain = math.exp(1 / oreo_values.BETA)
    assert value[0, 0, 0].item() == pytest.approx(oreo_values.BETA * math.log(7 / 9 + 2 / 9 * gain))
    assert value[0, 0, 1].item() == pytest.approx(oreo_values.BETA * math.log(2 / 3 + 1 / 3 * gain))
    assert value[0, 0, 2].item() == pytest.approx(1.0)
    assert value[0, -1].tolist() == pytest.approx([value[0, 0, 0].item(), 0.0, 0.0])
    assert terms.sum(-1).exp().sum().item() == pytest.approx(1.0)
    assert terms.sum(-1)[0, 0].exp().item() == pytest.approx(gain / (21 + 6 * gain))


def test_localisation_looks_at_the_wrong_step_and_at_those_after_it():
    credit = torch.zeros(1, 27, 3, dtype=torch.float64)
    credit.scatter_(-1, oreo_values.WRONG_STEP.clamp(min=0).view(1, 27, 1), -1.0)
    counts = torch.ones(1, 27, dtype=torch.float64)
    found, after = oreo_values.localised(credit, counts)
    assert (found.item(), after.item()) == pytest.approx((1.0, 0.0))
    found, after = oreo_values.localised(credit.roll(1, -1), counts)
    assert found.item() == 0.0
    assert after.isinf().all()


def test_a_policy_that_only_repeats_itself_never_fixes_nor_breaks():
    logits, features = score_credit.beginners(1, 40.0)
    policy = score_credit.TabularPolicy(logits, features=features, length=2)
    num = len(logits)
    contexts = torch.arange(num).repeat_interleave(25)
    terms = policy(score_credit.ATTEMPTS.repeat(num, 1), contexts).detach().view(num, -1, 2)
    acc1, acc2, fixed, broken = score_credit.metrics_of(terms).squeeze(-1).tolist()
    assert (acc1, acc2) == pytest.approx((0.2, 0.2))
    assert (fixed, broken) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_the_best_function_in_hindsight_has_no_regret_and_others_have():
    stream = groupwise_regret.users(400, seed=5)
    member = stream.belongs[:, 2]
    x, y = stream.x[member], stream.y[member]
    best = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    error = ((stream.x @ best).clamp(0, 1) - stream.y).square()
    losses = dict.fromkeys(groupwise_regret.LEARNERS, error)
    regret = groupwise_regret.regrets(stream, losses)
    assert regret[:, 2].abs().max().item() < 1e-12
    assert regret[:, 2, ~member].abs().max().item() == 0.0
    assert regret[0, 1].sum().item() > 0


def test_order_by_q_counts_ties_half_and_leaves_out_equal_values():
    truth = torch.tensor([0.9, 0.5, 0.5])
    assert tree_ordering.ordered_rightly(torch.tensor([3.0, 2.0, 1.0]), truth) == 1.0
    assert tree_ordering.ordered_rightly(torch.tensor([2.0, 2.0, 3.0]), truth) == 0.25
    assert math.isnan(tree_ordering.ordered_rightly(torch.ones(2), torch.ones(2)))


def test_values_of_prefixes_and_probabilities_of_answers_agree():
    generator = torch.Generator().manual_seed(2)
    logp = torch.randn(2, 31, 5, generator=generator).log_softmax(-1)
    problem = tree_ordering.make_problem(logp[1], noise=0.1, generator=generator)
    right = problem.values[-125:]
    probability = tree_ordering.answers(logp)[1].exp().double()
    assert float((probability * right).sum()) == pytest.approx(float(problem.values[0]), abs=1e-6)
    assert len(problem.right) == int(right.sum()) > 0


def test_dpo_on_six_against_two_visits_stops_at_log_three():
    assert tree_ordering.optimum((6, 2)) == pytest.approx(math.log(3), abs=1e-6)


def test_gains_are_measured_against_the_answer_that_was_given():
    best = torch.full((1, 12, 12), -40.0, dtype=torch.float64)
    best[..., -1] = 0.0
    assert pit_gap.gains(best)[0].tolist() == pytest.approx([5, 4, 3, 2, 1, 0], abs=1e-6)
    same = torch.full((1, 12, 12), -40.0, dtype=torch.float64)
    same.diagonal(dim1=1, dim2=2).fill_(0.0)
    assert pit_gap.gains(same)[0].tolist() == pytest.approx([0] * 6, abs=1e-6)


def test_improving_reaches_the_best_gap_less_kl_that_there_is():
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(1, 12, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    gap = 0.2 * torch.randn(1, 12, 12, generator=generator, dtype=torch.float64)
    given = torch.ones(1, 12, dtype=torch.float64)
    found = pit_gap.improve(start, gap, (given, given), num_steps=100)
    reached = (found.exp() * (gap.transpose(1, 2) - pit_gap.KL * (found - start))).sum(-1)
    best = pit_gap.KL * (start + gap.transpose(1, 2) / pit_gap.KL).logsumexp(-1)
    assert (best - reached).min().item() > -1e-9
    assert (best - reached).max().item() < 1e-2


def test_denoising_one_gaussian_is_the_known_shrinkage():
    one = torch.ones(1, dtype=torch.float64)
    toy = diffusion_steps.Toy(0 * one, one, one, one, width=1.0)
    x = torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = diffusion_steps.SIGNAL[4].sqrt() * x
    assert torch.allclose(toy.denoised(x, 4), expected)


def test_worth_of_a_state_is_the_mean_reward_of_its_samples():
    toy = diffusion_steps.make_toy(1)
    x = torch.full((40_000,), 0.7, dtype=torch.float64)
    samples = toy.reward(diffusion_steps.finish(toy, x, 10, torch.Generator().manual_seed(0)))
    found = diffusion_steps.look_up(diffusion_steps.worth(toy)[10], x[:1]).item()
    assert found == pytest.approx(samples.mean().item(), abs=4 * samples.std().item() / 200)


def test_gauss_hermite_points_give_the_moments_of_a_normal():
    points, weights = diffusion_steps.hermite()
    moments = [float((weights * points**k).sum()) for k in range(7)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15], abs=1e-9)
