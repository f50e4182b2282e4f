"""The toy of the diffusion experiments: a small SDXL-class UNet on drawn shapes of 16 x 16 pixels.

Pictures in [-1, 1] are their own latents. A prompt names shape, place, size and background; colours are left
to chance, so that the pictures of one prompt differ in them. The base learns all prompts by `sft`;
preferences are learnt on some of them and judged on the others.

Shapes: P prompts, K pictures a prompt, N pictures, Z = 3 channels, H = W = 16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.likelihood import Collator, DiffusionBatch, ElboLikelihood, Example
from triptych.modalities.diffusion.measures import diversity, measure_of
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.schedule import Schedule, schedule_of
from triptych.scripts.experiments.common import Outcome
from triptych.scripts.experiments.common import main as common_main
from triptych.training.config import ObjectiveConfig, OptimConfig
from triptych.training.loop import Task, make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.order import Draw, key
from triptych.training.references import FrozenCopy, Reference, Snapshot, content_hash

SIZE, WIDTH = 16, 32
SHAPES = ("disc", "ring", "square", "diamond", "cross", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = (*SHAPES, *PLACES, "small", "large", "on light", "on dark")
PROMPTS = tuple(product(SHAPES, PLACES, ("small", "large"), ("on light", "on dark")))
# A quarter of the prompts, spread over all shapes, never has a preference.
HELD_OUT = tuple(sorted(range(len(PROMPTS)), key=lambda i: key("held out", i))[: len(PROMPTS) // 4])
TRAINED = tuple(i for i in range(len(PROMPTS)) if i not in HELD_OUT)
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
LIST_SIZE = 4
MAX_SEEDS = 3
TOY = "SDXL-class UNet (v-prediction, 1.0M parameters) on drawn 16 x 16 shapes"

Pair = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is done. lists: lists of four base samples a training prompt; images: of one training step.

    repeats: pictures a held-out prompt when judged. ddim: denoising steps. probes: draws of time and noise of
    the implicit reward and of the drift.
    """

    pretraining: int = 1500
    lists: int = 2
    steps: int = 80
    images: int = 32
    repeats: int = 5
    ddim: int = 16
    probes: int = 4
    prompts: int = len(TRAINED)
    judged: int = len(HELD_OUT)


FULL = Sizes()
QUICK = Sizes(pretraining=20, lists=1, steps=4, images=8, repeats=2, ddim=3, probes=1, prompts=6, judged=4)


def drawn(prompts: Sequence[int], generator: torch.Generator) -> Tensor:
    """A picture of each prompt in colours of its own, [N, Z, H, W]; no hue is likelier than another."""
    fine = 4 * SIZE
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pictures = []
    for shape, place, size, ground in (PROMPTS[i] for i in prompts):
        jitter = 0.16 * (torch.rand(2, generator=generator) - 0.5)
        dy = y - (-0.36 if "top" in place else 0.36) - jitter[0]
        dx = x - (-0.36 if "left" in place else 0.36) - jitter[1]
        inside = _inside(shape, dx, dy, 0.34 if size == "small" else 0.6)
        u = torch.rand(6, generator=generator)
        fill = _rgb(u[0], 0.6 + 0.4 * u[1], 0.7 + 0.3 * u[2])
        value = (0.85 if ground == "on light" else 0.15) + 0.15 * u[5]
        paper = _rgb(u[3], 0.4 * u[4], value)
        image = torch.where(inside, fill.view(3, 1, 1), paper.view(3, 1, 1))
        pictures.append(torch.nn.functional.avg_pool2d(image, 4))
    return torch.stack(pictures) * 2 - 1


def _inside(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    across, far = torch.maximum(dx.abs(), dy.abs()), torch.hypot(dx, dy)
    if shape == "disc":
        return far < radius
    if shape == "ring":
        return (far < radius) & (far > 0.5 * radius)
    if shape == "square":
        return across < 0.88 * radius
    if shape == "diamond":
        return dx.abs() + dy.abs() < 1.2 * radius
    if shape == "cross":
        return (across < radius) & (torch.minimum(dx.abs(), dy.abs()) < 0.34 * radius)
    return (dy < 0.8 * radius) & (dy > 2 * dx.abs() - radius)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV in [0, 1] as RGB, [3]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


@cache
def words() -> Tensor:
    """A random vector a word, [V, D]: what stands for the text encoders."""
    return torch.randn(len(WORDS), WIDTH, generator=torch.Generator().manual_seed(key("words")))


def embedded(prompt: int) -> tuple[Tensor, Tensor]:
    """Embeddings of a prompt [L, D] and their pooled form [D]."""
    tokens = words()[[WORDS.index(word) for word in PROMPTS[prompt]]]
    return tokens, tokens.sum(0) / math.sqrt(len(tokens))


def time_ids(num: int) -> Tensor:
    """SDXL's size conditions of whole pictures, [N, 6]."""
    return torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE]).float().expand(num, 6)


