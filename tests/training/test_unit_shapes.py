"""Rows of units with their credit, over a whole round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judged import JUNK, group
from torch import Tensor

from triptych.objectives import UnitLogLik, advantages, build
from triptych.training.groups import Group
from triptych.training.shapes import SHAPES
from triptych.training.unit_shapes import Units


def units_group(scores: list[float], lengths: list[int], **given: Any) -> Group:
    width = max(lengths)
    return group(scores, lengths=lengths, logp=[[-1.0] * n + [JUNK] * (width - n) for n in lengths], **given)


def test_units_are_a_row_a_candidate_with_old_log_probs_and_the_rounds_mean_length():
    groups = [units_group([1.0, 0.0], [3, 1]), units_group([0.0, 2.0, 1.0], [2, 2, 2])]
    samples = Units(credit="centred")(groups, seed=0)
    assert [s.candidates for s in samples] == [(0, 1), (0, 1, 2)]
    assert samples[0].fields["old"].tolist() == [[-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]
    assert samples[0].fields["advantage"].tolist() == [[0.5, 0.5, 0.5], [-0.5, 0.0, 0.0]]
    # 3 + 1 + 2 + 2 + 2 units in 5 rows.
    assert samples[0].fields["num_units"].tolist() == [2.0, 2.0]
    assert samples[1].fields["num_units"].tolist() == [2.0, 2.0, 2.0]


def test_the_mean_loss_of_dapo_does_not_depend_on_how_the_samples_are_cut():
    groups = [units_group([1.0, 0.0], [3, 1]), units_group([0.0, 2.0], [2, 4])]
    samples = Units(credit="centred")(groups, seed=0)

    def losses(parts: list[Any]) -> float:
        total = 0.0
        for s in parts:
            mask = groups[s.group].mask
            x = UnitLogLik(logp=s.fields["old"] + 0.1, mask=mask, **s.fields)
            total += build("dapo", clip=0.2, clip_high=0.3)(x).sum().item() / 4
        return total

    per_unit = [g.mask * s.fields["advantage"] for g, s in zip(groups, samples, strict=True)]
    expected = -(torch.e**0.1) * sum(a.sum().item() for a in per_unit) / 10
    assert losses(samples) == pytest.approx(expected, rel=1e-5)


def test_only_the_policys_own_candidates_are_trained_on_but_all_count_in_the_credit():
    of = units_group([1.0, 0.0, 5.0], [1, 1, 1], origin=("policy", "policy", "teacher"))
    (own,) = Units(credit="centred")([of], seed=0)
    assert own.candidates == (0, 1)
    assert own.fields["advantage"].tolist() == [[-1.0], [-2.0]]
    (every,) = Units(credit="centred", train="all")([of], seed=0)
    assert every.candidates == (0, 1, 2)


def test_a_group_without_candidates_of_the_policy_is_named_with_the_way_out():
    of = units_group([1.0], [1], origin=("data",))
    with pytest.raises(
        ValueError, match="no candidate of origin 'policy' but data; train on them with train=all"
    ):
        Units(credit="centred")([of], seed=0)


def test_groups_without_any_advantage_may_be_left_out():
    groups = [units_group([0.1, 0.1, 0.1], [9, 9, 9]), units_group([1.0, 0.0], [2, 2])]
    samples = Units(drop_equal=True)(groups, seed=0)
    assert [s.group for s in samples] == [1]
    assert samples[0].fields["num_units"].tolist() == [2.0, 2.0]
    assert len(Units()(groups, seed=0)) == 2
    assert Units(drop_equal=True)(groups[:1], seed=0) == []


def test_whitened_advantages_have_mean_0_and_deviation_1_over_all_units_of_the_round():
    groups = [units_group([1.0, 0.0], [3, 1]), units_group([0.0, 7.0], [2, 4])]
    raw, white = (Units(credit="centred", whiten=w)(groups, seed=0) for w in (False, True))
    masks = torch.cat([torch.nn.functional.pad(g.mask, (0, 4 - g.mask.shape[1])) for g in groups])

    def stacked(samples: list[Any]) -> Tensor:
        rows = [s.fields["advantage"] for s in samples]
        return torch.cat([torch.nn.functional.pad(r, (0, 4 - r.shape[1])) for r in rows])

    assert torch.allclose(stacked(white), advantages.whiten(stacked(raw), masks), atol=1e-6)
    assert stacked(white)[masks].mean().abs() < 1e-6
    assert stacked(white)[masks].std().item() == pytest.approx(1.0, abs=1e-5)


def test_units_say_what_their_credit_needs_and_gives():
    gae = Units(credit="gae", credit_options={"kl": 0.05})
    assert gae.needs == {"score|preference", "value", "logp", "ref"}
    assert gae.provides == {"advantage", "target", "old_value", "old"}
    assert gae.per_unit
    assert not Units().per_unit
    assert not Units(credit="gae", fields=["target"]).per_unit
    plain = Units(credit="leave_one_out", fields=["advantage"])
    assert (plain.needs, plain.provides) == ({"score|preference"}, {"advantage"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"credit": "zscore"}, "no credit 'zscore'. Did you mean 'z_score'?"),
        (
            {"credit_options": {"betta": 1}},
            "credit 'z_score' has no option 'betta'; it takes eps, kl, kl_estimator",
        ),
        (
            {"fields": ["target"]},
            "fields names 'target', which credit 'z_score' does not give; valid: advantage, old",
        ),
        (
            {"credit": "outcome", "whiten": True},
            "whiten needs advantages, and there are none with credit 'outcome'",
        ),
        ({"credit": "gae", "fields": ["target"], "drop_equal": True}, "drop_equal needs advantages"),
    ],
)
def test_units_refuse_what_their_credit_does_not_give(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        SHAPES.build("units", options)


def test_data_has_no_log_probs_of_drawing():
    with pytest.raises(ValueError, match="group g has no log-probs of drawing"):
        Units()([group([1.0, 0.0])], seed=0)
