"""From judged groups to advantages, by hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judged import JUNK, group
from torch import Tensor

from triptych.objectives import UnitLogLik, build, names, spec
from triptych.training.credits import CREDITS, DEFAULT_CREDIT, log_ratio, win_rates
from triptych.training.groups import Group

CYCLE = [[0.5, 0.7, 0.4], [0.3, 0.5, 0.9], [0.6, 0.1, 0.5]]


def advantage(name: str, of: Group, **options: Any) -> Tensor:
    return CREDITS.build(name, options)(of)["advantage"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("z_score", [0.865875, -0.865875, -0.865875, 0.865875]),
        ("centred", [0.5, -0.5, -0.5, 0.5]),
        ("leave_one_out", [0.666667, -0.666667, -0.666667, 0.666667]),
    ],
)
def test_group_credits_have_the_numbers_of_grpo_dr_grpo_and_rloo(name: str, expected: list[float]):
    found = advantage(name, group({"score": [1.0, 0.0, 0.0, 1.0]}, [1, 1, 1, 1]))
    assert found.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_golden_grpo_token_loss_follows_from_the_credit():
    a = advantage("z_score", group({"score": [1.0, 0.0, 0.0, 1.0]}, [1, 1, 1, 1]))[:1]
    units = UnitLogLik(
        logp=torch.tensor([[0.3]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        old=torch.zeros(1, 1),
        advantage=a,
    )
    # -min(rho A, 1.2 A), and 0.04 k3 at a log-ratio of 0.2 to the reference.
    loss = build("grpo", clip=0.2)(units).item() + 0.04 * (math.exp(-0.2) - 1 + 0.2)
    assert loss == pytest.approx(-1.038301, abs=1e-6)


def test_an_advantage_stands_at_every_unit_of_its_row_and_padding_gets_0():
    found = advantage("centred", group({"score": [2.0, 0.0]}, [3, 1]))
    assert found.tolist() == [[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["centred", "leave_one_out", "z_score", "half"])
def test_a_constant_on_all_scores_changes_no_advantage(name: str):
    scores = [0.25, -1.5, 3.0, 0.5]
    moved = advantage(name, group({"score": [s + 64.0 for s in scores]}, [2] * 4))
    assert torch.equal(moved, advantage(name, group({"score": scores}, [2] * 4)))


@pytest.mark.parametrize("name", ["centred", "leave_one_out", "z_score"])
def test_equal_scores_give_advantages_of_exactly_0(name: str):
    assert not advantage(name, group({"score": [0.1, 0.1, 0.1]}, [2, 2, 2])).any()


@pytest.mark.parametrize("name", ["centred", "leave_one_out", "z_score", "half"])
def test_permuted_candidates_have_permuted_advantages(name: str):
    scores, order = torch.tensor([0.3, -1.0, 2.0]), [2, 0, 1]
    one, other = (advantage(name, group({"score": s}, [1] * 3)) for s in (scores, scores[order]))
    assert torch.allclose(one[order], other)


def test_a_kl_in_the_reward_is_taken_from_the_score_of_the_whole_candidate():
    of = group(
        {"score": [1.0, 0.0]}, [2, 1], logp=[[-1.0, -2.0], [-1.0, JUNK]], ref=[[-1.5, -2.5], [-3.0, JUNK]]
    )
    # k1 sums are 1 and 2, so rewards are 1 - .1 and 0 - .2.
    assert advantage("leave_one_out", of, kl=0.1).tolist() == [
        [pytest.approx(1.1), pytest.approx(1.1)],
        [pytest.approx(-1.1), 0.0],
    ]


@pytest.mark.parametrize(
    "name", ["centred", "leave_one_out", "z_score", "half", "gae", "per_turn", "step_advantage"]
)
def test_every_credit_refuses_an_estimator_of_the_kl_that_is_wrong_in_a_reward(name: str):
    with pytest.raises(ValueError, match="'k3' in the reward is refused: its policy gradient"):
        CREDITS.build(name, {"kl_estimator": "k3"})


@pytest.mark.parametrize("name", ["centred", "half", "gae", "step_advantage"])
def test_a_kl_asks_for_both_log_probs_and_a_credit_without_asks_for_neither(name: str):
    assert {"logp", "ref"} <= CREDITS.build(name, {"kl": 0.1}).needs
    assert not {"logp", "ref"} & CREDITS.build(name).needs


def test_a_kl_without_a_reference_names_the_group():
    with pytest.raises(ValueError, match="group g: a KL in the reward needs log-probs under the reference"):
        advantage("centred", group({"score": [1.0, 0.0]}, [1, 1], logp=[[-1.0], [-1.0]]), kl=0.1)


def test_a_negative_kl_is_refused():
    with pytest.raises(ValueError, match=r"credit 'half': kl=-0.1 is not a finite number of at least 0"):
        CREDITS.build("half", {"kl": -0.1})


def test_win_shares_and_loss_of_minimaximalist_spo():
    of = group({"preference": CYCLE}, [1, 1, 1])
    assert win_rates(of).tolist() == pytest.approx([0.55, 0.6, 0.35])
    a = advantage("half", of)
    units = UnitLogLik(logp=torch.tensor([[-2.0], [-3.0], [-1.0]]), mask=of.mask, advantage=a)
    assert build("reinforce")(units).mean().item() == pytest.approx(0.083333, abs=1e-6)


def test_win_rates_with_self_count_one_half():
    assert win_rates(group({"preference": CYCLE}, [1] * 3), with_self=True).tolist() == pytest.approx(
        [1.6 / 3, 1.7 / 3, 1.2 / 3]
    )


def test_win_rates_against_one_origin_leave_the_others_and_oneself_out():
    of = group({"preference": CYCLE}, [1] * 3, origin=("policy", "teacher", "teacher"))
    assert win_rates(of, rivals="teacher").tolist() == pytest.approx([0.55, 0.9, 0.1])
    assert win_rates(of, rivals="teacher", with_self=True).tolist() == pytest.approx([0.55, 0.7, 0.3])
    # The only rival of the first is itself.
    assert win_rates(of, rivals="policy").tolist() == pytest.approx([0.5, 0.3, 0.6])


def test_an_origin_that_no_candidate_has_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="group g has no candidate of origin 'blend'; it has policy"):
        advantage("half", group({"score": [1.0, 0.0]}, [1, 1]), rivals="blend")


def test_half_against_a_blend_with_the_kl_is_the_policy_gradient_of_nash_md():
    of = group(
        {"preference": [[0.5, 0.7], [0.3, 0.5]]},
        [2, 1],
        origin=("policy", "blend"),
        logp=[[-1.0, -2.0], [-1.0, 0.0]],
        ref=[[-1.3, -2.1], [-1.0, 0.0]],
    )
    a = advantage("half", of, rivals="blend", kl=0.1)
    assert of.logp is not None
    loss = build("reinforce")(UnitLogLik(logp=of.logp, mask=of.mask, advantage=a))
    assert loss[0].item() == pytest.approx(0.48, abs=1e-6)


def test_the_outcome_at_every_unit_gives_the_golden_loss_of_oreo():
    of = group({"score": [1.0]}, [3])
    units = UnitLogLik(
        logp=torch.tensor([[0.2, -0.1, 0.3]]),
        mask=of.mask,
        ref=torch.zeros(1, 3),
        value=torch.tensor([[0.5, 0.6, 0.8]]),
        **CREDITS.build("outcome")(of),
    )
    for name in ("oreo_policy", "oreo_value"):
        assert build(name, beta=0.03)(units).item() == pytest.approx(0.143287, abs=1e-6)


def test_the_optimal_policy_has_no_loss_under_the_optimal_value():
    score, ref, beta = torch.tensor([1.0, 0.2, -0.5, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), 0.5
    value = beta * (ref + score / beta).logsumexp(0)
    best = ref + (score - value) / beta
    of = group({"score": score}, [1] * 4, logp=best.unsqueeze(-1), ref=ref.unsqueeze(-1))
    a = advantage("optimal_value", of, beta=beta)
    assert torch.allclose(a.squeeze(-1), score - value, atol=1e-6)
    units = UnitLogLik(logp=best.unsqueeze(-1), mask=of.mask, ref=ref.unsqueeze(-1), advantage=a)
    assert build("a2po", beta=beta)(units).abs().max() < 1e-10


def test_the_optimal_value_of_named_samples_is_their_soft_maximum():
    of = group({"score": [1.0, 0.0, 2.0]}, [1] * 3, origin=("policy", "reference", "reference"))
    value = math.log((1 + math.exp(2)) / 2)
    found = advantage("optimal_value", of, beta=1.0, samples="reference")
    assert found.squeeze(-1).tolist() == pytest.approx([1 - value, -value, 2 - value], abs=1e-6)
    assert CREDITS.build("optimal_value", {"beta": 1.0, "samples": "reference"}).needs == {"score|preference"}


def test_the_k1_of_padding_is_0():
    of = group({}, [1, 2], logp=[[-1.0, JUNK], [-1.0, -1.0]], ref=[[-2.0, JUNK], [-1.0, -3.0]])
    assert log_ratio(of).tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_every_objective_that_needs_an_advantage_or_a_target_has_a_credit_that_gives_it():
    for name in names(UnitLogLik):
        if name == "reward_regression":  # Its targets are ratings of data.
            continue
        wanted = spec(name).requires & {"advantage", "target", "old_value"}
        credit = CREDITS.build(DEFAULT_CREDIT.get(name, "none"), {"beta": 1.0} if name == "a2po" else None)
        assert wanted <= credit.provides, name


def test_objectives_of_one_ratio_a_sample_have_credits_of_whole_samples():
    for name in names(UnitLogLik):
        if spec(name).row_advantage:
            options = {"beta": 1.0} if name == "a2po" else None
            assert not CREDITS.build(DEFAULT_CREDIT[name], options).per_unit, name


def test_the_kl_anchor_of_hypo_is_reinforce_on_the_negative_k1_left_one_out():
    ratio, logp = torch.tensor([0.5, -0.1]), torch.tensor([-4.0, -3.0])
    of = group({"score": [0.0, 0.0]}, [1, 1], logp=logp.unsqueeze(-1), ref=(logp - ratio).unsqueeze(-1))
    a = advantage("leave_one_out", of, kl=1.0)
    assert a.squeeze(-1).tolist() == pytest.approx([-0.6, 0.6], abs=1e-6)
    units = UnitLogLik(logp=logp.unsqueeze(-1), mask=of.mask, advantage=a)
    # mean of (r - b) s = (.6 * -4 + -.6 * -3) / 2.
    anchor = build("reinforce")(units).mean().item()
    assert anchor == pytest.approx(-0.3, abs=1e-6)
    assert 0.673347 + 0.1 * anchor == pytest.approx(0.643347, abs=1e-6)
