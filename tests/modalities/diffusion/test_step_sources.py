"""Denoising paths as they are drawn: shared states, log-densities, predictions used twice, segments."""

from itertools import pairwise

import pytest
import torch
from test_step_port import Toy, port

from triptych.modalities.diffusion.latents import ImagePrompt, Latents
from triptych.modalities.diffusion.step_sources import DenoisingPaths, StepSiblings
from triptych.modalities.diffusion.transitions import ddim_grid
from triptych.training.groups import Verdict
from triptych.training.stages import Live

PROMPTS = [ImagePrompt(key="a", text="a cat"), ImagePrompt(key="b", text="a dog")]


def live(seed: int = 0) -> Live:
    return Live(policy=Toy(), port=port(), references={}, device=torch.device("cpu"), seed=seed)


def recomputed(group, at: Live) -> torch.Tensor:
    batch = at.port.collate([(group.context, group.candidates)], [0])
    return at.port.terms(at.policy, batch).detach()


class Clean:
    """Scores the mean of what a candidate would become."""

    gives, needs = frozenset({"score"}), frozenset()

    def __call__(self, groups, live):
        return [Verdict(score=torch.stack([c.clean.mean() for c in g.candidates])) for g in groups]


@pytest.mark.parametrize(
    "source",
    [
        StepSiblings(num_steps=5, first_step=1, num_candidates=3),
        StepSiblings(num_steps=5, first_step=1, num_candidates=2, segment=2),
        DenoisingPaths(num_steps=5, num_candidates=3, last_step=4),
        DenoisingPaths(num_steps=5, num_candidates=2, shared_noise=True),
        DenoisingPaths(num_steps=5, num_candidates=2, first_step=1, split=True),
    ],
)
def test_the_log_densities_of_drawing_are_those_of_training(source):
    at = live()
    groups = source(PROMPTS, at)
    assert len(groups) == source.groups_per_context * 2
    for group in groups:
        torch.testing.assert_close(recomputed(group, at), group.logp, rtol=0, atol=2e-6)


def test_siblings_cost_one_evaluation_a_state_and_the_chosen_one_no_second():
    at = live()
    StepSiblings(num_steps=5, first_step=2, num_candidates=4)(PROMPTS, at)
    # Two prompts: 2 steps before, the first state with siblings, then 4 siblings where they stand; the last
    # ones are pictures.
    assert at.policy.rows == 2 * (2 + 1 + 4 + 4)


def test_a_path_goes_on_from_one_of_its_siblings_and_the_first_is_not_always_taken():
    taken = []
    for seed in range(6):
        groups = StepSiblings(num_steps=5, first_step=0, num_candidates=3)(PROMPTS[:1], live(seed))
        assert [g.depth for g in groups] == [0, 1, 2, 3, 4]
        for before, after in pairwise(groups):
            same = [torch.equal(after.context.states, c.states) for c in before.candidates]
            assert sum(same) == 1
            taken.append(same.index(True))
    assert set(taken) == {0, 1, 2}


@pytest.mark.parametrize(("choose", "pick"), [("best", max), ("worst", min)])
def test_a_path_may_go_on_from_the_best_or_worst(choose, pick):
    source = StepSiblings(num_steps=5, first_step=0, num_candidates=3, choose=choose, judge=Clean())
    groups = source(PROMPTS, live())
    for before, after in pairwise(groups[:5]):
        best = pick(before.candidates, key=lambda c: float(c.clean.mean()))
        assert torch.equal(after.context.states, best.states)


def test_what_is_judged_is_x_0_as_the_next_step_sees_it_and_the_picture_at_the_end():
    at = live()
    groups = StepSiblings(num_steps=5, first_step=3, num_candidates=2)(PROMPTS, at)
    schedule, grid = at.port.likelihood.schedule, at.port.grid
    for c in groups[0].candidates:
        time = grid.times[4].float()
        expected = schedule.clean_and_noise(0.3 * c.states, c.states, time[None])[0][0].detach()
        torch.testing.assert_close(c.clean, expected)
        assert c.clean_step == 4
    for c in groups[1].candidates:
        assert torch.equal(c.clean, c.states[-1])
        assert c.clean_step == 5


