"""Ways to learn from denoising steps in the rounds, at equal UNet evaluations: SPO, D3PO and DDPO on the toy.

Learning rates are those at which an arm moves the model by DRIFT on training prompts with seed 100, which is
reported nowhere: a reward that is gained by moving further says nothing of the labels.

Shapes: K candidates of a group, Z = 3 channels, H = W = 16.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from triptych.modalities.diffusion.latents import ImagePrompt
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.step_sources import DenoisingPaths, Path, StepSiblings
from triptych.scripts.experiments.step_aware_toy import (
    DETAIL,
    REWARDS,
    TRAINED,
    Measure,
    Reward,
    Sizes,
    port,
    prompts_of,
)
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.fit import Hooks
from triptych.training.groups import Group, Verdict
from triptych.training.logs import Progress
from triptych.training.loop import make_learner
from triptych.training.order import key
from triptych.training.references import FrozenCopy
from triptych.training.rounds import Rounds, run_rounds
from triptych.training.shapes import SHAPES
from triptych.training.stages import Judge, Keep, Live, Part, Shape, Source, Stage

MANY_ROUNDS = 500
SIBLINGS = 4
BETA, CLIP = 10.0, 0.1
MARGIN = 0.1
DRIFT = 0.005
RATES = {
    ("step-wise", "detail"): 1.2e-5,
    ("step-wise", "layout"): 4e-5,
    ("d3po", "detail"): 3.6e-5,
    ("d3po", "layout"): 6.8e-5,
    ("ddpo", "detail"): 2.7e-5,
    ("ddpo", "layout"): 4.3e-5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Scores x_0 as the candidate has it by a measure, in units of `scale`."""

    measure: Measure
    scale: float

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group."""
        scores = self.measure(torch.stack([c.clean for g in groups for c in g.candidates])) / self.scale
        return [Verdict(score=s.float()) for s in scores.split([g.size for g in groups])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """Scores from N(0, 1) whatever the candidate is."""

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group."""
        return [
            Verdict(score=torch.randn(g.size, generator=live.generator("chance", g.key, g.depth)))
            for g in groups
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSteps:
    """The steps of whole paths, a group each, all under the label of the finished picture.

    D3PO (Yang et al. 2024, arXiv 2311.13231): the same step of two paths is compared by where they end.
    """

    paths: DenoisingPaths

    fresh = True
    provides = frozenset({"logp"})

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.paths.num_candidates

    @property
    def groups_per_context(self) -> int:
        """Steps that are trained on."""
        last = self.paths.num_steps if self.paths.last_step is None else self.paths.last_step
        return last - self.paths.first_step

    def __call__(self, contexts: Sequence[ImagePrompt], live: Live) -> list[Group]:
        """The groups of all paths, those of one prompt after each other."""
        first = self.paths.first_step
        return [
            replace(
                g,
                candidates=tuple(
                    replace(c, step=first + i, states=c.states[i : i + 2]) for c in g.candidates
                ),
                mask=g.mask[:, i : i + 1],
                logp=None if g.logp is None else g.logp[:, i : i + 1],
                depth=first + i,
            )
            for g in self.paths(contexts, live)
            for i in range(g.mask.shape[1])
        ]


@dataclass(slots=True)
class Rows:
    """UNet evaluations in rows: of the policy without and with gradient, and of the reference."""

    sampling: int = 0
    training: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.sampling + self.training + self.reference


@contextmanager
def counted(policy: nn.Module, reference: nn.Module) -> Iterator[Rows]:
    """Count the rows that the two are evaluated on inside."""
    rows = Rows()

    def of_policy(module: nn.Module, args: Any, output: Any) -> None:
        num = sum(map(len, args[0]))
        if torch.is_grad_enabled():
            rows.training += num
        else:
            rows.sampling += num

    def of_reference(module: nn.Module, args: Any, output: Any) -> None:
        rows.reference += sum(map(len, args[0]))

    handles = [policy.register_forward_hook(of_policy), reference.register_forward_hook(of_reference)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to learn. num_contexts: prompts of a round. batch_size: samples of an optimizer step."""

    source: Source
    judge: Judge
    shape: Shape
    objective: ObjectiveConfig
    lr: float
    num_contexts: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A policy and what it cost: rows of the UNets, optimizer steps."""

    policy: Denoiser
    rows: Rows
    num_steps: int


def learn(base: Denoiser, arm: Arm, sizes: Sizes, *, seed: int) -> Learnt:
    """A copy of the base after rounds of this arm, which end with the first step past the budget."""
    policy = deepcopy(base).requires_grad_(True)
    frozen = FrozenCopy.of(base)
    optim = OptimConfig(
        lr=arm.lr, batch_size=arm.batch_size, micro_batch_size=arm.batch_size, schedule="constant", warmup=0.0
    )
    part = Part(source=arm.source, judge=arm.judge, shape=arm.shape, terms=arm.objective.terms())
    stage = Stage(
        name="rounds",
        parts=(part,),
        keep=Keep(),
        num_rounds=MANY_ROUNDS,
        num_contexts=arm.num_contexts,
        modality="diffusion",
    )
    accelerator = Accelerator(cpu=True)
    learner = make_learner(policy, optim, accelerator)
    rounds = Rounds(stages=[stage], contexts=prompts_of(TRAINED), port=port(sizes.steps), frozen=frozen)
    with counted(policy, frozen.model) as rows, tempfile.TemporaryDirectory() as folder:
        hooks = Hooks(
            evaluate=None,
            stop=lambda: rows.total >= sizes.budget,
            report=lambda line: None,
            progress=lambda total, start: Progress(
                total, label="", stream=io.StringIO(), enabled=False, clock=lambda: 0.0, start=start
            ),
        )
        run = RunConfig(output_dir=folder, seed=key("step aware", seed))
        outcome, _ = run_rounds(rounds, learner, optim, run, accelerator, identity={}, hooks=hooks)
    assert not outcome.finished, "the plan ended before the budget did"
    return Learnt(policy=policy, rows=rows, num_steps=outcome.step)


def step_wise(reward: Reward, judge: Judge, sizes: Sizes, *, choose: Path = "random") -> Arm:
    """SPO: siblings of every step, the best against the worst; on from one of them."""
    return Arm(
        source=StepSiblings(
            num_candidates=SIBLINGS,
            first_step=sizes.first,
            last_step=sizes.steps - 1,
            num_steps=sizes.steps,
            choose=choose,
            judge=None if choose == "random" else judge,
            batch_size=64,
        ),
        judge=judge,
        shape=SHAPES.build("pairs", {"which": "best_worst", "min_margin": MARGIN}),
        objective=ObjectiveConfig(name="spo_step", options={"beta": BETA, "clip": CLIP}),
        lr=RATES["step-wise", reward.name],
        num_contexts=min(12, sizes.budget // 50),
        batch_size=sizes.batch_size,
    )


def paths(sizes: Sizes) -> DenoisingPaths:
    """As many whole paths as siblings, trained on at the same steps."""
    return DenoisingPaths(
        num_candidates=SIBLINGS,
        first_step=sizes.first,
        last_step=sizes.steps - 1,
        num_steps=sizes.steps,
        batch_size=64,
    )


def d3po(reward: Reward, judge: Judge, sizes: Sizes) -> Arm:
    """The objective of SPO on the same steps of two whole paths, that of the better picture chosen."""
    alike = step_wise(reward, judge, sizes)
    return replace(
        alike,
        source=PathSteps(paths=paths(sizes)),
        lr=RATES["d3po", reward.name],
        num_contexts=min(8, sizes.budget // 50),
    )


def ddpo(reward: Reward, judge: Judge, sizes: Sizes) -> Arm:
    """Policy gradient with the picture's standardised reward at every step; a clip that hardly binds."""
    return Arm(
        source=paths(sizes),
        judge=judge,
        shape=SHAPES.build("units", {"credit": "z_score"}),
        objective=ObjectiveConfig(name="ddpo", options={"clip": 0.05}, reference="none"),
        lr=RATES["ddpo", reward.name],
        num_contexts=min(8, sizes.budget // 50),
        batch_size=2,
    )


def arms(scales: Mapping[str, float], sizes: Sizes) -> dict[str, Arm]:
    """Name -> how it learns."""
    found: dict[str, Arm] = {}
    for reward in REWARDS:
        oracle = Oracle(measure=reward.measure, scale=scales[reward.name])
        found[f"step-wise, {reward.name}"] = step_wise(reward, oracle, sizes)
        found[f"d3po, {reward.name}"] = d3po(reward, oracle, sizes)
        found[f"ddpo, {reward.name}"] = ddpo(reward, oracle, sizes)
        found[f"random, {reward.name}"] = step_wise(reward, Chance(), sizes)
    oracle = Oracle(measure=DETAIL.measure, scale=scales[DETAIL.name])
    for choose in ("best", "worst"):
        found[f"{choose}, detail"] = step_wise(DETAIL, oracle, sizes, choose=choose)
    return found
