import torch

from triptych.objectives import Term, Terms, build
from triptych.training import feature_setup
from triptych.training.feature_data import FeatureExample
from triptych.training.feature_setup import IdealPointConfig, unseen_results
from triptych.training.scorers import IdealPoints, Standardise
from triptych.training.scoring import ScoreSample


def examples(user, count):
    generator = torch.Generator().manual_seed(len(user) + count)
    return [
        FeatureExample(
            sample=ScoreSample(id=f"{user}{i}", grades=(1.0, 0.0)),
            vectors=torch.randn(2, 3, generator=generator),
            user=user,
            context=f"{user}{i}",
            source=f"x.jsonl:{i}",
        )
        for i in range(count)
    ]


def test_a_new_user_is_evaluated_on_other_pairs_than_those_its_weights_come_from(monkeypatch):
    fitted, evaluated = [], []
    fit, right = feature_setup.fit_scorer, feature_setup.right_pairs

    def fit_seen(scorer, batch, terms, **options):
        fitted.extend(batch.ids)
        return fit(scorer, batch, terms, **options)

    def right_seen(policy, found, collate):
        evaluated.append([e.sample.id for e in found])
        return right(policy, found, collate)

    monkeypatch.setattr(feature_setup, "fit_scorer", fit_seen)
    monkeypatch.setattr(feature_setup, "right_pairs", right_seen)
    settings = IdealPointConfig(num_prototypes=2, latent=2, shots=4)
    scorer = IdealPoints(Standardise.identity(3), num_users=1, num_prototypes=2, latent=2)
    terms = Terms((Term(build("reward_bt")),))
    # The third user has no pair beyond its shots.
    new = [*examples("a", 10), *examples("bb", 7), *examples("ccc", 4)]
    found = unseen_results(scorer, new, terms, settings, seed=0)
    assert len(fitted) == 8
    own, mean = evaluated
    assert own == mean
    assert len(own) == 6 + 3
    assert not set(own) & set(fitted)
    assert not [name for name in (*own, *fitted) if name.startswith("ccc")]
    assert {estimate.n for estimate in found.values()} == {2}
    assert unseen_results(scorer, examples("ccc", 4), terms, settings, seed=0) == {}
