"""Which candidates become pairs, and their labels, by hand-worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judged import group

from triptych.objectives import LogLik, PairLogLik, build
from triptych.training.groups import Group, Sample
from triptych.training.pair_shapes import Pairs, left_out


def pairs_of(of: Group, **options: Any) -> list[tuple[int, ...]]:
    return [s.candidates for s in Pairs(**options)([of], seed=0)]


def only(of: Group, **options: Any) -> Sample:
    (sample,) = Pairs(**options)([of], seed=0)
    return sample


def on(sample: Sample, **extra: LogLik) -> PairLogLik:
    """The golden pair r_w = .6, r_l = -.2 with a sample's fields."""
    one, zero = torch.ones(1), torch.zeros(1)
    fields: dict[str, Any] = {k: v.reshape(1) for k, v in sample.fields.items()}
    return PairLogLik(LogLik(0.6 * one, one, zero), LogLik(-0.2 * one, one, zero), **extra, **fields)


SCORES = [0.4, 2.0, -1.0, 0.5]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("best_worst", [(1, 2)]),
        ("siblings", [(1, 2)]),
        ("first", [(1, 0)]),
        ("best_rest", [(1, 0), (1, 2), (1, 3)]),
        ("all", [(1, 0), (0, 2), (3, 0), (1, 2), (1, 3), (3, 2)]),
    ],
)
def test_each_choice_names_the_better_candidate_first(which: Any, expected: list[tuple[int, int]]):
    assert pairs_of(group(SCORES), which=which) == expected
    assert Pairs(which=which).most(4) == len(expected)


@pytest.mark.parametrize("which", ["best_worst", "siblings", "best_rest", "all"])
def test_permuting_the_candidates_permutes_nothing_in_the_chosen_pairs(which: Any):
    order = [3, 1, 0, 2]
    permuted = pairs_of(group([SCORES[i] for i in order]), which=which)
    assert {(order[w], order[l_]) for w, l_ in permuted} == set(pairs_of(group(SCORES), which=which))


@pytest.mark.parametrize("label", ["hard", "bt", "preference", "win_rate"])
def test_a_constant_on_all_scores_changes_no_label(label: Any):
    one, other = (
        Pairs(which="all", label=label, with_margin=True)([group([s + c for s in [0.5, 2.0, -1.0]])], seed=0)
        for c in (0.0, 64.0)
    )
    assert [s.candidates for s in one] == [s.candidates for s in other]
    for a, b in zip(one, other, strict=True):
        assert {k: v.item() for k, v in a.fields.items()} == {k: v.item() for k, v in b.fields.items()}


def test_random_pairs_are_two_different_candidates_that_the_seed_and_the_key_reproduce():
    groups = [group([0.0, 1.0, 2.0, 3.0], key=f"g{i}") for i in range(60)]
    shape = Pairs(which="random")
    one, again, other = ([s.candidates for s in shape(groups, seed=s)] for s in (1, 1, 2))
    assert one == again != other
    assert all(w > l_ for w, l_ in one)
    assert len(set(one)) == 6


def test_the_best_meets_a_random_other_one():
    groups = [group(SCORES, key=f"g{i}") for i in range(40)]
    found = {s.candidates for s in Pairs(which="best_random")(groups, seed=0)}
    assert found == {(1, 0), (1, 2), (1, 3)}


def test_equal_scores_are_dropped_and_counted():
    groups = [group([1.0, 1.0]), group([1.0, 0.0]), group([0.5, 0.5, 0.5])]
    samples = Pairs()(groups, seed=0)
    assert [s.group for s in samples] == [1]
    assert left_out(groups, samples) == 2


def test_equal_scores_may_count_half():
    shape = Pairs(which="all", ties="half")
    strengths = {s.candidates: s.fields["strength"].item() for s in shape([group([1.0, 1.0, 0.0])], seed=0)}
    assert strengths == {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 1.0}
    assert shape.provides == {"strength"}


def test_equal_siblings_are_told_apart_by_their_visits():
    of = group({"score": [1.0, 1.0, 1.0], "visits": [2.0, 5.0, 1.0]})
    assert pairs_of(of, which="siblings") == [(1, 2)]
    assert pairs_of(of) == []


