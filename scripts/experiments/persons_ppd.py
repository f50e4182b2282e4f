"""Does one image model please people of opposite taste once it sees who they are, new people among them?

    python -m triptych.scripts.experiments.persons_ppd --save
    python -m triptych.scripts.experiments.persons_ppd --cache runs/evidence/base   # keep the base

Half of the people prefer the redder of two pictures, half the less red one, each with errors of their own. A
small SDXL-class UNet learns from everybody's pairs: by DPO that does not know whose they are, and by PPD,
whose frozen UNet attends to a vector of the person. That vector is the mean difference of fixed random
features over four of the person's pairs, which are never trained on. It is judged on held-out prompts, from
the base's noise, by how much redder the pictures of each person are than the base's; some of the people gave
nothing but their four pairs. As a control the same attention learns with one vector for all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.likelihood import Collator, Example
from triptych.modalities.diffusion.persons import (
    UserOff,
    Users,
    add_persons,
    drawn_for,
    mixed,
    user_embeddings,
)
from triptych.modalities.diffusion.policy import Denoiser
from triptych.scripts.experiments.common import (
    MUTED,
    Claim,
    Outcome,
    band,
    bars,
    command,
    over_seeds,
    stopwatch,
    verdict,
)
from triptych.scripts.experiments.diffusion_toy import (
    FULL,
    HELD_OUT,
    QUICK,
    SIZE,
    TOY,
    Pair,
    Pool,
    Sizes,
    judged_pictures,
    likelihood,
    main,
    make_pool,
    measured,
    pretrained,
    schedule,
)
from triptych.training.config import ObjectiveConfig, OptimConfig
from triptych.training.loop import Task, make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.order import key
from triptych.training.references import FrozenCopy, Reference, trained

NAME = "persons_ppd"
PAPER = "Dang et al. 2025, arXiv 2501.06655"
REWARD = "redness"
GROUPS = ("warm", "cold")
# Persons of each group: those learnt from, how many of them are drawn for, new ones.
SEEN, DRAWN, NEW = 12, 4, 4
OWN_PAIRS = 4  # that a person is known by
CELLS, WIDTH = 4, 16  # the features: mean colours of 4 x 4 cells in 16 random directions
ERRORS = 0.25  # of labels: a Bradley-Terry temperature, in deviations of the pairs' gap in reward
# Rates and beta were chosen on other seeds, from 100 on.
BETA = 500.0
RATE, USER_RATE = 1e-4, 1e-2  # of all weights, and of the attention to users
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXTURES = 2
NUM_SEEDS = 3
SIZES = replace(FULL, lists=2, steps=60, images=64, repeats=2, ddim=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody's taste and pairs, the preferred picture first. known_by: those their vector is made of."""

    name: str
    group: int
    is_new: bool
    known_by: tuple[Pair, ...]
    pairs: tuple[Pair, ...]

    @property
    def sign(self) -> int:
        """1 for who likes red, -1 for who does not."""
        return 1 - 2 * self.group


