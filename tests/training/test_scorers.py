import math

import pytest
import torch
from scorer_cases import BT, accuracy, pairs

from triptych.objectives import ListLogLik, PairLogLik, Term, Terms, UnitLogLik, build
from triptych.training.scorers import (
    FeatureReward,
    IdealPoints,
    Standardise,
    Vectors,
    fit_scorer,
    load_scorer,
    save_scorer,
)
from triptych.training.scoring import ScoreLikelihood, ScoreSample, score_batch, verdict_of

REGRESSION = Terms((Term(build("reward_regression")),))


def rated(vectors, ratings):
    samples = [ScoreSample(id=str(i), ratings=tuple(row)) for i, row in enumerate(ratings)]
    return score_batch(samples, Vectors(vectors), [str(i) for i in range(len(vectors))])


def linear(weights):
    """A linear reward with these weights, of features as they are."""
    scorer = FeatureReward(Standardise.identity(len(weights)))
    with torch.no_grad():
        scorer.network[0].weight.copy_(torch.tensor([weights]))
    return scorer


def test_the_published_example_of_expert_features_has_its_loss():
    scorer = linear([0.5, 0.3, -0.2])
    batch = pairs(torch.tensor([[0.4, 0.2, 0.1]]), torch.zeros(1, 3))
    loss, _ = BT({"none": ScoreLikelihood()(scorer, batch)})
    assert loss.item() == pytest.approx(0.580330, abs=1e-6)


def test_an_explicit_reward_of_1_2_against_0_2_loses_as_published():
    loss, _ = BT(
        {"none": ScoreLikelihood()(linear([1.0]), pairs(torch.tensor([[1.2]]), torch.tensor([[0.2]])))}
    )
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)


def test_a_margin_is_subtracted_from_the_gap_of_scores():
    batch = pairs(torch.tensor([[1.2]]), torch.tensor([[0.2]]), margin=2.0)
    loss, _ = BT({"none": ScoreLikelihood()(linear([1.0]), batch)})
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.0)), abs=1e-6)


def test_scores_stand_where_pairs_lists_and_units_have_log_likelihoods():
    scores = torch.tensor([[3.0], [1.0], [2.0], [5.0], [4.0]])
    samples = [ScoreSample(id="a", grades=(2.0, 1.0, 0.0)), ScoreSample(id="b", grades=(1.0, 0.5))]
    batch = score_batch(samples, None, "abcde")
    ranked = ScoreLikelihood().assemble(scores, batch)
    assert isinstance(ranked, ListLogLik)
    assert ranked.loglik.logp[0].tolist() == [3.0, 1.0, 2.0]
    assert ranked.loglik.logp[1, :2].tolist() == [5.0, 4.0]
    assert ranked.valid().tolist() == [[True, True, True], [True, True, False]]
    assert ranked.relevance.tolist() == [[2.0, 1.0, 0.0], [1.0, 0.5, 0.0]]
    two = score_batch([ScoreSample(id=i, grades=(1.0, 0.0), strength=0.8) for i in "ab"], None, "abcd")
    pair = ScoreLikelihood().assemble(scores[:4], two)
    assert isinstance(pair, PairLogLik)
    assert (pair.chosen.logp.tolist(), pair.rejected.logp.tolist()) == ([3.0, 2.0], [1.0, 5.0])
    assert pair.chosen.count.tolist() == [1.0, 1.0]
    assert pair.strength is not None
    unit = score_batch([ScoreSample(id="a", ratings=(4.0, None))], None, "a")
    units = ScoreLikelihood().assemble(torch.tensor([[3.0, 9.0]]), unit)
    assert isinstance(units, UnitLogLik)
    assert units.mask.tolist() == [[True, False]]
    # The missing rating's score, far off, costs nothing.
    assert REGRESSION({"none": units})[0].tolist() == [1.0]


def test_a_batch_of_what_does_not_belong_together_is_refused():
    pair, unit = ScoreSample(id="a", grades=(1.0, 0.0)), ScoreSample(id="b", ratings=(1.0,))
    with pytest.raises(ValueError, match="one kind, not pair, units"):
        score_batch([pair, unit], None, "abc")
    with pytest.raises(ValueError, match="margin must be given for every sample"):
        score_batch([pair, ScoreSample(id="c", grades=(1.0, 0.0), margin=1.0)], None, "abcd")
    with pytest.raises(ValueError, match="have 2 candidates, but there are 3"):
        score_batch([pair], None, "abc")
    with pytest.raises(ValueError, match="pairs compare one score, and the scorer gives 2"):
        ScoreLikelihood().assemble(torch.zeros(2, 2), score_batch([pair], None, "ab"))


def test_standardising_counts_only_what_is_known_and_leaves_a_constant_alone():
    x = torch.tensor([[1.0, 7.0], [3.0, 7.0], [99.0, 7.0]])
    known = torch.tensor([[True, True], [True, True], [False, True]])
    found = Standardise.of(x, known)
    assert found.mean.tolist() == [2.0, 7.0]
    assert found.scale.tolist() == [1.0, 1.0]
    assert torch.equal(found.inverse(found(x)), x)