def test_a_single_candidate_makes_no_pair():
    assert pairs_of(group([1.0]), which="all") == []
    assert Pairs().most(1) == 0


def test_bradley_terry_strength_is_the_sigmoid_of_the_gap():
    assert only(group([2.0, 0.5]), label="bt").fields["strength"].item() == pytest.approx(
        1 / (1 + math.exp(-1.5))
    )


def test_preference_strength_gives_the_golden_soft_ipo():
    sample = only(group({"preference": [[0.5, 0.7], [0.3, 0.5]]}), label="preference")
    assert sample.fields["strength"].item() == pytest.approx(0.7)
    assert build("ipo", tau=0.1, reduce="sum")(on(sample)).item() == pytest.approx(22.44, abs=1e-4)


def test_win_rates_give_the_golden_sppo():
    of = group({"preference": [[0.5, 0.9, 0.9], [0.1, 0.5, 0.5], [0.1, 0.5, 0.5]]})
    sample = only(of, label="win_rate", with_self=False)
    assert sample.fields["win_chosen"].item() == pytest.approx(0.9)
    assert sample.fields["win_rejected"].item() == pytest.approx(0.3)
    assert build("sppo", beta=0.25)(on(sample)).item() == pytest.approx(0.68, abs=1e-6)


def test_win_rates_of_scores_count_oneself_one_half_by_default():
    fields = only(group([1.0, 0.0]), label="win_rate").fields
    p = 1 / (1 + math.exp(-1.0))
    assert fields["win_chosen"].item() == pytest.approx((p + 0.5) / 2)
    assert fields["win_rejected"].item() == pytest.approx((1 - p + 0.5) / 2)


def test_win_rates_without_self_give_the_golden_dno_and_large_margins_its_practical_form():
    of = group({"preference": [[0.5, 0.8, 0.8], [0.2, 0.5, 0.5], [0.2, 0.5, 0.5]]})
    soft = only(of, label="win_rate", with_self=False)
    assert build("dno", beta=0.1)(on(soft)).item() == pytest.approx(0.685096, abs=1e-6)
    judged = group([6.0, 3.0, 5.0])
    practical = only(judged, min_margin=2.0, min_score=5.0)
    assert practical.candidates == (0, 1)
    assert build("dpo", beta=0.1)(on(practical)).item() == pytest.approx(0.653947, abs=1e-6)
    assert pairs_of(judged, min_margin=3.5) == []
    assert pairs_of(judged, min_score=6.5) == []


def test_win_rates_may_be_against_the_policys_own_candidates_only():
    preference = [[0.5, 0.7, 0.4], [0.3, 0.5, 0.2], [0.6, 0.8, 0.5]]
    of = group({"preference": preference}, origin=("policy", "policy", "teacher"))
    fields = only(of, label="win_rate", with_self=False, rivals="policy").fields
    # The teacher beats both by (.6 + .8) / 2; the second loses to the only other policy's one.
    assert fields["win_chosen"].item() == pytest.approx(0.7)
    assert fields["win_rejected"].item() == pytest.approx(0.3)


def test_visits_give_the_golden_loss_of_mcts_dpo():
    sample = only(group({"score": [1.0, 0.0], "visits": [6.0, 2.0]}), which="siblings", label="visits")
    assert sample.fields["smoothing"].item() == pytest.approx(0.25)
    assert build("dpo", beta=0.1)(on(sample)).item() == pytest.approx(0.673947, abs=1e-6)


@pytest.mark.parametrize(("visits", "smoothing"), [([1.0, 9.0], 0.5), ([0.0, 0.0], 0.0), ([0.0, 1.0], 0.5)])
def test_the_smoothing_of_visits_is_at_most_one_half(visits: list[float], smoothing: float):
    of = group({"score": [1.0, 0.0], "visits": visits})
    assert only(of, label="visits").fields["smoothing"].item() == smoothing


