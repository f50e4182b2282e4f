"""Denoising and recommendation through the plug points and the loop of all rounds: no loop of their own."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from round_cases import hooks, optim, terms
from stand_ins import (
    Beams,
    Denoiser,
    DenoisingPort,
    DenoisingTree,
    Latents,
    Near,
    Recommender,
    Request,
    Seen,
    Session,
    SessionPort,
    Trajectories,
    Utility,
)
from toy import cpu_accelerator

from triptych.objectives import build, with_reference
from triptych.training.assembly import RoundLikelihood, SampleCollator, fold
from triptych.training.config import RunConfig
from triptych.training.group_state import pack_groups, unpack_groups
from triptych.training.loop import make_learner
from triptych.training.references import FrozenCopy
from triptych.training.rounds import Rounds, run_rounds
from triptych.training.shapes import SHAPES, shape_for
from triptych.training.stages import Keep, Live, Part, Stage

STEPS, DIM, TARGET = 4, 2, (1.0, -0.5)
NEAR = Near(TARGET)
WORTH = ((1.0, 0.0, 0.3), (0.0, 1.0, 0.3), (0.3, 0.0, 1.0), (0.1, 0.9, 0.4))


def noises(num=12):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num, DIM, generator=generator).tolist()
    return [Latents(f"n{i}", 0, (tuple(x),)) for i, x in enumerate(states)]


def requests():
    """Users, and sessions that they had of what they like second best."""
    second = [sorted(range(3), key=lambda c: -worth[c])[1] for worth in WORTH]
    return [Request(f"u{i}", i, (code,) * 4) for i, code in enumerate(second)]


def recommender():
    policy = Recommender(len(WORTH), 4, 3)
    with torch.no_grad():
        policy.table.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return policy


def live(policy, port):
    return Live(policy=policy, port=port, references={}, device=torch.device("cpu"), seed=1)


def judged(source, judge, contexts, policy, port):
    now = live(policy, port)
    groups = source(contexts, now)
    if judge is None:
        return groups
    return [replace(g, verdict=v) for g, v in zip(groups, judge(groups, now), strict=True)]


def losses(objective, shape, groups, policy, port, *, reference=None):
    """The objective on the samples of the shape, [B], with the samples."""
    samples = shape(groups, seed=0)
    batch = SampleCollator(port, groups)(samples)
    likelihood = RoundLikelihood(port)
    x = likelihood(policy, batch)
    if reference is not None:
        x = with_reference(x, likelihood.assemble(reference(likelihood, policy, batch), batch))
    return fold(objective(x), batch), samples


def stage(source, judge, shape, objective, *, anchors=(), keep=None, **settings):
    part = Part(source=source, judge=judge, shape=shape, terms=objective)
    values = {"name": "main", "num_rounds": 1, "num_contexts": 8} | settings
    return Stage(parts=(part, *anchors), keep=keep or Keep(), **values)


def run(folder, stages, policy, contexts, port, **settings):
    accelerator, config = cpu_accelerator(), optim(batch_size=4, micro_batch_size=4, **settings)
    frozen = FrozenCopy.of(policy)
    outcome, _ = run_rounds(
        Rounds(stages=stages, contexts=contexts, port=port, frozen=frozen),
        make_learner(policy, config, accelerator),
        config,
        RunConfig(output_dir=str(folder)),
        accelerator,
        identity={},
        hooks=hooks(),
    )
    assert outcome.finished
    return policy


def test_step_log_probs_are_gaussian_means_over_dimensions():
    policy, port = Denoiser(STEPS, DIM), DenoisingPort()
    group = Trajectories(num_steps=STEPS, num_candidates=3)(noises(1), live(policy, port))[0]
    path = [group.context.states[-1], *group.candidates[1].states]
    for t in range(STEPS):
        normal = torch.distributions.Normal(torch.tensor(path[t]), policy.std[t])
        expected = normal.log_prob(torch.tensor(path[t + 1])).mean()
        assert group.logp[1, t].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_denoising_tree_shares_each_state_and_keeps_the_log_prob_of_each_step():
    policy, port = Denoiser(STEPS, DIM), DenoisingPort()
    groups = DenoisingTree(num_steps=STEPS, num_candidates=3, first_step=1)(noises(2), live(policy, port))
    assert [(g.key, g.depth, g.context.step) for g in groups] == [
        (key, t, t) for key in ("n0", "n1") for t in (1, 2, 3)
    ]
    for before, after in pairwise(groups):
        assert after.depth == 1 or after.context in before.candidates
    for group in groups:
        batch = port.collate([(group.context, group.candidates)], [0])
        torch.testing.assert_close(port.terms(policy, batch).detach(), group.logp)
        assert group.logp.shape == (3, 1)
    chosen = [g.candidates.index(n.context) for g, n in pairwise(groups) if n.depth > 1]
    assert len(set(chosen)) > 1


def test_step_aware_spo_has_the_gradient_worked_by_hand():
    # At the reference the loss is log 2, and its gradient -beta / 2 of (x_w - x_l) / (D var_t).
    policy, port = Denoiser(STEPS, DIM), DenoisingPort()
    groups = judged(DenoisingTree(num_steps=STEPS), NEAR, noises(3), policy, port)
    shape = SHAPES.build("pairs", {"label": "hard", "min_margin": 2.0})
    objective = build("spo_step", beta=10.0, clip=0.1)
    loss, samples = losses(objective, shape, groups, policy, port, reference=FrozenCopy.of(policy))
    assert 0 < len(samples) < len(groups)
    torch.testing.assert_close(loss, torch.full((len(samples),), math.log(2)))
    loss.sum().backward()
    expected = torch.zeros(STEPS, DIM)
    for s in samples:
        group = groups[s.group]
        better, worse = (torch.tensor(group.candidates[c].states[-1]) for c in s.candidates)
        scores = group.verdict.score[list(s.candidates)]
        assert scores[0] - scores[1] >= 2.0
        assert scores[0] == group.verdict.score.max()
        expected[group.depth] -= 5 * (better - worse) / (DIM * policy.std[group.depth] ** 2)
    torch.testing.assert_close(policy.drift.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("ddpo", {}), ("grpo", {"clip": 1e-4})])
def test_policy_gradients_on_denoising_steps_have_the_gradient_worked_by_hand(name, options):
    # With old = policy every ratio is 1: -A_i / T sum_t of (x_{t+1} - x_t) / (D var_t), mean over candidates.
    policy, port = Denoiser(STEPS, DIM), DenoisingPort()
    groups = judged(Trajectories(num_steps=STEPS, num_candidates=5), NEAR, noises(1), policy, port)
    objective = build(name, **options)
    loss, _ = losses(objective, shape_for(objective), groups, policy, port)
    loss.sum().backward()
    score = groups[0].verdict.score
    advantage = (score - score.mean()) / (score.std() + 1e-4)
    expected = torch.zeros(STEPS, DIM)
    for a, candidate in zip(advantage, groups[0].candidates, strict=True):
        path = torch.tensor([groups[0].context.states[-1], *candidate.states])
        expected -= a / (5 * STEPS) * (path[1:] - path[:-1]) / (DIM * policy.std.unsqueeze(1) ** 2)
    torch.testing.assert_close(policy.drift.grad, expected, rtol=1e-3, atol=1e-4)


def distance(policy):
    """E |x_T - target|^2 over the noises, less what the noise of the steps adds: exact."""
    ends = torch.tensor([n.states[-1] for n in noises()]) + policy.drift.detach().sum(0)
    return (ends - torch.tensor(TARGET)).square().sum(-1).mean().item()


DENOISING = {
    "step-aware SPO": (
        DenoisingTree(num_steps=STEPS, num_candidates=4, first_step=1),
        ("pairs", {"label": "hard", "min_margin": 0.1}),
        terms("spo_step", beta=10.0, clip=0.1),
    ),
    "DDPO": (Trajectories(num_steps=STEPS, num_candidates=6), None, terms("ddpo")),
    "Flow-GRPO": (Trajectories(num_steps=STEPS, num_candidates=6), None, terms("grpo", clip=0.2)),
}


@pytest.mark.parametrize("method", DENOISING)
def test_one_round_of_denoising_comes_nearer_to_the_reward(method, tmp_path):
    source, shape, objective = DENOISING[method]
    made = shape_for(objective.main.objective) if shape is None else SHAPES.build(*shape)
    policy, before = Denoiser(STEPS, DIM), distance(Denoiser(STEPS, DIM))
    run(
        tmp_path,
        [stage(source, NEAR, made, objective, modality="diffusion")],
        policy,
        noises(),
        DenoisingPort(),
        lr=0.1,
    )
    assert distance(policy) < before - 0.1
    assert policy.drift.detach()[1:].abs().min() > 0
    # Before the first step with siblings there is nothing to compare, so nothing is learnt.
    assert bool(policy.drift.detach()[0].any()) == (method != "step-aware SPO")


def rm_stage(*, anchored, **settings):
    anchor = Part(
        source=Seen(),
        judge=None,
        shape=shape_for(build("sft")),
        terms=terms("sft", reference="none"),
        weight=0.25,
        name="sft",
    )
    return stage(
        Beams(num_candidates=6),
        Utility(WORTH),
        SHAPES.build("pairs", {"which": "best_worst"}),
        terms("dpo", beta=0.1, reference="stage"),
        anchors=(anchor,) if anchored else (),
        keep=Keep(stage="each_round"),
        num_contexts=4,
        modality="recsys",
        **settings,
    )


def test_beams_are_the_likeliest_sessions():
    policy, port = recommender(), SessionPort()
    every = [Session((a, b, c, d)) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    request = requests()[2]
    logp = port.terms(policy, port.collate([(request, every)], [0])).sum(-1)
    found = policy.beams(2, 81)
    assert [Session(codes) for codes, _ in found] == [every[i] for i in logp.argsort(descending=True)]
    assert [p for _, p in found] == pytest.approx(logp.sort(descending=True).values.tolist(), abs=1e-5)
    group = Beams(num_candidates=6)([request], live(policy, port))[0]
    assert group.logp is None
    assert (group.unit, group.origin) == ("slot", ("beam",) * 6)
    assert group.mask.shape == (6, 4)


def test_dpo_on_beams_has_the_loss_worked_by_hand():
    policy, port = recommender(), SessionPort()
    groups = judged(Beams(num_candidates=6), Utility(WORTH), requests(), policy, port)
    reference = recommender()
    with torch.no_grad():
        reference.table.mul_(0.5)
    shape = SHAPES.build("pairs", {})
    loss, samples = losses(
        build("dpo", beta=0.1), shape, groups, policy, port, reference=FrozenCopy(reference)
    )
    assert len(samples) == 4
    for value, s in zip(loss, samples, strict=True):
        group = groups[s.group]
        best, worst = int(group.verdict.score.argmax()), int(group.verdict.score.argmin())
        assert s.candidates == (best, worst)
        batch = port.collate([(group.context, [group.candidates[best], group.candidates[worst]])], [0])
        ratio = (port.terms(policy, batch) - port.terms(reference, batch)).sum(-1)
        expected = -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1]))
        torch.testing.assert_close(value, expected)


def served(policy):
    """Mean worth of the session that each user would be served."""
    return sum(sum(WORTH[u][c] for c in policy.beams(u, 6)[0][0]) for u in range(len(WORTH))) / len(WORTH)


def seen_loss(policy):
    items = [(r, [Session(r.seen)]) for r in requests()]
    port = SessionPort()
    return -port.terms(policy, port.collate(items, [0])).sum().item()


def test_ipa_raises_the_worth_of_what_is_served_and_its_anchor_keeps_what_was_seen(tmp_path):
    start = recommender()
    with torch.no_grad():
        for r in requests():
            for place, code in enumerate(r.seen):
                start.table[r.user, place, :, code] += 1.0
    trained = {}
    for anchored in (False, True):
        policy = recommender()
        policy.load_state_dict(start.state_dict())
        stages = [rm_stage(anchored=anchored, num_rounds=30)]
        trained[anchored] = run(tmp_path / str(anchored), stages, policy, requests(), SessionPort(), lr=0.1)
    assert served(trained[True]) > served(start) + 0.5
    assert seen_loss(trained[True]) < seen_loss(start) + 0.1
    assert seen_loss(trained[False]) > seen_loss(start) + 10


def test_a_policy_gradient_on_beams_is_refused_with_the_reason():
    objective = terms("grpo", clip=0.2)
    shape = shape_for(objective.main.objective)
    with pytest.raises(
        ValueError, match=r"grpo needs fresh samples .* Beams gives none: beams and data are no"
    ):
        stage(Beams(), Utility(WORTH), shape, objective)


def test_a_policy_gradient_on_a_bound_is_refused_with_the_reason():
    source, _, objective = DENOISING["DDPO"]
    shape = shape_for(objective.main.objective)
    with pytest.raises(ValueError, match="'ddpo' needs exact log-probs of samples, and an ELBO is a bound"):
        stage(source, NEAR, shape, objective, bound=True)
    exact = stage(source, NEAR, shape, objective)
    with pytest.raises(ValueError, match="stage main: bound=False, the likelihood's is True"):
        Rounds(
            stages=[exact],
            contexts=noises(),
            port=DenoisingPort(bound=True),
            frozen=FrozenCopy.of(Denoiser(STEPS, DIM)),
        )


def test_an_objective_for_images_is_refused_for_sessions():
    source, _, objective = DENOISING["DDPO"]
    with pytest.raises(ValueError, match="'ddpo' is valid for diffusion, not for recsys"):
        stage(source, NEAR, shape_for(objective.main.objective), objective, modality="recsys")


@pytest.mark.parametrize("modality", ["denoising", "sessions"])
def test_groups_of_every_modality_survive_a_checkpoint(modality):
    if modality == "denoising":
        port = DenoisingPort()
        groups = judged(DenoisingTree(num_steps=2), NEAR, noises(2), Denoiser(STEPS, DIM), port)
    else:
        port = SessionPort()
        groups = judged(Beams(), Utility(WORTH), requests(), recommender(), port)
    tensors, packed = pack_groups(groups, port, "g")
    for one, other in zip(groups, unpack_groups(tensors, packed, port), strict=True):
        assert one.context == other.context
        assert one.candidates == other.candidates
        assert [port.key(one.context, c) for c in one.candidates] == [
            port.key(other.context, c) for c in other.candidates
        ]
        assert torch.equal(one.verdict.score, other.verdict.score)
        assert (one.depth, one.unit, one.origin) == (other.depth, other.unit, other.origin)
