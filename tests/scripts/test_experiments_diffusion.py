"""The diffusion experiments on pairs: the toy is what it says, labels and verdicts are right."""

import math
import sys

import pytest
import torch
from matplotlib.figure import Figure

from triptych.modalities.diffusion.likelihood import Collator
from triptych.scripts.experiments import diffusion_pairs as pairs
from triptych.scripts.experiments import diffusion_toy as toy
from triptych.training.order import Draw


@pytest.fixture(scope="module")
def base():
    return toy.pretrained(toy.QUICK.pretraining)


@pytest.fixture(scope="module")
def pool():
    """Lists of drawn pictures, for what needs no model."""
    prompts = toy.TRAINED[:12]
    flat = toy.drawn([p for p in prompts for _ in range(4)], torch.Generator().manual_seed(0))
    return toy.Pool(prompts, flat.view(12, 4, 3, toy.SIZE, toy.SIZE))


@pytest.fixture(scope="module")
def judge(base):
    return toy.Judge.of(base, toy.QUICK, seed=0)


def moved(base):
    """The base with other last weights."""
    policy = toy.deepcopy(base)
    with torch.no_grad():
        policy.model.conv_out.weight.mul_(1.2)
    return policy


def test_held_out_prompts_are_never_trained_on_and_hold_no_new_word():
    assert set(toy.HELD_OUT).isdisjoint(toy.TRAINED)
    assert len(toy.HELD_OUT) + len(toy.TRAINED) == len(toy.PROMPTS) == 96
    assert {word for p in toy.TRAINED for word in toy.PROMPTS[p]} == set(toy.WORDS)


@pytest.mark.parametrize(("hue", "colour"), [(0, (1, 0, 0)), (1 / 3, (0, 1, 0)), (2 / 3, (0, 0, 1))])
def test_hues_become_the_primary_colours(hue, colour):
    one = torch.tensor(1.0)
    assert toy._rgb(torch.tensor(hue), one, one).tolist() == pytest.approx(colour, abs=1e-5)
    assert toy._rgb(torch.tensor(hue), 0 * one, one / 2).tolist() == pytest.approx([0.5] * 3)


def test_a_drawn_shape_is_where_the_prompt_says_and_its_background_as_light():
    for index, (_, place, _, ground) in enumerate(toy.PROMPTS):
        (picture,) = toy.drawn([index], torch.Generator().manual_seed(index))
        row, column = (0 if "top" in place else -1), (0 if "left" in place else -1)
        paper = picture[:, -1 - row, -1 - column]
        assert (float(paper.max()) > 0.5) == (ground == "on light")
        inked = (picture - paper.view(3, 1, 1)).abs().sum(0) > 0.05
        y, x = inked.nonzero().float().mean(0).tolist()
        assert (y < 7.5) == ("top" in place)
        assert (x < 7.5) == ("left" in place)


def test_drawn_pictures_favour_no_colour():
    pictures = toy.drawn([i % 96 for i in range(960)], torch.Generator().manual_seed(1))
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert abs(float(toy.measured("redness", pictures).mean())) < 0.02


def test_the_base_is_the_same_with_and_without_its_cache(base, tmp_path):
    toy.pretrained(toy.QUICK.pretraining, tmp_path)
    toy.pretrained.cache_clear()
    read = toy.pretrained(toy.QUICK.pretraining, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    assert toy.content_hash(read) == toy.content_hash(base)
    assert toy.content_hash(read) != toy.content_hash(toy.make_denoiser())


def test_noise_of_a_picture_depends_on_seed_and_place_alone(base):
    several = toy.sampled(base, toy.TRAINED[:3], seed=1, num_steps=2)
    alone = toy.sampled(base, toy.TRAINED[:1], seed=1, num_steps=2)
    assert torch.allclose(several[:1], alone, atol=1e-4)
    assert not torch.allclose(toy.sampled(base, toy.TRAINED[:1], seed=2, num_steps=2), alone, atol=1e-2)


def test_agreement_by_hand_leaves_ties_out():
    truth = torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    said = torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 2.0]])
    # Row 1: (0, 1) and (0, 2) right, (1, 2) tied; row 2: only (1, 2) right.
    assert toy.agreement(said, truth).sort().values.tolist() == [0, 0, 1, 1, 1]


def test_the_base_has_no_implicit_reward_and_no_drift(judge, base):
    implicit, drift = judge.probe.implicit(base)
    assert implicit.abs().max() == 0
    assert drift == 0
    found = judge.look(base, reward="redness", judged="warm_share")
    assert found["wins"] == 0.5
    assert found["reward"] == pytest.approx(float(judge.pool.score("redness").mean()))


def test_the_implicit_reward_is_the_difference_of_two_likelihoods(judge, base):
    policy = moved(base)
    implicit, drift = judge.probe.implicit(policy)
    with torch.no_grad():
        gap = [
            toy.likelihood().terms(policy, b) - toy.likelihood().terms(base, b) for b in judge.probe.batches
        ]
    assert torch.allclose(implicit.flatten(), torch.cat(gap).sum(-1), atol=1e-5)
    assert drift > 0


def test_training_counts_what_it_evaluates_and_leaves_the_base_alone(base, pool):
    before = toy.content_hash(base)
    two = [pool.pair(p) for p in pairs.bradley_terry(pool, temperature=0.1, seed=0)]
    steps, images = toy.QUICK.steps, toy.QUICK.images
    dpo = [toy.align(base, two, "dpo", toy.QUICK, seed=0, lr=1e-4, beta=500.0) for _ in range(2)]
    assert dpo[0].losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo[0].losses == dpo[1].losses
    assert dpo[0].evaluations == 2 * steps * images
    sft = toy.align(base, [pool.single((0, 1))] * 16, "sft", toy.QUICK, seed=0, lr=1e-4)
    assert sft.evaluations == steps * images
    assert toy.content_hash(base) == before
    assert toy.content_hash(dpo[0].policy) != before


