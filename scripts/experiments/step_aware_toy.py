"""The toy of step-aware preferences: shapes whose place is left to chance, drawn and judged step by step.

The UNet and the pictures are those of `diffusion_toy`, but prompts say nothing of the place: where a shape
lies is settled by the first denoising steps, how sharp it is by the last ones. Policies learn through the
rounds of `training.rounds` until they have cost a number of UNet evaluations.

Shapes: P prompts, K pictures a prompt, N pictures, Z = 3 channels, H = W = 16; T denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.modalities.diffusion.latents import ImagePrompt
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.step_port import StepPort
from triptych.modalities.diffusion.step_sources import DenoisingPaths, Walker
from triptych.modalities.diffusion.steps import StepLikelihood
from triptych.modalities.diffusion.transitions import Ddim, ddim_grid
from triptych.scripts.experiments.diffusion_toy import (
    PROMPTS,
    SHAPES,
    SIZE,
    WORDS,
    drawn,
    example,
    measured,
    pretrained,
    schedule,
    time_ids,
    train,
    words,
)
from triptych.training.config import ObjectiveConfig, OptimConfig
from triptych.training.groups import Group
from triptych.training.order import key
from triptych.training.references import content_hash
from triptych.training.stages import Live

TOY = "SDXL-class UNet (v-prediction, 1.0M parameters) on drawn 16 x 16 shapes, place left to chance"
SUBJECTS = tuple(product(SHAPES, ("small", "large"), ("on light", "on dark")))
# A quarter of the prompts is never trained on.
HELD_OUT = tuple(sorted(range(len(SUBJECTS)), key=lambda i: key("no place", i))[: len(SUBJECTS) // 4])
TRAINED = tuple(i for i in range(len(SUBJECTS)) if i not in HELD_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is done. pretraining, placeless: steps of the base, then of prompts without a place.

    steps: T. first: steps before it are not trained on. budget: UNet evaluations of an arm, in rows, sampling
    and training, policy and reference. pictures: of a held-out prompt. batch_size: pairs of an optimizer
    step. scored: pictures a prompt that scorers learn from; seen: noisy versions of each; scoring: their
    optimizer steps.
    """

    pretraining: int = 1500
    placeless: int = 300
    steps: int = 10
    first: int = 2
    budget: int = 8000
    pictures: int = 24
    batch_size: int = 28
    scored: int = 48
    seen: int = 12
    scoring: int = 400


FULL = Sizes()
QUICK = Sizes(
    pretraining=20, placeless=4, steps=4, first=1, budget=120, pictures=3, batch_size=4, scored=4, seen=2,
    scoring=4,
)  # fmt: skip


def embedded(subject: int) -> Conditions:
    """Conditions of a prompt, one row."""
    tokens = words()[[WORDS.index(word) for word in SUBJECTS[subject]]]
    return Conditions(tokens[None], (tokens.sum(0) / math.sqrt(len(tokens)))[None], time_ids(1))


@cache
def placeless(pretraining: int, num_steps: int, folder: Path | None = None) -> Denoiser:
    """The base after `num_steps` more steps on prompts without a place; folder: as `pretrained`'s."""
    base = deepcopy(pretrained(pretraining, folder)).requires_grad_(True)
    optim = OptimConfig(lr=1e-3, batch_size=32, micro_batch_size=32, num_steps=num_steps, warmup=0.05)
    name = f"placeless-{key('placeless', str(asdict(optim)), content_hash(base)):x}"
    path = None if folder is None else folder / f"{name}.safetensors"
    if path is not None and path.is_file():
        base.load_state_dict(load_file(path))
        return base
    generator = torch.Generator().manual_seed(key("placeless pictures"))
    full = torch.randint(0, len(PROMPTS), (32 * num_steps,), generator=generator).tolist()
    examples = []
    for i, (p, picture) in enumerate(zip(full, drawn(full, generator), strict=True)):
        shape, _, size, ground = PROMPTS[p]
        said = embedded(SUBJECTS.index((shape, size, ground)))
        assert said.pooled is not None
        told = example(p, picture[None], "single", (1.0,), f"placeless-{i}")
        examples.append(replace(told, embeds=said.embeds[0], pooled=said.pooled[0]))
    train(base, examples, ObjectiveConfig(name="sft", reference="none"), optim, seed=0, average=0.99)
    if path is not None:
        save_file({n: t.contiguous() for n, t in base.state_dict().items()}, path)
    return base


def prompts_of(subjects: Sequence[int]) -> list[ImagePrompt]:
    """Prompts as the rounds take them."""
    return [ImagePrompt(key=f"subject-{i}", text=" ".join(SUBJECTS[i])) for i in subjects]