def scheduler() -> DDIMScheduler:
    """DDPM's noise schedule (Ho et al. 2020), sampled from its last time on; clips to [-1, 1]."""
    return DDIMScheduler(**SCHEDULER)


@cache
def schedule() -> Schedule:
    """The same for training."""
    return schedule_of(scheduler())


@cache
def likelihood() -> ElboLikelihood:
    """That of Diffusion-DPO, on the error of the model's own prediction."""
    return ElboLikelihood(schedule=schedule())


def make_denoiser(seed: int = 0) -> Denoiser:
    """The untrained UNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("unet", seed))
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
    return Denoiser(unet)


def example(prompt: int, latents: Tensor, kind: Any, relevance: Sequence[float], name: str) -> Example:
    """Pictures [K, Z, H, W] of a prompt as a training sample; name: of the pictures, K of them by comma."""
    embeds, pooled = embedded(prompt)
    return Example(
        id=name,
        source=f"toy:{name}",
        kind=kind,
        latents=latents,
        embeds=embeds,
        pooled=pooled,
        time_ids=time_ids(len(latents)),
        relevance=tuple(relevance),
        keys=tuple(f"toy:{part}" for part in name.split(",")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A policy, its losses step by step, and the rows that the UNets were evaluated on while training."""

    policy: Any
    losses: tuple[float, ...]
    evaluations: int


def train(
    policy: nn.Module,
    examples: Sequence[Example],
    objective: ObjectiveConfig,
    optim: OptimConfig,
    *,
    seed: int,
    adapter: Any = None,
    fold: Callable[[Tensor, Any], Tensor] | None = None,
    average: float = 0.0,
) -> Trained:
    """The project's own loop on `policy`, which it changes; the reference is the policy as it comes.

    adapter: of the likelihood, in place of `likelihood()`. average: decay of the weights' moving average.
    """
    terms = objective.terms()
    references: Mapping[str, Reference] = {"frozen": FrozenCopy.of(policy)} if terms.slots() else {}
    frozen = references.get("frozen")
    task = Task(
        likelihood=adapter or likelihood(),
        terms=terms,
        references=references,
        collate=Collator(schedule=schedule()),
        examples=examples,
        lengths=[len(e.latents) for e in examples],
        sources=[e.source for e in examples],
    )
    if fold is not None:
        task = replace(task, fold=fold)
    accelerator = Accelerator(cpu=True)
    learner, meter = make_learner(policy, optim, accelerator), Meter(torch.device("cpu"))
    smooth, losses = Snapshot.of(policy), []
    models = [m for m in (policy, getattr(frozen, "model", None)) if isinstance(m, Denoiser)]
    for model in models:
        model.calls.clear()
    num_steps = optim.num_steps or 1
    for _ in range(num_steps):
        train_step(task, learner, optim, accelerator, seed=seed, num_steps=num_steps, meter=meter)
        losses.append(meter.read(lambda t: t)["loss"])
        # Early averages forget the random start faster.
        smooth.follow(policy, min(average, len(losses) / (len(losses) + 10)))
    if average:
        smooth.put(policy)
    return Trained(policy=policy, losses=tuple(losses), evaluations=sum(sum(m.calls) for m in models))


@cache
def pretrained(num_steps: int, folder: Path | None = None) -> Denoiser:
    """The base, from a fixed seed; folder: where its weights are kept, which changes nothing but the time."""
    optim = OptimConfig(lr=2e-3, batch_size=32, micro_batch_size=32, num_steps=num_steps, warmup=0.05)
    policy = make_denoiser()
    name = f"base-{key('base', num_steps, str(asdict(optim)), content_hash(policy), str(SCHEDULER)):x}"
    path = None if folder is None else folder / f"{name}.safetensors"
    if path is not None and path.is_file():
        policy.load_state_dict(load_file(path))
        return policy
    generator = torch.Generator().manual_seed(key("pictures"))
    prompts = [i % len(PROMPTS) for i in range(min(32 * num_steps, 64 * len(PROMPTS)))]
    pictures = drawn(prompts, generator)
    examples = [
        example(p, x[None], "single", (1.0,), f"drawn-{i}")
        for i, (p, x) in enumerate(zip(prompts, pictures, strict=True))
    ]
    train(policy, examples, ObjectiveConfig(name="sft", reference="none"), optim, seed=0, average=0.99)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in policy.state_dict().items()}, path)
    return policy


