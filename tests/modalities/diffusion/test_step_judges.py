"""Judges of denoising paths: what is decoded, how often, and at which time it is seen."""

import math

import pytest
import torch
from test_step_port import Toy, latents, port

from triptych.modalities.diffusion.latents import ImagePrompt
from triptych.modalities.diffusion.step_judges import JUDGES, StepMargin, margins_of
from triptych.modalities.diffusion.step_sources import DenoisingPaths, StepSiblings
from triptych.training.groups import Verdict
from triptych.training.judging import build_judge
from triptych.training.pair_shapes import Pairs
from triptych.training.stages import Live

PROMPTS = [ImagePrompt(key="a", text="a cat"), ImagePrompt(key="b", text="a dog")]


class Decoder:
    """The first channel as grey pictures; counts its calls and pictures."""

    def __init__(self):
        self.calls = []

    def __call__(self, states):
        self.calls.append(len(states))
        return states[:, :1].expand(-1, 3, -1, -1)


def live(**changes) -> Live:
    changed = port(**{"decode": Decoder()} | changes)
    return Live(policy=Toy(), port=changed, references={}, device=torch.device("cpu"), seed=0)


def pictures(**options):
    scorers = {"light": {"scorer": "measure", "options": {"measure": "brightness"}}}
    return build_judge({"name": "pictures", "options": {"scorers": scorers} | options}, JUDGES)


def brightness(clean):
    levels = ((clean[0] / 2 + 0.5).clamp(0, 1) * 255).round() / 255
    return float(levels.mean())


def test_the_score_of_a_candidate_is_that_of_its_decoded_x_0():
    at = live()
    groups = StepSiblings(num_steps=5, first_step=3, num_candidates=3)(PROMPTS, at)
    for group, verdict in zip(groups, pictures()(groups, at), strict=True):
        expected = [brightness(c.clean) for c in group.candidates]
        assert verdict.score.tolist() == pytest.approx(expected, abs=1e-6)
    assert at.metrics["score/light"] == pytest.approx(
        sum(brightness(c.clean) for g in groups for c in g.candidates) / 12, abs=1e-6
    )


@pytest.mark.parametrize(
    ("source", "distinct"),
    [
        (StepSiblings(num_steps=5, first_step=1, num_candidates=2), 2 * 4 * 2),
        # Two steps of a segment bear one label: their pictures are decoded once.
        (StepSiblings(num_steps=5, first_step=1, num_candidates=2, segment=2), 2 * 2 * 2),
        (DenoisingPaths(num_steps=5, num_candidates=3, split=True), 2 * 3),
    ],
)
def test_pictures_are_decoded_once_and_in_batches(source, distinct):
    at = live()
    groups = source(PROMPTS, at)
    pictures(batch_size=5)(groups, at)
    assert sum(at.port.decode.calls) == distinct
    assert len(at.port.decode.calls) == math.ceil(distinct / 5)


def test_several_scorers_vote_on_pictures_decoded_once():
    at = live()

    def first(images, prompts):
        return torch.arange(len(images)).float()

    groups = DenoisingPaths(num_steps=5, num_candidates=3)(PROMPTS[:1], at)
    scorers = {"first": first, "again": first, "last": lambda images, prompts: -first(images, prompts)}
    judge = build_judge({"name": "pictures", "options": {"scorers": scorers, "how": "vote"}}, JUDGES)
    (verdict,) = judge(groups, at)
    # The third picture wins 2 of 2 rivals with two scorers of three: phi = 4 / 6.
    assert verdict.score.tolist() == pytest.approx([2 / 6, 3 / 6, 4 / 6])
    assert verdict.users.tolist() == [[0, 0, 0], [1, 1, -1], [2, 2, -2]]
    assert at.port.decode.calls == [3]


def test_a_step_reward_is_told_the_time_that_sees_the_picture_and_0_at_the_end():
    at, told = live(), []

    def reward(x, texts, times, conditions, empty):
        told.append((tuple(x.shape), list(texts), times.tolist(), conditions.embeds[:, 0, 0].tolist()))
        return x.mean((1, 2, 3))

    groups = StepSiblings(num_steps=5, first_step=3, num_candidates=2)(PROMPTS, at)
    judge = build_judge({"name": "step_scores", "options": {"reward": reward, "batch_size": 4}}, JUDGES)
    verdicts = judge(groups, at)
    last = float(at.port.grid.times[4])
    assert [t for _, _, t, _ in told] == [[last, last, 0.0, 0.0]] * 2
    assert told[1][1] == ["a dog"] * 4
    assert told[1][3] == [1.0] * 4
    assert told[0][0] == (4, 3, 3, 3)
    for group, verdict in zip(groups, verdicts, strict=True):
        assert verdict.score.tolist() == pytest.approx([float(c.clean[0].mean()) for c in group.candidates])