def preferences(weights, count, *, seed, noise=True):
    """Pairs of random vectors ordered by w . x, with Bradley-Terry noise."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, count, len(weights), generator=generator)
    gap = (left - right) @ torch.tensor(weights)
    chance = torch.sigmoid(gap) if noise else (gap > 0).float()
    first = torch.rand(count, generator=generator) < chance
    return torch.where(first[:, None], left, right), torch.where(first[:, None], right, left)


def test_bradley_terry_on_features_recovers_what_each_is_worth():
    true = [2.0, -1.0, 0.0]
    scorer = FeatureReward(Standardise.identity(3))
    fit_scorer(scorer, pairs(*preferences(true, 4000, seed=0)), BT)
    assert scorer.network[0].weight[0].tolist() == pytest.approx(true, abs=0.2)
    assert accuracy(scorer, pairs(*preferences(true, 500, seed=1, noise=False))) > 0.97


def test_lbfgs_and_adamw_agree_and_a_fit_is_the_same_again():
    batch = pairs(*preferences([1.0, -0.5], 300, seed=0))
    found = []
    for optimizer, steps, lr in (("lbfgs", 50, 1.0), ("lbfgs", 50, 1.0), ("adamw", 600, 0.02)):
        scorer = FeatureReward(Standardise.identity(2))
        fit_scorer(scorer, batch, BT, num_steps=steps, lr=lr, l2=0.01, optimizer=optimizer)
        found.append(scorer.network[0].weight.detach().clone())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=1e-3, rtol=0)


def test_the_penalty_holds_the_optimum_of_a_separable_pair_where_it_is_by_hand():
    # With a difference of 1 the optimum is w = 1 where the slopes sigmoid(-1) and l2 w are equal.
    scorer = FeatureReward(Standardise.identity(1))
    batch = pairs(torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    loss = fit_scorer(scorer, batch, BT, l2=0.268941)
    assert scorer.network[0].weight.item() == pytest.approx(1.0, abs=1e-3)
    assert loss == pytest.approx(0.313262, abs=1e-3)


def test_a_margin_raises_the_gap_that_is_learnt():
    chosen, rejected = preferences([1.0, 1.0], 200, seed=3, noise=False)
    gaps = []
    for margin in (0.0, 3.0):
        scorer = FeatureReward(Standardise.identity(2))
        batch = pairs(chosen, rejected, margin=margin)
        fit_scorer(scorer, batch, BT, l2=0.01)
        pair = ScoreLikelihood()(scorer, batch)
        gaps.append(float((pair.chosen.logp - pair.rejected.logp).mean().detach()))
    assert gaps[1] > gaps[0] + 1.0


def test_a_small_network_learns_what_a_linear_reward_cannot():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 600, 2, generator=generator)
    first = left.square().sum(-1) < right.square().sum(-1)
    sides = torch.where(first[:, None], left, right), torch.where(first[:, None], right, left)
    train, held_out = pairs(*(s[:400] for s in sides)), pairs(*(s[400:] for s in sides))
    found = {}
    for hidden in ((), (16,)):
        scorer = FeatureReward(Standardise.identity(2), hidden=hidden, seed=1)
        fit_scorer(scorer, train, BT, l2=1e-4)
        found[hidden] = accuracy(scorer, held_out)
    assert found[()] < 0.65
    assert found[16,] > 0.9


def test_regression_recovers_a_linear_function_in_the_ratings_own_units_with_ratings_missing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0]) + 5
    true = torch.tensor([[1.0, 0.2, 30.0, 0.0], [0.0, -2.0, 0.0, 4.0]])
    y = x @ true.T + torch.tensor([3.0, -50.0])
    known = torch.rand(200, 2, generator=generator) < 0.6
    known[:, 0] |= ~known.any(1)
    outputs = Standardise.of(y, known)
    scorer = FeatureReward(Standardise.of(x), outputs=outputs)
    target = outputs(y).tolist()
    ratings = [
        [v if k else None for v, k in zip(*r, strict=True)] for r in zip(target, known.tolist(), strict=True)
    ]
    loss = fit_scorer(scorer, rated(x, ratings), REGRESSION)
    assert loss < 1e-6
    torch.testing.assert_close(scorer.rate(Vectors(x)), y, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "rated", "users"])
def test_a_saved_scorer_gives_the_same_scores_bit_for_bit(kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=generator)
    inputs = Standardise.of(x)
    if kind == "users":
        scorer = IdealPoints(inputs, num_users=3, num_prototypes=2, latent=2, hidden=(5,), closeness="inner")
    else:
        outputs = Standardise.of(torch.randn(9, 2, generator=generator)) if kind == "rated" else None
        scorer = FeatureReward(inputs, hidden=(4,), outputs=outputs)
        with torch.no_grad():
            scorer.network[-1].weight.normal_(generator=generator)
    save_scorer(scorer, tmp_path / "model", facts={"names": ["a", "b"]})
    again, facts = load_scorer(tmp_path / "model")
    vectors = Vectors(x, torch.arange(9) % 3 if kind == "users" else None)
    assert torch.equal(again(vectors), scorer(vectors))
    assert facts == {"names": ["a", "b"]}
    assert not again.training
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["scorer.json", "scorer.safetensors"]


def test_a_folder_that_is_no_scorer_is_refused_by_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"it has no scorer\.json"):
        load_scorer(tmp_path)


def test_a_fit_that_diverges_says_so():
    scorer = FeatureReward(Standardise.identity(1), outputs=Standardise.identity(1))
    with pytest.raises(ValueError, match="lower lr"):
        fit_scorer(scorer, rated(torch.ones(2, 1), [[1e30], [1e30]]), REGRESSION, lr=1e30, optimizer="adamw")


def test_a_direction_of_preference_weighs_the_objectives():
    scores = torch.tensor([[80.0, 50.0], [10.0, 90.0]])
    verdict = verdict_of(scores, ("helpfulness", "verbosity"), {"helpfulness": 0.8, "verbosity": -0.6})
    assert verdict.score.tolist() == pytest.approx([34.0, -46.0])
    assert torch.equal(verdict.users, scores)
    assert verdict_of(scores, ("helpfulness", "verbosity")).given() == {"users"}
    assert verdict_of(scores[:, :1], ("reward",)).given() == {"score"}
