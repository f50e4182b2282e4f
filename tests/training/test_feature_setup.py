from dataclasses import replace

import pytest
import torch
from scorer_cases import BT, SOFT

from triptych.training import feature_setup
from triptych.training.feature_data import FeatureConfig, FeatureExample
from triptych.training.feature_setup import (
    IdealPointConfig,
    right_pairs,
    set_up_ideal_points,
    unseen_results,
)
from triptych.training.feature_vectors import Standardise
from triptych.training.ideal_points import IdealPoints
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.scorers import fit_scorer, load_scorer
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
    # The third user has no pair beyond its shots.
    new = [*examples("a", 10), *examples("bb", 7), *examples("ccc", 4)]
    found = unseen_results(scorer, new, BT, settings, seed=0)
    assert len(fitted) == 8
    own, mean = evaluated
    assert own == mean
    assert len(own) == 6 + 3
    assert not set(own) & set(fitted)
    assert not [name for name in (*own, *fitted) if name.startswith("ccc")]
    assert {estimate.n for estimate in found.values()} == {2}
    assert unseen_results(scorer, examples("ccc", 4), BT, settings, seed=0) == {}


def tastes(num_users=8, per_user=60, *, ties=0):
    """Rows of users of two types, whose taste turns round with the sign of the prompt's first number."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for u in range(num_users):
        for i in range(per_user):
            a, b = torch.randn(2, 3, generator=generator).tolist()
            prompt = torch.randn(2, generator=generator).tolist()
            first = (a[0] > b[0]) == ((prompt[0] > 0) == bool(u % 2))
            chosen, rejected = (a, b) if first else (b, a)
            row = {"chosen": chosen, "rejected": rejected, "user": f"u{u}", "prompt": prompt}
            rows.append(row | ({"strength": 0.5} if i < ties else {}))
    return rows


def set_up(rows, terms, *, features=None, **users):
    """A run of users' rewards, what it reported, and what it left out."""
    said, quarantine = [], Quarantine()
    run = set_up_ideal_points(
        FeatureConfig(source="x.jsonl", eval_fraction=0.25, **(features or {})),
        IdealPointConfig(**({"num_prototypes": 2, "latent": 2, "closeness": "inner"} | users)),
        terms,
        lambda source: [(f"{source}:{i}", row) for i, row in enumerate(rows)],
        seed=0,
        device=torch.device("cpu"),
        quarantine=quarantine,
        report=said.append,
    )
    return run, said, quarantine


def fitted(run, terms):
    """Accuracy on held-out pairs after training on all others."""
    fit_scorer(run.policy, run.task.collate(run.task.examples, ()), terms, l2=1e-3)
    return float(right_pairs(run.policy, run.eval_task.examples, run.eval_task.collate).mean())


def test_prompts_go_from_rows_to_a_users_reward_its_results_and_its_file(tmp_path):
    plain, *_ = set_up(tastes(), BT)
    assert fitted(plain, BT) < 0.62
    run, said, _ = set_up(
        tastes(12), BT, prototypes="prompts", prompt_hidden=[8], unseen_fraction=0.3, shots=10
    )
    assert said[-1] == f"users: {len(run.policy.logits)} seen, {12 - len(run.policy.logits)} never trained on"
    assert run.policy.prompt_hidden == (8,)
    asked = torch.stack([e.prompt for e in run.task.examples])
    torch.testing.assert_close(run.policy.prompts.mean, asked.mean(0), atol=1e-6, rtol=1e-5)
    assert fitted(run, BT) > 0.93
    _, found = run.more(run.policy)
    assert found["accuracy, own - mean user"].low > 0.1
    assert found["accuracy, unseen users, 10 pairs"].mean > 0.85
    run.export(tmp_path / "model", None)
    again, _ = load_scorer(tmp_path / "model")
    batch = run.eval_task.collate(run.eval_task.examples, ())
    assert torch.equal(again(batch.inputs), run.policy(batch.inputs))


def test_ties_are_learnt_from_and_are_not_among_the_pairs_that_are_judged():
    rows = tastes(ties=12)
    kept, said, _ = set_up(rows, SOFT, features={"keep": ["strength"]}, prototypes="prompts")
    tied = sum(e.tied for e in kept.task.examples)
    assert 0 < tied < 8 * 12
    assert f"{8 * 12 - tied} held-out ties left out" in said[0]
    assert not any(e.tied for e in kept.eval_task.examples)
    assert len(kept.clusters) == len(kept.eval_task.examples)
    dropped, _, quarantine = set_up(rows, BT, prototypes="prompts")
    assert quarantine.counts == {"is a tie": 8 * 12}
    assert len(dropped.task.examples) + len(dropped.eval_task.examples) == 8 * 48
    with pytest.raises(ValueError, match="provides strength, which objective 'reward_bt' does not use"):
        set_up(rows, BT, features={"keep": ["strength"]})


def test_new_users_are_not_judged_by_their_ties(monkeypatch):
    judged = []
    right = feature_setup.right_pairs

    def right_seen(policy, found, collate):
        judged.extend(found)
        return right(policy, found, collate)

    monkeypatch.setattr(feature_setup, "right_pairs", right_seen)
    settings = IdealPointConfig(num_prototypes=2, latent=2, shots=4)
    scorer = IdealPoints(Standardise.identity(3), num_users=1, num_prototypes=2, latent=2)

    def half_tied(name, count):
        return [
            replace(e, sample=replace(e.sample, strength=0.5 if i % 2 else 1.0))
            for i, e in enumerate(examples(name, count))
        ]

    found = unseen_results(scorer, [*half_tied("a", 12), *half_tied("bb", 12)], SOFT, settings, seed=0)
    assert found
    assert judged
    assert not any(e.tied for e in judged)
    only_ties = [replace(e, sample=replace(e.sample, strength=0.5)) for e in examples("a", 12)]
    assert unseen_results(scorer, only_ties, SOFT, settings, seed=0) == {}


def test_settings_of_prompts_without_prompts_are_refused():
    with pytest.raises(ValueError, match=r"users\.prototypes=items does not use users\.prompt_hidden"):
        IdealPointConfig(num_prototypes=2, latent=2, prototypes="items", prompt_hidden=[4])
    rows = [{n: v for n, v in row.items() if n != "prompt"} for row in tastes(2, 4)]
    with pytest.raises(DataError, match="holds no usable record"):
        set_up(rows, BT, prototypes="prompts")
