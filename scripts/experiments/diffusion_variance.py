"""How noisy is a step of Diffusion-DPO, and which way of drawing times and noise makes it less so?

    python -m triptych.scripts.experiments.diffusion_variance --save
    python -m triptych.scripts.experiments.diffusion_variance --cache runs/evidence/base   # keep the base

The variance of a step's gradient at fixed weights, summed over all weights, is measured over independent
batches of pairs. Every batch is seen twice with other times and noise, so that what the draws add is known
apart from what the choice of pairs does. Ways that are compared cost the same evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.likelihood import Collator, ElboLikelihood, Example
from triptych.modalities.diffusion.policy import Denoiser
from triptych.objectives import PairLogLik, build, with_reference
from triptych.scripts.experiments.common import (
    COLOURS,
    MUTED,
    Claim,
    Outcome,
    bars,
    command,
    stopwatch,
    verdict,
)
from triptych.scripts.experiments.diffusion_toy import (
    FULL,
    QUICK,
    TOY,
    Pool,
    Sizes,
    align,
    main,
    make_pool,
    pretrained,
    schedule,
)
from triptych.training.order import Draw, key, window
from triptych.training.stats import Estimate, bootstrap_interval

NAME = "diffusion_variance"
PAPER = "Wallace et al. 2023, arXiv 2311.12908"
REWARD, BETA, RATE = "redness", 500.0, 1e-4
BATCH, LAST_STEP = 16, 100_000
WAYS = {
    "one draw": NoiseConfig(),
    "own noise": NoiseConfig(shared=False),
    "stratified": NoiseConfig(stratified=True),
    "two draws": NoiseConfig(num_draws=2),
    "two antithetic": NoiseConfig(num_draws=2, antithetic=True),
    "two stratified": NoiseConfig(num_draws=2, stratified=True),
    "two of both": NoiseConfig(num_draws=2, stratified=True, antithetic=True),
}
# Way -> what it is compared with, and how the figure calls it.
AGAINST = {
    "one draw": ("own noise", "shared noise\nfor a noise each"),
    "stratified": ("one draw", "stratified\nfor random times"),
    "two antithetic": ("two draws", "antithetic pair\nfor two draws"),
    "two stratified": ("two draws", "stratified pair\nfor two draws"),
    "two of both": ("two draws", "both at once\nfor two draws"),
}


def labelled(pool: Pool) -> list[Example]:
    """Every pair of the pool, the redder picture preferred."""
    reward = pool.score(REWARD)
    return [pool.pair((i, a, b) if reward[i, a] > reward[i, b] else (i, b, a)) for i, a, b in pool.pairs()]


def gradient(
    policy: Denoiser, base: Denoiser, examples: Sequence[Example], draws: Sequence[Draw], noise: NoiseConfig
) -> tuple[Tensor, float]:
    """Gradient of the batch's mean dpo loss by all weights, [weights], and its mean |beta h|."""
    likelihood = ElboLikelihood(schedule=schedule())
    batch = Collator(schedule=schedule(), noise=noise)([examples[d.index] for d in draws], draws)
    with torch.no_grad():
        said = likelihood.predict(base, batch)
    mine, theirs = (likelihood.assemble(terms, batch) for terms in likelihood.beside(policy, said, batch))
    pair = with_reference(mine, theirs)
    assert isinstance(pair, PairLogLik)
    parts = torch.autograd.grad(build("dpo", beta=BETA)(pair).mean(), list(policy.parameters()))
    margin = BETA * (pair.chosen.log_ratio() - pair.rejected.log_ratio()).detach()
    return torch.cat([part.flatten() for part in parts]), float(margin.abs().mean())


def batch_draws(index: int, *, num_samples: int, size: int) -> tuple[list[Draw], list[Draw]]:
    """The contexts of an independent batch, and the same contexts with other times and noise.

    Each is a window at a random place of a long run's stream, for a place fixes the stratified times.
    """

    def at(name: str) -> list[Draw]:
        step = key(name, index) % LAST_STEP
        return window(seed=key(name, "seed", index), step=step, num_samples=num_samples, batch_size=size)

    first, other = at("batch"), at("again")
    return first, [replace(d, index=f.index) for d, f in zip(other, first, strict=True)]