def test_the_steps_of_a_segment_are_one_path_under_one_label():
    groups = StepSiblings(num_steps=5, first_step=1, num_candidates=2, segment=2)(PROMPTS[:1], live())
    first, second = groups[:2]
    assert isinstance(first.context, Latents)
    assert isinstance(second.context, ImagePrompt)
    for a, b in zip(first.candidates, second.candidates, strict=True):
        assert torch.equal(a.states[0], b.states[0])
        assert torch.equal(a.clean, b.clean)
        assert (a.step, b.step, b.end, a.clean_step, b.clean_step) == (2, 2, 3, 3, 3)
    third = groups[2].context
    assert any(torch.equal(third.states[0], c.states[-1]) for c in second.candidates)


def test_a_path_does_not_depend_on_the_prompts_beside_it_nor_on_the_batch():
    for make in (
        lambda n: StepSiblings(num_steps=5, first_step=1, num_candidates=2, batch_size=n),
        lambda n: DenoisingPaths(num_steps=5, num_candidates=2, batch_size=n),
    ):
        both, alone = make(1)(PROMPTS, live()), make(8)(PROMPTS[1:], live())
        for a, b in zip(both[len(alone) :], alone, strict=True):
            for c, d in zip(a.candidates, b.candidates, strict=True):
                torch.testing.assert_close(c.states, d.states)


def test_paths_start_apart_or_together():
    for shared in (False, True):
        source = DenoisingPaths(num_steps=5, num_candidates=3, shared_noise=shared)
        (group, _) = source(PROMPTS, live())
        starts = torch.stack([c.states[0] for c in group.candidates])
        assert (len(starts.unique(dim=0)) == 1) == shared
        assert len(torch.stack([c.clean for c in group.candidates]).unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepSiblings(num_candidates=1), "num_candidates=1"),
        (lambda: StepSiblings(first_step=20), "stretch of the sampler's 20 steps"),
        (lambda: StepSiblings(first_step=4, segment=5), "segment=5 does not divide the 16"),
        (lambda: StepSiblings(choose="best"), "a judge goes with"),
        (lambda: DenoisingPaths(last_step=21), "stretch"),
        (lambda: DenoisingPaths(num_candidates=0), "num_candidates=0"),
        (lambda: DenoisingPaths()(PROMPTS, live()), "num_steps=20, but the sampler has 5"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_paths_split_into_steps_are_the_same_paths_and_judged_by_the_same_picture():
    whole = DenoisingPaths(num_steps=5, num_candidates=3, first_step=1, last_step=4)(PROMPTS, live())
    split = DenoisingPaths(num_steps=5, num_candidates=3, first_step=1, last_step=4, split=True)(
        PROMPTS, live()
    )
    assert [g.depth for g in split] == [1, 2, 3] * 2
    for i, group in enumerate(whole):
        parts = split[3 * i : 3 * i + 3]
        torch.testing.assert_close(torch.cat([p.logp for p in parts], 1), group.logp, rtol=0, atol=0)
        for k, candidate in enumerate(group.candidates):
            for step, part in enumerate(parts):
                assert torch.equal(part.candidates[k].states, candidate.states[step : step + 2])
                # Judges know a picture again by its memory.
                assert part.candidates[k].clean.data_ptr() == parts[0].candidates[k].clean.data_ptr()


def test_a_step_without_noise_is_named():
    at = live()
    at.port = port(grid=ddim_grid(5, num_times=100, spacing="leading"))
    with pytest.raises(ValueError, match="step 4 of 5 has no noise"):
        DenoisingPaths(num_steps=5)(PROMPTS, at)
    assert len(DenoisingPaths(num_steps=5, last_step=4)(PROMPTS, at)) == 2