def test_consistency_gives_the_golden_loss_of_cream():
    # Kendall's tau between the rankings is .8, so C = (tau + 1) / 2 = .9.
    sample = only(group({"score": [1.0, 0.0], "consistency": 0.9}), label="consistency")
    assert build("dpo", beta=0.1)(on(sample)).item() == pytest.approx(0.661947, abs=1e-6)


def test_consistency_may_be_averaged_over_the_round():
    groups = [group({"score": [1.0, 0.0], "consistency": c}) for c in (0.9, 0.5, 1.0)]
    each, mean = (Pairs(label="consistency", average=a)(groups, seed=0) for a in (None, True))
    assert [s.fields["smoothing"].item() for s in each] == pytest.approx([0.1, 0.5, 0.0])
    assert [s.fields["smoothing"].item() for s in mean] == pytest.approx([0.2, 0.2, 0.2])


def test_the_margin_gives_the_golden_p3o():
    sample = only(group([0.8, 0.2]), with_margin=True)
    one = torch.ones(1)
    fields: dict[str, Any] = {k: v.reshape(1) for k, v in sample.fields.items()}
    pair = PairLogLik(
        LogLik(one * math.log(1.1), one, 0 * one), LogLik(one * math.log(0.7), one, 0 * one), **fields
    )
    assert build("p3o", clip=0.2)(pair).item() == pytest.approx(0.066, abs=1e-6)


def test_a_length_penalty_per_unit_can_turn_a_pair_round():
    of = group([1.0, 0.9], lengths=[5, 2])
    assert pairs_of(of) == [(0, 1)]
    sample = only(of, length_penalty=0.1, with_margin=True)
    assert sample.candidates == (1, 0)
    assert sample.fields["margin"].item() == pytest.approx(0.7 - 0.5)


def test_the_references_sample_calibrates_vpo_and_xpo():
    of = group([1.0, 0.0, 0.5], origin=("policy", "policy", "reference"))
    sample = only(of, calibration="reference")
    assert (sample.candidates, sample.calibration, sample.all_candidates) == ((0, 1), 2, (0, 1, 2))
    one = torch.ones(1)
    vpo = build("vpo", beta=0.1, alpha=0.1, regime="online")
    assert vpo(on(sample, calibration=LogLik(0.3 * one, one, 0 * one))).item() == pytest.approx(
        0.656947, abs=1e-6
    )
    xpo = build("xpo", beta=0.1, alpha=0.01)
    assert xpo(on(sample, calibration=LogLik(-3 * one, one, 0 * one))).item() == pytest.approx(
        0.623947, abs=1e-6
    )


def test_offline_the_chosen_candidate_calibrates():
    assert only(group([0.0, 1.0]), calibration="chosen").calibration == 1


def test_a_group_without_a_sample_of_the_reference_is_named():
    with pytest.raises(ValueError, match="group g has no candidate of origin 'reference' to calibrate by"):
        pairs_of(group([1.0, 0.0]), calibration="reference")


@pytest.mark.parametrize(
    ("options", "needs", "provides"),
    [
        ({}, set(), set()),
        ({"label": "bt", "with_margin": True}, {"score"}, {"strength", "margin"}),
        ({"label": "win_rate"}, set(), {"win_chosen", "win_rejected"}),
        ({"label": "visits"}, {"visits"}, {"smoothing"}),
        ({"label": "consistency"}, {"consistency"}, {"smoothing"}),
        ({"calibration": "reference"}, {"calibration"}, {"calibration"}),
    ],
)
def test_needs_and_provides_follow_the_options(options: dict[str, Any], needs: set[str], provides: set[str]):
    shape = Pairs(**options)
    assert shape.needs == {"score|preference", *needs}
    assert shape.provides == provides


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"which": "best"}, "which='best' is not one of best_worst, all"),
        ({"average": True}, "average goes with label=consistency, and label is hard"),
        ({"with_self": False, "label": "bt"}, "with_self goes with label=win_rate, and label is bt"),
        ({"min_margin": -1.0}, "min_margin=-1.0 is not a finite number of at least 0"),
        ({"ties": "half", "min_margin": 0.5}, "min_margin=0.5 drops them"),
    ],
)
def test_options_that_cannot_mean_what_they_say_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        Pairs(**options)
