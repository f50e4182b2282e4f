from dataclasses import dataclass, replace

import pytest
import torch

from triptych.objectives import LabelledLogLik, ListLogLik, PairLogLik, UnitLogLik, with_reference
from triptych.training.assembly import RoundLikelihood, SampleCollator, fold
from triptych.training.groups import Group, Sample, Verdict
from triptych.training.order import Draw


@dataclass(frozen=True)
class NumbersBatch:
    table: torch.Tensor
    keys: tuple
    counts: torch.Tensor
    ids: tuple
    seeds: tuple

    def to(self, device):
        return self


class Numbers:
    """A port whose candidates are their own log-probs."""

    bound = False

    def collate(self, items, seeds):
        rows = [c for _, cs in items for c in cs]
        width = max(map(len, rows))
        table = torch.tensor([[*r, *[0.0] * (width - len(r))] for r in rows])
        keys = tuple(f"{context}{c}" for context, cs in items for c in cs)
        counts = torch.tensor([float(len(r)) for r in rows])
        return NumbersBatch(table, keys, counts, tuple(c for c, _ in items), tuple(seeds))

    def terms(self, policy, batch, generator=None):
        return policy * batch.table

    def readouts(self, policy, batch, names):
        return {"logp": policy * batch.table} | dict.fromkeys(names, 10 * batch.table)


def group(name, *candidates, mask=None, **fields):
    width = max(map(len, candidates))
    own = torch.tensor([[i < len(c) for i in range(width)] for c in candidates])
    return Group(key=name, context=name, candidates=candidates, mask=own if mask is None else mask, **fields)


A = group("a", (-1.0, -2.0), (-3.0,), (-0.5, -0.5, -0.5))
B = group("b", (-4.0,), (-5.0, -1.0))
GROUPS = [A, B]


def batch_of(*samples, draws=()):
    return SampleCollator(Numbers(), GROUPS)(samples, draws)


def made(*samples, names=frozenset(), policy=1.0):
    batch = batch_of(*samples)
    return RoundLikelihood(Numbers(), names)(policy, batch), batch


def sample(kind, group, *candidates, calibration=None, **fields):
    values = {k: torch.as_tensor(v) for k, v in fields.items()}
    return Sample(kind=kind, group=group, candidates=candidates, calibration=calibration, fields=values)


def test_pairs_are_sums_over_units_with_their_fields():
    x, _ = made(sample("pair", 0, 1, 0, strength=0.7), sample("pair", 1, 0, 1, strength=1.0))
    assert isinstance(x, PairLogLik)
    assert x.chosen.logp.tolist() == [-3.0, -4.0]
    assert x.rejected.logp.tolist() == [-3.0, -6.0]
    assert x.rejected.count.tolist() == [2.0, 2.0]
    assert x.strength.tolist() == pytest.approx([0.7, 1.0])
    assert x.calibration is None


def test_a_calibration_candidate_is_computed_besides_the_pair():
    x, batch = made(sample("pair", 0, 0, 1, calibration=2), sample("pair", 1, 0, 1, calibration=1))
    assert x.calibration.logp.tolist() == [-1.5, -6.0]
    assert x.calibration.count.tolist() == [3.0, 2.0]
    assert len(batch.keys) == 5


def test_lists_of_different_lengths_are_padded_and_masked():
    x, _ = made(
        sample("list", 0, 2, 0, 1, relevance=[3.0, 2.0, 1.0], reward=[0.5, 0.2, 0.1]),
        sample("list", 1, 1, 0, relevance=[1.0, 0.0], reward=[0.9, 0.4]),
    )
    assert isinstance(x, ListLogLik)
    assert x.loglik.logp[0].tolist() == [-1.5, -3.0, -3.0]
    assert x.loglik.logp[1, :2].tolist() == [-6.0, -4.0]
    assert x.mask.tolist() == [[True, True, True], [True, True, False]]
    assert x.relevance[1].tolist() == [1.0, 0.0, 0.0]
    assert x.reward[1].tolist() == pytest.approx([0.9, 0.4, 0.0])


def test_labelled_candidates_are_rows_of_their_own():
    x, _ = made(sample("labelled", 0, 2, desirable=True), sample("labelled", 1, 1, desirable=False))
    assert isinstance(x, LabelledLogLik)
    assert x.loglik.logp.tolist() == [-1.5, -6.0]
    assert x.desirable.tolist() == [True, False]