def test_a_latent_reward_sees_the_last_state_at_its_own_time_and_nothing_is_decoded():
    at, told = live(), []

    def reward(x, texts, times, conditions, empty):
        told.append(times.tolist())
        return x.mean((1, 2, 3))

    groups = StepSiblings(num_steps=5, first_step=2, num_candidates=2, segment=3)(PROMPTS[:1], at)
    judge = build_judge({"name": "latent_scores", "options": {"reward": reward}}, JUDGES)
    verdicts = judge(groups, at)
    third, fourth = (float(at.port.grid.times[i]) for i in (3, 4))
    assert told == [[third, third, fourth, fourth, 0.0, 0.0]]
    assert at.port.decode.calls == []
    for group, verdict in zip(groups, verdicts, strict=True):
        assert verdict.score.tolist() == pytest.approx([float(c.states[-1].mean()) for c in group.candidates])


def test_a_margin_by_step_keeps_the_pairs_whose_softmax_differs_by_the_steps_bar():
    at = live()
    groups = StepSiblings(num_steps=5, first_step=0, num_candidates=2)(PROMPTS[:1], at)

    class Gaps:
        """The second candidate of each step is better by as much."""

        gives, needs = frozenset({"score"}), frozenset()

        def __init__(self, gaps):
            self.gaps = gaps

        def __call__(self, groups, live):
            return [Verdict(score=torch.tensor([0.0, self.gaps[g.depth]])) for g in groups]

    def kept(gaps):
        judge = StepMargin(of=Gaps(gaps), low=0.35, high=0.5)
        judged = [
            type(g)(**{n: getattr(g, n) for n in g.__slots__} | {"verdict": v})
            for g, v in zip(groups, judge(groups, at), strict=True)
        ]
        return [s.group for s in Pairs(min_margin=1.0)(judged, seed=0)]

    likelihood, grid = at.port.likelihood, at.port.grid
    std = likelihood.rule(likelihood.schedule, grid.times, grid.next_times).std
    assert std.argmax() == 0
    assert std.argmin() == 4
    bar = 0.35 + 0.15 * (std - std.min()) / (std.max() - std.min())
    for i in range(5):
        # softmax([g, 0]) differs by tanh(g / 2).
        just = 2 * math.atanh(float(bar[i]))
        gaps = [0.0] * 5
        gaps[i] = just + 1e-3
        assert kept(gaps) == [i]
        gaps[i] = just - 1e-3
        assert kept(gaps) == []
    assert float(margins_of(at.port, low=0.3, high=0.3)[2]) == pytest.approx(0.619, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": {}}, "at least one image scorer"),
        ({"scorers": {"x": {"scorer": "mesure"}}}, "Did you mean 'measure'"),
        ({"scorers": {"x": {"kind": "clip"}}}, r"scorers.x must be \{scorer, options\}"),
        ({"how": "most"}, "how='most'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_is_no_scorer_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        pictures(**options)


def test_judges_say_what_they_lack():
    at = live(decode=None)
    groups = DenoisingPaths(num_steps=5, num_candidates=2)(PROMPTS[:1], at)
    with pytest.raises(ValueError, match="no decoder"):
        pictures()(groups, at)
    group = type(groups[0])(
        **{n: getattr(groups[0], n) for n in groups[0].__slots__}
        | {"candidates": (latents(2), latents(2, seed=1)), "logp": None, "mask": torch.ones(2, 1).bool()}
    )
    with pytest.raises(ValueError, match="no x_0 to look at"):
        pictures()([group], live())
    bad = build_judge(
        {"name": "latent_scores", "options": {"reward": lambda *a: torch.tensor([math.nan] * 2)}}, JUDGES
    )
    with pytest.raises(ValueError, match="not finite"):
        bad(groups, at)