def test_labels_follow_bradley_terry():
    score = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64).expand(4000, 2)
    found = pairs.preferred([(i, 0, 1) for i in range(4000)], score, seed=0)
    assert sum(first for _, first, _ in found) / 4000 == pytest.approx(0.75, abs=0.03)


def test_cold_labels_are_the_order_and_flipped_ones_its_opposite(pool):
    true = pairs.bradley_terry(pool, temperature=1e-6, seed=0)
    reward = pool.score("redness")
    assert pairs.accuracy(true, reward) == 1
    assert pairs.accuracy(pairs.flipped(true), reward) == 0
    warm = pairs.accuracy(pairs.bradley_terry(pool, temperature=1.0, seed=0), reward)
    assert 0.5 < warm < 1
    assert len(true) == 12 * 6


def test_a_scorer_sees_clean_pictures_in_the_order_of_the_candidates(pool):
    scorer = pairs.Scorer()
    taken = [pool.pair((3, 2, 0)), pool.pair((5, 1, 3))]
    batch = Collator(schedule=toy.schedule())(taken, [Draw(i, 0, i) for i in range(2)])
    found = pairs.ScoreLikelihood()(scorer, batch)
    own = scorer(torch.stack([pool.pictures[3, 2], pool.pictures[5, 1]]))
    assert torch.allclose(found.chosen.logp, own, atol=1e-6)


def test_a_scorer_learns_the_order_from_noisy_pairs(pool):
    said = pairs.scored(pool, num_pairs=72, num_steps=80, seed=0)
    assert float(toy.agreement(said, pool.score("redness")).mean()) > 0.75


def rows(**changed):
    """A seed in which every relation holds, with some quantities changed: {arm: {quantity: value}}."""
    at = {"base": 0.2, "random": 0.2, "true": 0.5, "flipped": 0.1, "noisy": 0.35, "near chance": 0.25}
    at |= {"weak scorer": 0.3, "good scorer": 0.48, "sft": 0.3, pairs.BEST: 0.3, "fast": 0.5}
    at |= {"true, beta 50": 0.7, "true, beta 5000": 0.3, "random, beta 50": 0.2, "random, beta 5000": 0.2}
    drift = {"true, beta 50": 0.4, "true": 0.05, "true, beta 5000": 0.01, "fast": 0.5}
    labels = {"true": 0.95, "good scorer": 0.93, "weak scorer": 0.6, "noisy": 0.75, "near chance": 0.55}
    found = {
        name: {
            "judged": value,
            "reward": value,
            "wins": value,
            "drift": drift.get(name, 0.02),
            "labels": labels.get(name, 0.5),
            "accuracy": 0.9,
            "first": math.log(2),
            "evaluations": 64.0,
            "diversity": 0.1,
        }
        for name, value in at.items()
    }
    for name, values in changed.items():
        found[name.replace("_", " ")] |= values
    return found


def verdicts(**changed):
    spread = [rows(**changed) for _ in range(3)]
    for index, seed in enumerate(spread):
        seed["true"]["reward"] += 1e-3 * index
    return [claim.holds for claim in pairs.claims_of(pairs.Results(spread), "a toy")]


def test_a_relation_that_fails_is_not_said_to_hold():
    assert verdicts() == [True] * 7
    assert verdicts(true={"first": 0.7})[0] is False
    assert verdicts(flipped={"judged": 0.3})[1] is None
    assert verdicts(true={"judged": 0.1}, flipped={"judged": 0.3})[1] is False
    assert verdicts(**{"true, beta 50": {"judged": 0.4}})[2] is None
    assert verdicts(noisy={"wins": 0.6})[3] is None
    assert verdicts(good_scorer={"judged": 0.25})[4] is False
    assert verdicts(sft={"judged": 0.6})[5] is False
    assert verdicts(fast={"accuracy": 0.5, "drift": 0.05})[6] is False


def test_the_order_of_arms_is_counted_seed_by_seed():
    first, second, third = torch.tensor([[3.0, 3.0, 3.0], [2.0, 1.0, 3.0], [1.0, 2.0, 1.0]])
    # Seed 2 rises at the second step, seed 3 has a tie at the first.
    assert pairs.falling([first, second, third]) == "falling in this order in 1 of 3 seeds"


def test_a_small_run_reports_every_claim_with_numbers_and_draws(tmp_path):
    outcome = pairs.run(seeds=1, quick=True, cache=tmp_path)
    assert [c.method for c in outcome.claims].count("Diffusion-DPO") == 6
    assert outcome.claims[0].holds
    for claim in outcome.claims:
        assert claim.family == "Diffusion"
        assert "arXiv" in claim.paper
        assert claim.command == "python -m triptych.scripts.experiments.diffusion_pairs"
        assert any(character.isdigit() for character in claim.result)
    figure = Figure(figsize=outcome.size)
    outcome.figure(figure)
    assert len(figure.axes) == 7


def test_the_command_hands_the_cache_to_the_run(monkeypatch, tmp_path, capsys):
    given = {}

    def run(**settings):
        given.update(settings)
        return pairs.Outcome(claims=[], figure=None, caption="", seconds=0.0)

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["x", "--cache", str(tmp_path), "--quick", "--seeds", "2"])
    try:
        toy.main("x", run, "Doc.")
    finally:
        torch.set_num_threads(threads)
    assert given == {"cache": tmp_path, "quick": True, "seeds": 2}
    assert capsys.readouterr().out