def test_a_sample_of_units_has_a_row_a_candidate_and_its_loss_is_their_mean():
    x, batch = made(
        sample(
            "units", 0, 0, 1, 2, advantage=[[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [3.0, 3.0, 3.0]], num_units=2.0
        ),
        sample("units", 1, 1, advantage=[[5.0, 5.0]], num_units=[2.0]),
    )
    assert isinstance(x, UnitLogLik)
    assert x.logp.tolist() == [[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0], [-0.5, -0.5, -0.5], [-5.0, -1.0, 0.0]]
    assert x.mask.sum(-1).tolist() == [2, 1, 3, 2]
    assert x.advantage[3].tolist() == [5.0, 5.0, 0.0]
    assert x.num_units.tolist() == [2.0] * 4
    assert fold(torch.tensor([1.0, 2.0, 6.0, 5.0]), batch).tolist() == [3.0, 5.0]


def test_units_that_others_put_in_between_count_nothing():
    mask = torch.tensor([[True, False, True], [True, False, False]])
    turns = group("a", (-1.0, -9.0, -2.0), (-3.0, -7.0), mask=mask)
    batch = SampleCollator(Numbers(), [turns])([sample("pair", 0, 0, 1)])
    x = RoundLikelihood(Numbers())(1.0, batch)
    assert x.chosen.logp.tolist() == [-3.0]
    assert x.chosen.count.tolist() == [2.0]
    assert x.rejected.logp.tolist() == [-3.0]
    # What the reference would say of them is never read: the stored values end with the policy's own units.
    assert batch.counts.tolist() == [3.0, 2.0]


def test_a_reference_of_steps_is_the_same_reading_of_its_own_terms():
    # Steps of 2 and 1 units with weights 1 and 3: (1 * mean(-1, -2) + 3 * -4) / 4.
    steps = group("a", (-1.0, -2.0, -4.0), (-6.0,))
    s = sample(
        "list",
        0,
        0,
        1,
        relevance=[1.0, 0.0],
        steps=[[0, 0, 1], [0, 0, 0]],
        step_weight=[[1.0, 3.0], [1.0, 1.0]],
    )
    batch = SampleCollator(Numbers(), [steps])([s])
    likelihood = RoundLikelihood(Numbers())
    x = likelihood(1.0, batch)
    assert x.loglik.logp[0].tolist() == pytest.approx([(-1.5 - 12.0) / 4, -6.0])
    assert x.loglik.count[0].tolist() == [1.0, 1.0]
    referenced = with_reference(x, likelihood.assemble(0.5 * batch.inner.table, batch))
    torch.testing.assert_close(referenced.loglik.log_ratio(), 0.5 * x.loglik.logp)


def test_readouts_stand_beside_the_log_probs_row_by_row():
    x, _ = made(sample("units", 1, 1, 0), names=frozenset({"value"}), policy=2.0)
    assert x.logp.tolist() == [[-10.0, -2.0], [-8.0, 0.0]]
    assert x.value.tolist() == [[-50.0, -10.0], [-40.0, 0.0]]


def test_samples_of_one_group_share_the_work_on_their_candidates():
    every = [
        sample("pair", 0, 0, 1),
        sample("pair", 0, 0, 2),
        sample("pair", 0, 1, 2),
        sample("pair", 1, 1, 0),
    ]
    draws = [Draw(i, 0, 100 + i) for i in range(4)]
    batch = batch_of(*every, draws=draws)
    assert len(batch.keys) == 5
    assert batch.inner.ids == ("a", "b")
    # Randomness comes with the first sample of a group.
    assert batch.inner.seeds == (100, 103)
    assert batch.ids == ("a", "a", "a", "b")
    x = RoundLikelihood(Numbers())(1.0, batch)
    assert x.chosen.logp.tolist() == [-3.0, -3.0, -3.0, -6.0]
    assert x.rejected.logp.tolist() == [-3.0, -1.5, -1.5, -4.0]


def test_a_batch_holds_samples_of_one_kind():
    with pytest.raises(ValueError, match=r"samples of one kind, not \['list', 'pair'\]"):
        batch_of(sample("pair", 0, 0, 1), sample("list", 1, 0, 1, relevance=[1.0, 0.0]))


@pytest.mark.parametrize("name", ["score", "preference", "users"])
def test_a_verdict_of_nan_is_no_verdict(name):
    with pytest.raises(ValueError, match=f"a verdict's {name} holds NaN"):
        Verdict(**{name: torch.tensor([[1.0, float("nan")]])})
    assert Verdict(units=torch.tensor([[1.0, float("nan")]])).given() == {"units"}


def test_a_group_says_what_does_not_fit():
    with pytest.raises(ValueError, match="group a: logp has shape"):
        replace(A, logp=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"group a: mask is torch\.float32"):
        replace(A, mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="group x has no candidate"):
        Group(key="x", context=None, candidates=(), mask=torch.zeros(0, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no log-probs of drawing"):
        A.drawn_logp()
    assert replace(A, logp=A.mask.float()).drawn_logp().tolist() == [2.0, 1.0, 3.0]
    assert replace(A, logp=A.mask.float(), proposal=torch.tensor([1.0, 2.0, 3.0])).drawn_logp()[1] == 2.0
