"""The experiment on PAL: who the people are, what the judge knows, and that a quick run has every claim."""

import sys

import pytest
import torch

from triptych.scripts.experiments import persons_pal as pal


@pytest.fixture(scope="module")
def town():
    return pal.Town.of(2, pal.QUICK, seed=100)


def test_two_groups_want_the_opposite_tint_and_the_same_contrast(town):
    world = town.world
    torch.testing.assert_close(world.tints[:, 0], -world.tints[:, 1], rtol=0, atol=1e-5)
    pairs = world.pairs(50, torch.Generator().manual_seed(0))
    gap = world.gaps(pairs, torch.ones(50))
    a, b = pairs.unbind(1)
    torch.testing.assert_close(gap.mean(1), world.contrast[a] - world.contrast[b], rtol=0, atol=1e-5)
    # Two pictures of one prompt, and never one with itself.
    assert bool((a // world.each == b // world.each).all())
    assert bool((a != b).all())
    turned = world.gaps(pairs, -torch.ones(50))
    torch.testing.assert_close(turned, gap.flip(1), rtol=0, atol=1e-5)


def test_held_out_prompts_have_no_pair(town):
    first = len(pal.TRAINED) * town.world.each
    assert int(town.seen.pairs.max()) < first <= int(town.pairs.min())
    assert int(town.new.pairs.max()) < first


def test_the_judge_knows_the_truth(town):
    """A group's own gaps are right everywhere; the other group's are wrong where they disagree."""
    world = town.world

    def of_group(g):
        return lambda u, pictures: world.tints[pictures, (u + g) % 2] + world.contrast[pictures]

    assert town.judge(of_group(0), 4) == {"all": 1.0, "divided": 1.0}
    assert town.judge(of_group(1), 4)["divided"] == 0.0
    flat = town.judge(lambda u, pictures: torch.zeros(len(pictures)), 4)
    assert flat == {"all": 0.5, "divided": 0.5}


def test_a_quick_run_has_every_claim_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["persons_pal"])
    outcome = pal.run(seeds=2, quick=True)
    assert [c.method for c in outcome.claims] == ["PAL", "PAL", "PAL, control", "PAL", "PAL-B"]
    assert "2 numbers a person" in outcome.claims[3].result
    # One reward for opposite groups is right for one where it is wrong for the other.
    assert "divided pairs 0.500 [0.500, 0.500]" in outcome.claims[1].result
    from matplotlib.figure import Figure

    figure = Figure(figsize=outcome.size)
    outcome.figure(figure)
    assert len(figure.axes) == 3
