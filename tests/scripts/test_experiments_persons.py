"""The experiment of persons' tastes: people are what it says, and it runs."""

import pytest
import torch

from triptych.scripts.experiments import diffusion_toy as toy
from triptych.scripts.experiments import persons_ppd
from triptych.scripts.experiments.common import save_figure


@pytest.fixture(scope="module")
def pool():
    """Lists of drawn pictures."""
    prompts = toy.TRAINED
    flat = toy.drawn([p for p in prompts for _ in range(4)], torch.Generator().manual_seed(0))
    return toy.Pool(prompts, flat.view(len(prompts), 4, 3, toy.SIZE, toy.SIZE))


@pytest.fixture(scope="module")
def people(pool):
    return persons_ppd.persons(pool, seed=0)


def test_the_experiment_runs_small_and_draws(tmp_path):
    outcome = persons_ppd.run(seeds=2, quick=True)
    assert len(outcome.claims) == 5
    for claim in outcome.claims:
        assert (claim.family, claim.method) == ("Diffusion", "PPD")
        assert claim.command in persons_ppd.__doc__
    (nobody,) = (c for c in outcome.claims if c.statement.startswith("Without a person"))
    assert nobody.holds is True
    assert save_figure(outcome, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_both_groups_judge_the_same_pairs_and_mostly_disagree(pool, people):
    judged = [
        {frozenset(pair[1:]) | {f"list {pair[0]}"}: pair for p in people if p.group == g for pair in p.pairs}
        for g in range(2)
    ]
    assert judged[0].keys() == judged[1].keys()
    opposite = [judged[0][k] != judged[1][k] for k in judged[0]]
    assert sum(opposite) / len(opposite) > 0.7
    reward = pool.score("redness")
    gains = [p.sign * float(reward[i, a] - reward[i, b]) for p in people for i, a, b in p.pairs]
    right = sum(gain > 0 for gain in gains) / len(gains)
    assert 0.85 < right < 1


def test_new_persons_teach_nothing_and_nobody_is_known_by_what_is_learnt_from(pool, people):
    assert sum(p.is_new for p in people) == 2 * persons_ppd.NEW
    assert all(bool(p.pairs) != p.is_new for p in people)
    assert {len(p.known_by) for p in people} == {4}

    def pairs(found):
        return [(i, frozenset((a, b))) for i, a, b in found]

    learnt = {pair for p in people for pair in pairs(p.pairs)}
    known = [pair for p in people for pair in pairs(p.known_by)]
    assert len(set(known)) == len(known)
    assert not learnt & set(known)
    examples = persons_ppd.examples_of(people, pool)
    assert {e.group for e in examples} == {p.name for p in people if not p.is_new}


def test_vectors_of_one_taste_are_alike(pool, people):
    users = persons_ppd.vectors_of(people, pool)
    vectors = torch.stack([users[p.name][0] for p in people])
    group = torch.tensor([p.group for p in people])
    like = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    same = group[:, None] == group[None]
    assert float(like[~same].mean()) < -0.2
    assert float(like[same & ~torch.eye(len(people), dtype=torch.bool)].mean()) > 0.2