@cache
def port(num_steps: int) -> StepPort:
    """DDIM with eta 1 in T steps. The last one is without noise: it goes to x_0 and is not trained on."""
    return StepPort(
        likelihood=StepLikelihood(schedule=schedule(), rule=Ddim(eta=1.0, final="clean")),
        grid=ddim_grid(num_steps, spacing="trailing"),
        prompts={p.key: embedded(i) for i, p in enumerate(prompts_of(range(len(SUBJECTS))))},
        shape=(3, SIZE, SIZE),
    )


def live_of(policy: nn.Module, num_steps: int, *, seed: int) -> Live:
    """What sources need to draw from a policy outside of rounds."""
    return Live(
        policy=policy, port=port(num_steps), references={}, device=torch.device("cpu"), seed=key("live", seed)
    )


def sharpness(pictures: Tensor) -> Tensor:
    """log of the variance of luma's Laplacian, [N] float64."""
    return measured("sharpness", pictures).clamp(min=1e-6).log()


def jpeg_size(pictures: Tensor) -> Tensor:
    """Thousands of bytes as JPEG, [N] float64."""
    return measured("jpeg_size", pictures)


def leftness(pictures: Tensor) -> Tensor:
    """How far left the shape lies, from -1 to 1, [N] float64: its centre of mass, times -1.

    Mass of a pixel: its distance from the paper's colour, which is the median of each channel.
    """
    x = pictures.double().clamp(-1, 1)
    paper = x.flatten(2).median(-1).values[:, :, None, None]
    return -_centre((x - paper).abs().sum(1))


def edges_left(pictures: Tensor) -> Tensor:
    """As `leftness`, of the mass of edges: the length of the colours' gradient."""
    x = pictures.double().clamp(-1, 1)
    across, down = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2], x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    return -_centre((across.square() + down.square()).sum(1).sqrt())


def _centre(mass: Tensor) -> Tensor:
    """Mean place along x in units of half the picture, [N]; mass: [N, H', W']."""
    width = mass.shape[-1]
    axis = (torch.arange(width, dtype=mass.dtype) + 0.5 - width / 2) / (SIZE / 2)
    return (mass * axis).sum((1, 2)) / mass.sum((1, 2)).clamp(min=1e-9)


Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What labels are made of, and `judged`, a measure that is in no label; pictures -> [N] float64 each."""

    name: str
    measure: Measure
    judged: Measure
    judged_name: str


DETAIL = Reward(name="detail", measure=sharpness, judged=jpeg_size, judged_name="JPEG size")
LAYOUT = Reward(name="layout", measure=leftness, judged=edges_left, judged_name="edges' place")
REWARDS = (DETAIL, LAYOUT)


def pictures_of(
    policy: Denoiser, subjects: Sequence[int], num: int, num_steps: int, *, seed: int
) -> list[Group]:
    """num finished paths of every prompt, a group each; noise from (seed, prompt) alone."""
    source = DenoisingPaths(num_candidates=num, num_steps=num_steps, last_step=num_steps - 1, batch_size=64)
    with torch.no_grad():
        return source(prompts_of(subjects), live_of(policy, num_steps, seed=seed))


def finished(groups: Sequence[Group]) -> Tensor:
    """The pictures of groups, [P, K, Z, H, W]."""
    return torch.stack([torch.stack([c.clean for c in g.candidates]) for g in groups]).clamp(-1, 1)


@torch.no_grad()
def predictions(policy: Denoiser, groups: Sequence[Group], num_steps: int) -> Tensor:
    """What a policy says where each step of the groups' paths begins, [T, N, Z, H, W]."""
    walker = Walker.of(live_of(policy, num_steps, seed=0), 64)
    keys = [g.key for g in groups for _ in g.candidates]
    states = torch.stack([c.states for g in groups for c in g.candidates], 1)
    return torch.stack([walker.predict(keys, x, step) for step, x in enumerate(states)])


@torch.no_grad()
def clean_by_step(policy: Denoiser, groups: Sequence[Group], num_steps: int) -> Tensor:
    """x_0 as each step of whole paths sees it, [T, P, K, Z, H, W]; the last of them is the picture."""
    walker = Walker.of(live_of(policy, num_steps, seed=0), 64)
    keys = [g.key for g in groups for _ in g.candidates]
    states = torch.stack([c.states for g in groups for c in g.candidates], 1)
    assert len(states) == num_steps
    clean = torch.stack([walker.clean(keys, x, step)[0] for step, x in enumerate(states)])
    return clean.unflatten(1, (len(groups), -1))