@dataclass(frozen=True, slots=True)
class Spread:
    """products [S, 2, S, 2] of the gradients of S batches, each drawn twice."""

    products: Tensor

    @classmethod
    def of(cls, gradients: Tensor) -> Spread:
        """From gradients [S, 2, weights]."""
        rows = gradients.flatten(0, 1)
        num = len(gradients)
        return cls((rows @ rows.T).double().view(num, 2, num, 2))

    def total(self, rows: Tensor) -> float:
        """Variance of a step's gradient over batches and draws, summed over weights; rows: the batches."""
        return float(self._squares()[rows].mean()) - self.mean_square(rows)

    def drawn(self, rows: Tensor) -> float:
        """The part of `total` that times and noise add, E |g - g'|^2 / 2 for the two draws of a batch."""
        return float((self._squares() - self._within())[rows].mean())

    def mean_square(self, rows: Tensor) -> float:
        """|E g|^2 without bias: products of different batches only."""
        means = self.products.mean((1, 3))[rows][:, rows]
        return float((means.sum() - means.diagonal().sum()) / (len(rows) * (len(rows) - 1)))

    def _squares(self) -> Tensor:
        """Mean of |g|^2 and |g'|^2 of each batch, [S]."""
        return torch.stack([self._product(0, 0), self._product(1, 1)]).mean(0)

    def _within(self) -> Tensor:
        """g . g' of each batch, [S]."""
        return self._product(0, 1)

    def _product(self, first: int, second: int) -> Tensor:
        return self.products[:, first, :, second].diagonal()


def ratio(found: Mapping[str, Spread], way: str, quantity: str) -> Estimate:
    """Variance of a way over that of its rival, with a bootstrap interval over batches.

    quantity: 'total', 'drawn', or 'relative', which is total / |E g|^2.
    """
    rival = AGAINST[way][0]

    def value(spread: Spread, rows: Tensor) -> float:
        if quantity == "relative":
            return spread.total(rows) / spread.mean_square(rows)
        return getattr(spread, quantity)(rows)

    def statistic(x: Tensor) -> float:
        rows = x.long()
        return value(found[way], rows) / value(found[rival], rows)

    num = len(found[way].products)
    return bootstrap_interval(torch.arange(num), seed=0, statistic=statistic)


def measure(
    policy: Denoiser, base: Denoiser, examples: Sequence[Example], *, num_batches: int, size: int
) -> tuple[dict[str, Spread], float]:
    """Spread of every way on the same batches, and the mean |beta h| at these weights."""
    batches = [batch_draws(i, num_samples=len(examples), size=size) for i in range(num_batches)]
    found: dict[str, Spread] = {}
    margins: list[float] = []
    for name, noise in WAYS.items():
        rows = [[gradient(policy, base, examples, d, noise) for d in both] for both in batches]
        found[name] = Spread.of(torch.stack([torch.stack([g for g, _ in row]) for row in rows]))
        margins += [m for row in rows for _, m in row] if name == "one draw" else []
        everything = torch.arange(num_batches)
        said = (found[name].total(everything), found[name].drawn(everything))
        print(f"{name}: {said[0]:.4g} in all, {said[1]:.4g} of the draws", file=sys.stderr, flush=True)
    return found, sum(margins) / len(margins)