@torch.no_grad()
def sampled(policy: Denoiser, prompts: Sequence[int], *, seed: int, num_steps: int) -> Tensor:
    """A picture of each prompt by DDIM, [N, Z, H, W]; noise n comes from (seed, n) alone."""
    steps = scheduler()
    steps.set_timesteps(num_steps)
    noise = [torch.Generator().manual_seed(key("picture", seed, n)) for n in range(len(prompts))]
    x = torch.stack([torch.randn(3, SIZE, SIZE, generator=g) for g in noise])
    embeds, pooled = (torch.stack(part) for part in zip(*map(embedded, prompts), strict=True))
    done = []
    for rows in torch.arange(len(prompts)).split(32):
        part, conditions = x[rows], Conditions(embeds[rows], pooled[rows], time_ids(len(rows)))
        for t in steps.timesteps:
            (said,) = policy([part], [t.expand(len(rows))], [conditions])
            part = steps.step(said, int(t), part, return_dict=False)[0]
        done.append(part.clamp(-1, 1))
    return torch.cat(done)


@dataclass(frozen=True, slots=True)
class Pool:
    """Base samples that preferences are about: a prompt a list, and its pictures [P, K, Z, H, W]."""

    prompts: tuple[int, ...]
    pictures: Tensor

    def score(self, name: str) -> Tensor:
        """A measure of every picture, [P, K]."""
        return measured(name, self.pictures.flatten(0, 1)).view(self.pictures.shape[:2])

    def pairs(self) -> list[Pair]:
        """Every pair of every list, (list, first, second)."""
        inside = list(combinations(range(self.pictures.shape[1]), 2))
        return [(i, a, b) for i in range(len(self.prompts)) for a, b in inside]

    def pair(self, pair: Pair) -> Example:
        """A pair as a training sample, the preferred one first."""
        i, a, b = pair
        pictures = self.pictures[i, [a, b]]
        return example(self.prompts[i], pictures, "pair", (1.0, 0.0), f"{i}-{a},{i}-{b}")

    def single(self, place: tuple[int, int]) -> Example:
        """A picture as a training sample."""
        i, k = place
        return example(self.prompts[i], self.pictures[i, [k]], "single", (1.0,), f"{i}-{k}")

    def ranked(self, relevance: Tensor) -> list[Example]:
        """Every list as a training sample with its relevance [P, K]."""
        names = [",".join(f"{i}-{k}" for k in range(len(row))) for i, row in enumerate(relevance)]
        return [
            example(prompt, pictures, "list", row.tolist(), name)
            for prompt, pictures, row, name in zip(self.prompts, self.pictures, relevance, names, strict=True)
        ]


def make_pool(base: Denoiser, sizes: Sizes, *, seed: int) -> Pool:
    """Lists of base samples of the training prompts."""
    lists = [p for p in TRAINED[: sizes.prompts] for _ in range(sizes.lists)]
    prompts = [p for p in lists for _ in range(LIST_SIZE)]
    pictures = sampled(base, prompts, seed=key("pool", seed), num_steps=sizes.ddim)
    return Pool(tuple(lists), pictures.view(len(lists), LIST_SIZE, 3, SIZE, SIZE))