def persons(pool: Pool, *, seed: int) -> list[Person]:
    """Everybody with pairs of their own; the new ones have only those they are known by.

    The pairs are the half of the pool's that differ most: people are asked about what they can tell apart.
    Every pair to learn from is judged by one person of each group.
    """
    generator = torch.Generator().manual_seed(key("persons", seed))
    reward = pool.score(REWARD)
    gaps = {pair: float(reward[pair[0], pair[1]] - reward[pair[0], pair[2]]) for pair in pool.pairs()}
    pairs = sorted(gaps, key=lambda pair: -abs(gaps[pair]))[: len(gaps) // 2]
    gap = torch.tensor([gaps[pair] for pair in pairs], dtype=torch.float64)
    chance = torch.sigmoid(gap / (ERRORS * gap.std()))
    left = torch.randperm(len(pairs), generator=generator).tolist()
    people = [(g, n) for g in range(len(GROUPS)) for n in range(SEEN + NEW)]
    # What somebody is known by is never trained on.
    known = [[left.pop() for _ in range(OWN_PAIRS)] for _ in people]

    def judged(places: Sequence[int], group: int) -> tuple[Pair, ...]:
        found = []
        for place in places:
            i, a, b = pairs[place]
            redder = float(torch.rand((), generator=generator)) < float(chance[place])
            found.append((i, a, b) if redder == (group == 0) else (i, b, a))
        return tuple(found)

    return [
        Person(
            name=f"{GROUPS[g]} {n}",
            group=g,
            is_new=n >= SEEN,
            known_by=judged(own, g),
            pairs=judged(left[n::SEEN] if n < SEEN else [], g),
        )
        for (g, n), own in zip(people, known, strict=True)
    ]


def features(pictures: Tensor) -> Tensor:
    """Mean colours of CELLS x CELLS cells, in WIDTH random directions, [N, WIDTH]; nothing is learnt."""
    cells = torch.nn.functional.adaptive_avg_pool2d(pictures, CELLS).flatten(1)
    generator = torch.Generator().manual_seed(key("features"))
    return cells @ torch.randn(cells.shape[1], WIDTH, generator=generator) / cells.shape[1] ** 0.5


def vectors_of(people: Sequence[Person], pool: Pool) -> Users:
    """Everybody's vector, from the pairs they are known by."""
    pairs = {p.name: [features(pool.pictures[i, [a, b]]) for i, a, b in p.known_by] for p in people}
    return user_embeddings({name: torch.stack(found) for name, found in pairs.items()})


def examples_of(people: Sequence[Person], pool: Pool) -> list[Example]:
    """Everybody's pairs to learn from, with whose they are."""
    return [replace(pool.pair(pair), group=p.name) for p in people for pair in p.pairs]


def attentive(base: Denoiser, *, seed: int) -> Denoiser:
    """A copy of the base with untrained attention to users."""
    policy = deepcopy(base)
    add_persons(policy.model, width=WIDTH, generator=torch.Generator().manual_seed(key("W", seed)))
    return policy


def learn(
    policy: Denoiser,
    examples: Sequence[Example],
    sizes: Sizes,
    *,
    users: Users | None,
    seed: int,
    rate: float,
) -> list[float]:
    """Train the policy by DPO on the same pairs in the same order, seeing users or not; the losses."""
    reference: Reference = FrozenCopy.of(policy) if users is None else UserOff()
    objective = ObjectiveConfig(name="dpo", options={"beta": BETA}, reference="frozen")
    batch = sizes.images // 2
    optim = OptimConfig(
        lr=rate, batch_size=batch, micro_batch_size=batch, num_steps=sizes.steps, schedule="constant"
    )
    task = Task(
        likelihood=likelihood(),
        terms=objective.terms(),
        references={"frozen": reference},
        collate=Collator(schedule=schedule(), noise=NoiseConfig(stratified=True), users=users),
        examples=examples,
        lengths=[2] * len(examples),
        sources=[e.source for e in examples],
    )
    accelerator, meter = Accelerator(cpu=True), Meter(torch.device("cpu"))
    learner, losses = make_learner(policy, optim, accelerator), []
    for _ in range(sizes.steps):
        train_step(task, learner, optim, accelerator, seed=seed, num_steps=sizes.steps, meter=meter)
        losses.append(meter.read(lambda t: t)["loss"])
    return losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one seed found: shifts of redness against the base's pictures from the same noise.

    population: of DPO; one: of the attention with one vector for all. shifts: of persons' pictures by PPD,
    [G, DRAWN + NEW], the new ones last; warm: the same of the share of warm hues. between: for mixtures of a
    new person of either group, [len(SHARES)]. nobody: largest difference of a pixel from the base's without a
    person. loss: the first one. weights: numbers that PPD and DPO train. pictures: one a prompt, by the base
    and for a new person of each group, [1 + G, P, Z, H, W].
    """

    population: float
    one: float
    shifts: Tensor
    warm: Tensor
    between: Tensor
    nobody: float
    loss: float
    weights: tuple[int, int]
    pictures: Tensor

    def gain(self, *, new: bool) -> Tensor:
        """Mean shift to each group's own side over its new or its other persons, [G]."""
        mine = self.shifts[:, DRAWN:] if new else self.shifts[:, :DRAWN]
        return mine.mean(1) * torch.tensor([1.0, -1.0], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Studio:
    """Held-out prompts, the noise of a seed, and the base's pictures of them, [N, Z, H, W]."""

    sizes: Sizes
    seed: int
    plain: Tensor

    @classmethod
    def of(cls, base: Denoiser, sizes: Sizes, *, seed: int) -> Studio:
        """The base's own pictures are drawn once."""
        return cls(sizes, seed, cls(sizes, seed, torch.empty(0)).draw(base))

    def draw(self, policy: Denoiser, vectors: Tensor | None = None) -> Tensor:
        """A policy's pictures from the base's noise, for somebody or nobody."""
        with nullcontext() if vectors is None else drawn_for(policy.model, vectors):
            prompts = HELD_OUT[: self.sizes.judged]
            return judged_pictures(policy, prompts, self.sizes, self.seed).flatten(0, 1)

    def shift(self, pictures: Tensor, measure: str = REWARD) -> float:
        """Mean of a measure less the base's."""
        return float((measured(measure, pictures) - measured(measure, self.plain)).mean())


def run_seed(base: Denoiser, sizes: Sizes, *, seed: int) -> Found:
    """Every way to learn from one set of people, on one pool."""
    pool, studio = make_pool(base, sizes, seed=seed), Studio.of(base, sizes, seed=seed)
    people = persons(pool, seed=seed)
    users, examples = vectors_of(people, pool), examples_of(people, pool)
    population, one, policy = deepcopy(base), attentive(base, seed=seed), attentive(base, seed=seed)
    learn(population, examples, sizes, users=None, seed=seed, rate=RATE)
    same = Users(dict.fromkeys(users.vectors, torch.ones(1, WIDTH)))
    learn(one, examples, sizes, users=same, seed=seed, rate=USER_RATE)
    losses = learn(policy, examples, sizes, users=users, seed=seed, rate=USER_RATE)
    shown = [[p for p in people if p.group == g] for g in range(len(GROUPS))]
    drawn = [[studio.draw(policy, users[p.name]) for p in (*row[:DRAWN], *row[SEEN:])] for row in shown]
    found = Found(
        population=studio.shift(studio.draw(population)),
        one=studio.shift(studio.draw(one, torch.ones(1, WIDTH))),
        shifts=_table([[studio.shift(x) for x in row] for row in drawn]),
        warm=_table([[studio.shift(x, "warm_share") for x in row] for row in drawn]),
        between=_mixtures(studio, policy, people, users),
        nobody=float((studio.draw(policy, users.nobody) - studio.plain).abs().max()),
        loss=losses[0],
        weights=(_size(policy), _size(population)),
        pictures=torch.stack([studio.plain, *(row[DRAWN] for row in drawn)])[:, :: sizes.repeats],
    )
    gains = torch.cat([found.gain(new=new) for new in (False, True)]).tolist()
    print(
        f"seed {seed}: dpo {found.population:+.4f}, one vector {found.one:+.4f}, PPD seen and new "
        f"{' '.join(f'{v:+.4f}' for v in gains)}, last loss {sum(losses[-10:]) / len(losses[-10:]):.3f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def _mixtures(studio: Studio, policy: Denoiser, people: Sequence[Person], users: Users) -> Tensor:
    """Shifts between new persons of either group, mean over MIXTURES couples, [len(SHARES)]."""
    warm, cold = ([p.name for p in people if p.is_new and p.group == g][:MIXTURES] for g in range(2))
    rows = [
        [studio.shift(studio.draw(policy, mixed(users[b], users[a], share))) for share in SHARES]
        for a, b in zip(warm, cold, strict=True)
    ]
    return _table(rows).mean(0)


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _size(policy: Denoiser) -> int:
    return sum(p.numel() for p in trained(policy).values())


def draw_figure(figure: Figure, *, found: Sequence[Found]) -> None:
    """Shifts by group, mixtures of two persons, and the first held-out prompts for either."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 0.9))
    labels = ["dpo", "one vector\nfor all", "PPD, persons\nlearnt from", "PPD, new\npersons"]
    for g, name in enumerate(GROUPS):
        common = _table([[f.population, f.one] for f in found])
        own = torch.stack([torch.stack([f.gain(new=new)[g] for new in (False, True)]) for f in found])
        estimates = [over_seeds(column) for column in torch.cat([common, (1 - 2 * g) * own], 1).T]
        bars(left, labels, estimates, series=1 - g, shift=0.16 * g - 0.08, label=f"who likes it {name}")
    for ax in (left, middle):
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        ax.set_ylabel("redness less the base's")
    left.set(title="Tint of a person's pictures")
    left.tick_params(axis="x", labelsize=8)
    left.legend()
    band(middle, SHARES, torch.stack([f.between for f in found]), 2, "mixture")
    middle.set(title="Between two new persons", xlabel="share of the warm one")
    columns = found[0].pictures[:, :5]
    (num, rows), step = columns.shape[:2], SIZE + 2
    sheet = torch.ones(3, step * rows - 2, step * num - 2)
    for c in range(num):
        for r in range(rows):
            sheet[:, step * r : step * r + SIZE, step * c : step * c + SIZE] = columns[c, r] / 2 + 0.5
    right.imshow(sheet.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    right.set_xticks([step * c + SIZE / 2 for c in range(num)], ["base", *GROUPS])
    right.set_yticks([])
    right.grid(visible=False)
    right.set(title="New persons' pictures")


def run(*, seeds: int, quick: bool = False, cache: Path | None = None) -> Outcome:
    """All of it on up to three seeds."""
    sizes, num_seeds = (replace(QUICK, lists=3, prompts=24), 2) if quick else (SIZES, min(seeds, NUM_SEEDS))
    with stopwatch() as elapsed:
        base = pretrained(sizes.pretraining, cache)
        found = [run_seed(base, sizes, seed=seed) for seed in range(num_seeds)]
        seconds = elapsed()
    return Outcome(
        claims=claims_of(found, sizes),
        figure=partial(draw_figure, found=found),
        caption="Two groups of opposite taste learnt from at once. Left: how much redder than the base's "
        "the pictures of held-out prompts are, 95 % intervals over seeds. Middle: for mixtures of a cold and "
        "a warm person. Right: the first held-out prompts, one noise a row; nothing was chosen.",
        seconds=seconds,
        size=(13.0, 3.8),
    )


def claims_of(found: Sequence[Found], sizes: Sizes) -> list[Claim]:
    """What is compared, with intervals over seeds."""
    attention, whole = found[0].weights
    what = (
        f"{TOY}; {len(GROUPS)} groups of {SEEN} persons learnt from and {NEW} new ones, vectors of {WIDTH} "
        f"random features of {OWN_PAIRS} pairs; {sizes.steps} steps of {sizes.images} pictures, beta "
        f"{BETA:g}; dpo trains {whole:,} weights at {RATE:g}, PPD {attention:,} at {USER_RATE:g}; "
        f"{sizes.judged} held-out prompts x {sizes.repeats} pictures for {DRAWN} and {NEW} persons of each "
        f"group, {sizes.ddim} DDIM steps; {len(found)} seeds"
    )
    claim = partial(Claim, family="Diffusion", method="PPD", paper=PAPER, what=what, command=command(NAME))
    population, one = _table([[f.population, f.one] for f in found]).T
    seen, new = (torch.stack([f.gain(new=is_new) for f in found]) for is_new in (False, True))
    least = seen.min(1).values
    leads = [over_seeds(least - x.abs()) for x in (population, one)]
    hues = torch.stack([f.warm[:, DRAWN:].mean(1) for f in found])
    nobody, first = max(f.nobody for f in found), max(abs(f.loss - math.log(2)) for f in found)
    between = torch.stack([f.between for f in found])
    rising = (between.diff(dim=1) > 0).all(1)
    places = ", ".join(f"{s:g}: {v:+.4f}" for s, v in zip(SHARES, between.mean(0).tolist(), strict=True))
    return [
        claim(
            statement="Opposite tastes cancel where nobody is known: the tint of all pictures moves less "
            "than by PPD for the group that it serves less",
            result=f"redness: dpo of all weights {over_seeds(population):+.4f}, the same attention with one "
            f"vector for all {over_seeds(one):+.4f}, PPD for the less served group {over_seeds(least):+.4f}; "
            f"this less the absolute shifts {leads[0]:+.4f} and {leads[1]:+.4f}",
            holds=verdict(*(lead.low > 0 for lead in leads)),
        ),
        claim(
            statement="With their vectors, both groups of persons that were learnt from get pictures of "
            "their own tint",
            result=groupwise(seen),
            holds=verdict(*(over_seeds(column).low > 0 for column in seen.T)),
        ),
        claim(
            statement="So do both groups of new persons, of whom four pairs are known and none was learnt "
            "from",
            result=f"{groupwise(new)}; new less learnt from {over_seeds((new - seen).mean(1)):+.4f}; share "
            f"of warm hues {over_seeds(hues[:, 0]):+.3f} and {over_seeds(hues[:, 1]):+.3f}",
            holds=verdict(*(over_seeds(column).low > 0 for column in new.T)),
        ),
        claim(
            statement="Without a person the model is the base, before training and after it",
            result=f"first loss less ln 2 {first:.1g}; largest difference of a pixel after training, with a "
            f"vector of zeros, {nobody:g}",
            holds=nobody == 0 and first < 1e-6,
        ),
        claim(
            statement="Between a cold new person and a warm one, redness rises with the share of the warm "
            "one",
            result=f"redness at share {places}; rises at every step in {int(rising.sum())} of {len(found)} "
            f"seeds, mean over {MIXTURES} couples",
            holds=verdict(*rising.tolist()),
        ),
    ]


def groupwise(gains: Tensor) -> str:
    """Shifts to each group's own side, [S, G], as text."""
    each = (f"{n} {over_seeds(x):+.4f}" for n, x in zip(GROUPS, gains.T, strict=True))
    return f"redness to the group's own side: {', '.join(each)}"


if __name__ == "__main__":
    main(NAME, run, __doc__)