def draw_figure(figure: Figure, *, ratios: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Ratios of variances, of whole steps and of their draws."""
    ax = figure.subplots()
    names = [title for _, title in AGAINST.values()]
    for series, (quantity, shift, label) in enumerate(
        (("total", -0.1, "of a whole step"), ("drawn", 0.1, "of times and noise alone"))
    ):
        bars(ax, names, list(ratios[quantity].values()), series=series, shift=shift, label=label)
        for place, e in enumerate(ratios[quantity].values()):
            side = {"xytext": (-9 if shift < 0 else 9, 0), "ha": "right" if shift < 0 else "left"}
            text = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": COLOURS[series]}
            ax.annotate(f"{e.mean:.2f}", (place + shift, e.mean), **side, **text)
    ax.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    ax.set(
        title="Variance of dpo's gradient at equal cost", ylabel="ratio, below 1: less noise", ylim=(0, None)
    )
    ax.legend(loc="lower right")


def run(*, seeds: int, quick: bool = False, cache: Path | None = None) -> Outcome:
    """Every way at one set of weights; seeds: of batches, at least 96 of them at full size."""
    sizes: Sizes = QUICK if quick else replace(FULL, lists=1, steps=20, images=2 * BATCH)
    num_batches, size = (6, 4) if quick else (max(96, seeds), BATCH)
    with stopwatch() as elapsed:
        base = pretrained(sizes.pretraining, cache)
        examples = labelled(make_pool(base, sizes, seed=0))
        policy: Denoiser = align(base, examples, "dpo", sizes, seed=0, lr=RATE, beta=BETA).policy
        found, margin = measure(policy, base, examples, num_batches=num_batches, size=size)
        quantities = ("total", "drawn", "relative")
        ratios = {q: {way: ratio(found, way, q) for way in AGAINST} for q in quantities}
        seconds = elapsed()
    everything = torch.arange(num_batches)
    share = {n: s.drawn(everything) / s.total(everything) for n, s in found.items()}
    second = found["two draws"].total(everything) / found["one draw"].total(everything)
    return Outcome(
        claims=claims_of(ratios, share, second, _what(sizes, len(examples), num_batches, size, margin)),
        figure=partial(draw_figure, ratios=ratios),
        caption="Variance of a step's gradient, summed over all weights, as a ratio at equal cost. "
        "Intervals are of a bootstrap over batches; below the dotted line a way is the less noisy one.",
        seconds=seconds,
        size=(8.5, 4.0),
    )


def _what(sizes: Sizes, num_pairs: int, num_batches: int, size: int, margin: float) -> str:
    return (
        f"{TOY}; policy after {sizes.steps} dpo steps from its reference, mean |beta h| {margin:.2f}, beta "
        f"{BETA:g}; {num_batches} independent batches of {size} of {num_pairs} pairs by redness, each drawn "
        "twice; one set of weights"
    )


def claims_of(
    ratios: Mapping[str, Mapping[str, Estimate]], share: Mapping[str, float], second: float, what: str
) -> list[Claim]:
    """A claim a way. It holds if both the step's variance and the draws' part of it are lower."""
    of_one, of_own, of_even = (100 * share[n] for n in ("one draw", "own noise", "stratified"))
    statements = {
        "one draw": (
            "Shared noise",
            "A pair that shares its noise has a gradient of lower variance than one with a noise for each "
            "picture",
            f"the draws are {of_one:.0f} % of a step's variance with shared, {of_own:.0f} % with own noise",
        ),
        "stratified": (
            "Stratified times",
            "Times that neighbouring pairs of a batch spread evenly make the gradient less noisy than random "
            "ones",
            f"the draws are {of_one:.0f} % of a step's variance with random, {of_even:.0f} % with stratified "
            "times",
        ),
        "two antithetic": (
            "Antithetic noise",
            "A noise and its opposite, each at its own time, are less noisy than two independent draws",
            f"two independent draws have {second:.2f} of the variance of one, at twice the cost",
        ),
        "two stratified": (
            "Stratified draws",
            "Two draws half the times apart are less noisy than two independent draws",
            "neighbouring pairs are spread evenly, too",
        ),
        "two of both": (
            "Stratified and antithetic",
            "A noise and its opposite, half the times apart, are less noisy than two independent draws",
            "neighbouring pairs are spread evenly, too",
        ),
    }
    claims = []
    for way, (method, statement, extra) in statements.items():
        total, drawn, relative = (ratios[q][way] for q in ("total", "drawn", "relative"))
        claims.append(
            Claim(
                family="Diffusion",
                method=method,
                paper=PAPER,
                statement=statement,
                result=f"variance {total:.3f} of the other's, the draws' part {drawn:.3f}, over the squared "
                f"mean gradient {relative:.3f}; {extra}",
                holds=verdict(total.high < 1, drawn.high < 1),
                what=what,
                command=command(NAME),
            )
        )
    return claims


if __name__ == "__main__":
    main(NAME, run, __doc__)
