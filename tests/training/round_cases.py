"""Rounds on a bandit with four arms a context: small enough to know what every part must do."""

from dataclasses import dataclass

import torch
from toy import cpu_accelerator

from triptych.modalities.tabular.policy import TabularPolicy
from triptych.modalities.tabular.port import Context, TabularPort
from triptych.modalities.tabular.sources import SOURCES
from triptych.objectives import Term, Terms, build
from triptych.training.config import OptimConfig, RunConfig
from triptych.training.fit import Hooks
from triptych.training.groups import Verdict
from triptych.training.logs import Progress
from triptych.training.loop import make_learner
from triptych.training.references import FrozenCopy
from triptych.training.rounds import Rounds, run_rounds
from triptych.training.shapes import SHAPES, shape_for
from triptych.training.stages import Keep, Part, Stage

REWARD = (0.0, 0.3, 0.6, 1.0)


@dataclass(frozen=True, slots=True)
class ByArm:
    """Reward of the first action."""

    gives = frozenset({"score"})
    needs = frozenset()

    def __call__(self, groups, live):
        return [Verdict(score=torch.tensor([REWARD[c.actions[0]] for c in g.candidates])) for g in groups]


@dataclass(frozen=True, slots=True)
class Remembering:
    """As ByArm, with a memory: it counts the groups that it saw, and its scores grow with them."""

    gives = frozenset({"score"})
    needs = frozenset({"ref"})
    remembers = True

    def __call__(self, groups, live):
        seen = live.memory.get("seen", torch.zeros(1))
        live.memory["seen"] = seen + len(groups)
        return [
            Verdict(score=v.score * (1 + float(seen)) + 0.01 * g.ref.sum(-1))
            for v, g in zip(ByArm()(groups, live), groups, strict=True)
        ]


def terms(name, *anchors, reference="frozen", **options):
    return Terms((Term(build(name, **options), 1.0, reference), *anchors))


def stage(objective, *, source="on", judge=None, shape=None, k=4, keep=None, anchors=(), **settings):
    shape = shape or shape_for(objective.main.objective, *(t.objective for t in objective.terms[1:]))
    part = Part(
        source=SOURCES.build(source, {"num_candidates": k}) if isinstance(source, str) else source,
        judge=ByArm() if judge is None else judge,
        shape=SHAPES.build(shape[0], shape[1]) if isinstance(shape, tuple) else shape,
        terms=objective,
    )
    values = {"name": "main", "num_rounds": 4, "num_contexts": 6} | settings
    return Stage(parts=(part, *anchors), keep=keep or Keep(), **values)


def policy(num_contexts=8, seed=0, *, critic=False):
    logits = torch.randn(num_contexts, 1, 4, generator=torch.Generator().manual_seed(seed)) * 0.3
    return TabularPolicy(logits, critic=critic)


def contexts(num=8):
    return [Context(key=f"c{i}", index=i) for i in range(num)]


def optim(**settings):
    values = {"lr": 0.1, "batch_size": 3, "micro_batch_size": 2, "schedule": "constant", "warmup": 0.0}
    return OptimConfig(**(values | settings))


def hooks(*, stop_after=None, stop_raises=None, reports=None, evaluate=None):
    calls = [0]

    def stop():
        calls[0] += 1
        if stop_raises is not None:
            raise stop_raises
        return stop_after is not None and calls[0] >= stop_after

    return Hooks(
        evaluate=evaluate,
        stop=stop,
        report=(reports if reports is not None else []).append,
        progress=lambda total, start: Progress(
            total, label="", stream=None, enabled=False, clock=lambda: 0.0, start=start
        ),
    )


def run(
    folder, stages, *, model=None, config=None, save_every=0, accelerator=None, port=None, **hook_options
):
    """The trained policy, the outcome and the last state of the rounds."""
    model = model or policy(critic=any(s.has_critic for s in stages))
    accelerator = accelerator or cpu_accelerator()
    frozen = FrozenCopy.of(model)
    learner = make_learner(model, config or optim(), accelerator)
    reference = model.conditionals().detach()
    rounds = Rounds(
        stages=stages,
        contexts=contexts(),
        port=port or TabularPort(num_actions=4, reference=reference),
        frozen=frozen,
    )
    outcome, state = run_rounds(
        rounds,
        learner,
        config or optim(),
        RunConfig(output_dir=str(folder), save_every=save_every),
        accelerator,
        identity={"who": "test"},
        hooks=hooks(**hook_options),
    )
    return model, outcome, state


def expected_reward(model):
    """E[R] over the policy and the contexts, exactly."""
    return float((model.conditionals().detach()[:, 0].exp() * torch.tensor(REWARD)).sum(-1).mean())