def images(pictures: Tensor) -> list[Image.Image]:
    """Pictures [N, Z, H, W] as images."""
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def measured(name: str, pictures: Tensor) -> Tensor:
    """A measure of pictures [N, Z, H, W], [N] float64."""
    return torch.tensor(measure_of(name)(images(pictures)), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Probe:
    """Lists of pictures, times and noise, and what the base says of them: the implicit reward's yardstick."""

    pool: Pool
    batches: tuple[DiffusionBatch, ...]
    said: tuple[list[Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, base: Denoiser, pool: Pool, *, num_draws: int, seed: int) -> Probe:
        """The same draws for the pictures of one prompt, and for every policy."""
        noise = NoiseConfig(num_draws=num_draws, stratified=num_draws > 1)
        collate = Collator(schedule=schedule(), noise=noise)
        lists = pool.ranked(torch.zeros(pool.pictures.shape[:2]))
        draws = [Draw(i, 0, key("probe", seed, i)) for i in range(len(lists))]
        batches = tuple(collate(lists[i : i + 2], draws[i : i + 2]) for i in range(0, len(lists), 2))
        return cls(pool, batches, tuple(likelihood().predict(base, batch) for batch in batches))

    @torch.no_grad()
    def implicit(self, policy: Denoiser) -> tuple[Tensor, float]:
        """Implicit reward logp - ref of every picture, [P, K], and the drift mean (e_policy - e_ref)^2."""
        rows, away = [], []
        for batch, theirs in zip(self.batches, self.said, strict=True):
            mine = likelihood().predict(policy, batch)
            away += [(a - b).square().mean() for a, b in zip(mine, theirs, strict=True)]
            known = partial(_known, mine)
            terms, ref = likelihood().beside(known, theirs, batch)
            rows.append((terms - ref).sum(-1))
        return torch.cat(rows).view(self.pool.pictures.shape[:2]), float(torch.stack(away).mean())


def _known(said: list[Tensor], *inputs: Any) -> list[Tensor]:
    return said


@dataclass(frozen=True, slots=True)
class Judge:
    """Held-out prompts, the noise of a seed, and what the base makes of them, [P, K, Z, H, W]."""

    sizes: Sizes
    seed: int
    pool: Pool
    probe: Probe

    @classmethod
    def of(cls, base: Denoiser, sizes: Sizes, *, seed: int) -> Judge:
        """The base's own pictures are drawn once."""
        prompts = HELD_OUT[: sizes.judged]
        pool = Pool(prompts, judged_pictures(base, prompts, sizes, seed))
        return cls(sizes, seed, pool, Probe.of(base, pool, num_draws=sizes.probes, seed=seed))

    def draw(self, policy: Denoiser) -> Tensor:
        """A policy's pictures from the noise of the base's, [P, K, Z, H, W]."""
        return judged_pictures(policy, self.pool.prompts, self.sizes, self.seed)

    def look(self, policy: Denoiser, *, reward: str, judged: str) -> dict[str, float]:
        """What there is to say of a policy, on the same noise as the base's pictures.

        reward, judged: means of these measures; wins: share of pictures that are judged above the base's
        own, ties one half; accuracy: share of the base's pairs that the implicit reward orders as `reward`
        does; drift: mean (e_policy - e_ref)^2; diversity: within a prompt.
        """
        pictures = self.draw(policy)
        now, then = measured(judged, pictures.flatten(0, 1)), self.pool.score(judged).flatten()
        implicit, away = self.probe.implicit(policy)
        return {
            "reward": float(measured(reward, pictures.flatten(0, 1)).mean()),
            "judged": float(now.mean()),
            "wins": float((0.5 + 0.5 * (now - then).sign()).mean()),
            "accuracy": float(agreement(implicit, self.pool.score(reward)).mean()),
            "drift": away,
            "diversity": float(np.mean(diversity([images(row) for row in pictures]))),
        }


def judged_pictures(policy: Denoiser, prompts: Sequence[int], sizes: Sizes, seed: int) -> Tensor:
    """Pictures of every prompt from the judge's noise, [P, K, Z, H, W]."""
    repeated = [p for p in prompts for _ in range(sizes.repeats)]
    flat = sampled(policy, repeated, seed=key("judge", seed), num_steps=sizes.ddim)
    return flat.view(len(prompts), sizes.repeats, 3, SIZE, SIZE)


def agreement(said: Tensor, truth: Tensor) -> Tensor:
    """Whether the pairs of unequal truth within each row of [P, K] are said in their order, [pairs]."""
    a, b = map(list, zip(*combinations(range(truth.shape[1]), 2), strict=True))
    gap = truth[:, a] - truth[:, b]
    return (((said[:, a] - said[:, b]) * gap)[gap != 0] > 0).double()


def align(
    base: Denoiser,
    examples: Sequence[Example],
    name: str,
    sizes: Sizes,
    *,
    seed: int,
    lr: float,
    adapter: Any = None,
    fold: Callable[[Tensor, Any], Tensor] | None = None,
    **options: Any,
) -> Trained:
    """A copy of the base after the objective `name`, at sizes.images pictures a step whatever it learns from.

    Everything but labels and objective is the same for one seed.
    """
    batch = sizes.images // len(examples[0].latents)
    optim = OptimConfig(
        lr=lr, batch_size=batch, micro_batch_size=batch, num_steps=sizes.steps, schedule="constant"
    )
    reference: Any = "none" if name == "sft" else "frozen"
    objective = ObjectiveConfig(name=name, options=options, reference=reference)
    return train(deepcopy(base), examples, objective, optim, seed=seed, adapter=adapter, fold=fold)


def main(name: str, run: Callable[..., Outcome], doc: str | None) -> None:
    """Entry point of a diffusion experiment: the common one, and --cache."""
    parser = argparse.ArgumentParser(prog=name, add_help=False)
    parser.add_argument("--cache", type=Path, help="folder where the base's weights are kept between runs")
    options, rest = parser.parse_known_args()
    common_main(name, partial(run, cache=options.cache), doc, rest)
