"""Which label tells a good denoising step from a bad one: the step's own, or the final image's?

    python -m triptych.scripts.experiments.diffusion_steps --save

One-dimensional diffusion of a mixture of Gaussians in 10 steps (DDIM, eta 1), whose denoiser is exact, and a
smooth reward of the final sample. The true worth of a step is the expected reward after it, by quadrature.
Each seed draws a mixture and a reward. Steps are labelled by the reward of the decoded step (step-aware SPO),
by the final sample that each sibling happens to reach, or by which of two whole paths ended better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.objectives import LogLik, PairLogLik, build
from triptych.scripts.experiments.common import (
    COLOURS,
    Claim,
    Outcome,
    band,
    command,
    main,
    over_seeds,
    stopwatch,
    verdict,
)

NUM_STEPS, NUM_MODES, NUM_BUMPS = 10, 3, 24
# Share of the signal that is left after t of 10 steps of noise, from 1 at t = 0 to 0.005.
SIGNAL = torch.cos(torch.linspace(0, 1.5, NUM_STEPS + 1, dtype=torch.float64)).square()
GRID = torch.linspace(-6, 6, 601, dtype=torch.float64)
CENTRES = torch.linspace(-3, 3, NUM_BUMPS, dtype=torch.float64)
BETA, CLIP = 10.0, 0.1
LABELS = ("decoded step", "final sample", "whole paths")
PAPER = "Liang et al. 2024, arXiv 2406.04314"


@dataclass(frozen=True, slots=True)
class Toy:
    """modes, shares: of the mixture, [M]; spots, heights: of the reward's bumps, [M]. width: of a mode."""

    modes: Tensor
    shares: Tensor
    spots: Tensor
    heights: Tensor
    width: float = 0.3

    def denoised(self, x: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t], [*]."""
        signal, noise = SIGNAL[t], 1 - SIGNAL[t]
        total = signal * self.width**2 + noise
        away = x.unsqueeze(-1) - signal.sqrt() * self.modes
        weight = (self.shares.log() - 0.5 * away.square() / total).softmax(-1)
        return (weight * (self.modes + signal.sqrt() * self.width**2 / total * away)).sum(-1)

    def reward(self, x: Tensor) -> Tensor:
        """Of a final sample, [*]."""
        return (self.heights * torch.exp(-((x.unsqueeze(-1) - self.spots) ** 2) / 0.5)).sum(-1)

    def decoded_reward(self, x: Tensor, t: int) -> Tensor:
        """Of the denoised step, [*]: all that a step-aware scorer sees."""
        return self.reward(self.denoised(x, t) if t else x)


def make_toy(seed: int) -> Toy:
    """A mixture and a reward of their own, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    modes = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64) + 0.8 * (draw(NUM_MODES) - 0.5)
    shares = draw(NUM_MODES) + 0.3
    spots = modes + 1.2 * (draw(NUM_MODES) - 0.5)
    return Toy(modes, shares / shares.sum(), spots, draw(NUM_MODES))


def spread(t: int) -> float:
    """Deviation of the step from t to t - 1."""
    before, after = SIGNAL[t], SIGNAL[t - 1]
    return math.sqrt(float((1 - after) / (1 - before) * (1 - before / after)))


def mean_of_step(toy: Toy, x: Tensor, t: int, theta: Tensor | None = None) -> Tensor:
    """Mean of x_{t - 1} given x_t, [*]; theta [T, F] moves it by some deviations, a smooth function of x."""
    clean = toy.denoised(x, t)
    noise = (x - SIGNAL[t].sqrt() * clean) / (1 - SIGNAL[t]).sqrt()
    std = spread(t)
    mean = SIGNAL[t - 1].sqrt() * clean + (1 - SIGNAL[t - 1] - std**2).clamp(min=0).sqrt() * noise
    if theta is None:
        return mean
    bumps = torch.exp(-((x.unsqueeze(-1) - CENTRES) ** 2) / (2 * 0.25**2))
    return mean + std * (bumps @ theta[t - 1])


def worth(toy: Toy, theta: Tensor | None = None) -> Tensor:
    """Expected final reward from every x_t of the grid, [T + 1, grid], by Gauss-Hermite quadrature."""
    offsets, weights = hermite()
    values = [toy.reward(GRID)]
    for t in range(1, NUM_STEPS + 1):
        places = mean_of_step(toy, GRID, t, theta).unsqueeze(-1) + spread(t) * offsets
        values.append((look_up(values[-1], places) * weights).sum(-1))
    return torch.stack(values)


def hermite(num: int = 24) -> tuple[Tensor, Tensor]:
    """Points and weights of an expectation under N(0, 1): eigenvalues of the recurrence (Golub, Welsch)."""
    off = torch.arange(1, num, dtype=torch.float64).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return points, vectors[0].square()


def look_up(values: Tensor, x: Tensor) -> Tensor:
    """A function on the grid, between its points by straight lines, [*]."""
    place = ((x - GRID[0]) / (GRID[1] - GRID[0])).clamp(0, len(GRID) - 1.001)
    below = place.long()
    return values[below].lerp(values[below + 1], place - below)


def finish(toy: Toy, x: Tensor, t: int, generator: torch.Generator, theta: Tensor | None = None) -> Tensor:
    """The final sample from x_t, [*]."""
    for step in range(t, 0, -1):
        x = mean_of_step(toy, x, step, theta) + spread(step) * torch.randn(
            x.shape, generator=generator, dtype=x.dtype
        )
    return x


def agreement(toy: Toy, *, num_paths: int, seed: int) -> Tensor:
    """How often each kind of label agrees with the true worth, by step from noise on, [L, T - 1].

    The last step has no randomness. For siblings the truth is the worth after the step, for steps of two
    paths the worth gained by it.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, num_paths, 2, generator=generator, dtype=torch.float64)
    value = worth(toy)
    paths = draw()
    states = [paths]
    for t in range(NUM_STEPS, 0, -1):
        states.append(mean_of_step(toy, states[-1], t) + spread(t) * draw())
    ended = toy.reward(states[-1])
    rows: list[Tensor] = []
    for i, t in enumerate(range(NUM_STEPS, 1, -1)):
        parent = states[i][:, :1].expand(-1, 2)
        siblings = mean_of_step(toy, parent, t) + spread(t) * draw()
        truth = look_up(value[t - 1], siblings)
        gained = look_up(value[t - 1], states[i + 1]) - look_up(value[t], states[i])
        final = toy.reward(finish(toy, siblings, t - 1, generator))
        rows.append(
            torch.stack(
                [
                    agrees(toy.decoded_reward(siblings, t - 1), truth),
                    agrees(final, truth),
                    agrees(ended, gained),
                ]
            )
        )
    return torch.stack(rows, -1)


def agrees(label: Tensor, truth: Tensor) -> Tensor:
    """Share of pairs [N, 2] in the same order."""
    return ((label[:, 0] > label[:, 1]) == (truth[:, 0] > truth[:, 1])).double().mean()


def step_pair(mean: Tensor, ref: Tensor, std: float, x: Tensor, label: Tensor) -> PairLogLik:
    """Two siblings [N, 2] as a pair by their label [N, 2]; log-densities without the shared constant."""
    better = label.argmax(-1, keepdim=True)
    sides: list[LogLik] = []
    for place in (better, 1 - better):
        taken = x.gather(-1, place).squeeze(-1)
        logp, frozen = (-((taken - m) ** 2) / (2 * std**2) for m in (mean, ref))
        sides.append(LogLik(logp, torch.ones_like(logp), frozen))
    chosen, rejected = sides
    return PairLogLik(chosen, rejected)


def train(toy: Toy, *, label: str, num_rounds: int, num_paths: int, seed: int) -> list[float]:
    """Exact expected reward over rounds of step-aware SPO with siblings and one kind of label."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    theta = torch.zeros(NUM_STEPS, NUM_BUMPS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.02)
    objective = build("spo_step", beta=BETA, clip=CLIP)
    start = hermite()
    curve: list[float] = []
    for index in range(num_rounds + 1):
        if index % 5 == 0:
            value = worth(toy, theta.detach())[-1]
            curve.append(float((look_up(value, start[0]) * start[1]).sum()))
        x, losses = draw(num_paths), []
        for t in range(NUM_STEPS, 1, -1):
            mean, ref, std = mean_of_step(toy, x, t, theta), mean_of_step(toy, x, t), spread(t)
            siblings = mean.detach().unsqueeze(-1) + std * draw(num_paths, 2)
            score = judge_of(toy, label, theta.detach(), generator)(siblings, t - 1)
            losses.append(objective(step_pair(mean, ref, std, siblings, score)).mean())
            # Siblings are drawn alike, so going on with the first is going on with a random one.
            x = siblings[:, 0]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return curve


def judge_of(
    toy: Toy, label: str, theta: Tensor, generator: torch.Generator
) -> Callable[[Tensor, int], Tensor]:
    """Score of siblings [N, 2] at step t: the decoded step's, or the final sample's that each reaches."""
    if label == LABELS[0]:
        return toy.decoded_reward
    return lambda x, t: toy.reward(finish(toy, x, t, generator, theta))


def clamped_gradients(toy: Toy, *, num_paths: int, seed: int) -> tuple[float, float, float]:
    """Share of sides outside the clip, and the largest gradient outside and the smallest inside it."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, t = draw(num_paths), NUM_STEPS // 2
    ref = mean_of_step(toy, x, t)
    mean, std = ref + 0.1 * spread(t), spread(t)
    siblings = mean.unsqueeze(-1) + std * draw(num_paths, 2)
    pair = step_pair(mean, ref, std, siblings, toy.decoded_reward(siblings, t - 1))
    good, bad = (
        LogLik(s.logp.detach().requires_grad_(), s.count, s.ref) for s in (pair.chosen, pair.rejected)
    )
    loss = build("spo_step", beta=BETA, clip=CLIP)(PairLogLik(good, bad)).sum()
    gradient = torch.stack(torch.autograd.grad(loss, (good.logp, bad.logp))).abs()
    ratio = torch.stack([s.log_ratio().detach().exp() for s in (good, bad)])
    outside = (ratio - 1).abs() > CLIP
    return float(outside.double().mean()), float(gradient[outside].max()), float(gradient[~outside].min())


def draw_figure(figure: Figure, *, shares: Tensor, curves: dict[str, Tensor], toy: Toy) -> None:
    """A toy, agreement by step, and the reward while learning."""
    first, middle, last = figure.subplots(1, 3)
    density = (toy.shares * torch.exp(-((GRID[:, None] - toy.modes) ** 2) / (2 * toy.width**2))).sum(-1)
    near = GRID.abs() < 3.5
    first.fill_between(GRID[near].tolist(), density[near].tolist(), color=COLOURS[5], alpha=0.4, label="data")
    first.plot(GRID[near].tolist(), toy.reward(GRID)[near].tolist(), color=COLOURS[1], label="reward")
    first.set(title="One of the toys", xlabel="x")
    first.legend()
    for series, name in enumerate(LABELS):
        band(middle, range(1, NUM_STEPS), shares[:, series], series, name)
    middle.set(
        title="Label agrees with the truth", xlabel="denoising step, from noise on", ylabel="share of pairs"
    )
    middle.legend()
    for series, (name, curve) in enumerate(curves.items()):
        band(last, range(0, 5 * curve.shape[1], 5), 100 * (curve / curve[:, :1] - 1), series, name)
    last.set(title="Learning by spo_step", xlabel="rounds", ylabel="expected reward, % gained")
    last.legend()


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Agreement in every toy, learning in a quarter of them, and the clip."""
    num_paths, num_rounds = (500, 10) if quick else (2000, 60)
    learners = max(4, seeds // 4)
    with stopwatch() as elapsed:
        toys = [make_toy(seed) for seed in range(seeds)]
        shares = torch.stack([agreement(toy, num_paths=num_paths, seed=s) for s, toy in enumerate(toys)])
        curves = {
            label: torch.tensor(
                [
                    train(toys[s], label=label, num_rounds=num_rounds, num_paths=128, seed=s)
                    for s in range(learners)
                ]
            )
            for label in LABELS[:2]
        }
        outside, most, least = clamped_gradients(toys[0], num_paths=num_paths, seed=0)
        means = [over_seeds(column) for column in shares.mean(-1).T]
        leads = [over_seeds((shares[:, 0] - shares[:, i]).mean(-1)) for i in (1, 2)]
        by_step = (shares[:, 0] - shares[:, 1]).mean(0)
        gained = {n: over_seeds(100 * (c[:, -1] / c[:, 0] - 1)) for n, c in curves.items()}
        end = [c[:, -1] for c in curves.values()]
        better = over_seeds(100 * (end[0] / end[1] - 1))
        seconds = elapsed()
    claim = partial(
        Claim, family="Reasoning and trees", method="Step-aware SPO", paper=PAPER,
        command=command("diffusion_steps"),
    )  # fmt: skip
    toy = f"1-D mixture of {NUM_MODES} Gaussians, {NUM_STEPS} exact denoising steps"
    claims = [
        claim(
            statement="A step's own label agrees with the true reward to go more often than the final "
            "sample's does",
            result=f"decoded step {means[0]:.3f}, final sample of each sibling {means[1]:.3f}, whole paths "
            f"{means[2]:.3f}; lead {leads[0]:+.3f} and {leads[1]:+.3f}; ahead of the final sample at "
            f"{int((by_step > 0).sum())} of {len(by_step)} steps",
            holds=verdict(leads[0].low > 0, leads[1].low > 0),
            what=f"{toy}; {seeds} random mixtures and rewards, {num_paths} pairs a step; one-step siblings",
        ),
        claim(
            statement="So it teaches more at the same number of pairs",
            result=f"expected reward gained: decoded step {gained[LABELS[0]]:.1f} %, final sample "
            f"{gained[LABELS[1]]:.1f} %; the first ends higher by {better:+.1f} %",
            holds=verdict(better.low > 0),
            what=f"{toy}; {num_rounds} rounds of 128 paths with spo_step, beta {BETA:g}, clip {CLIP}, "
            f"{learners} toys; exact expected reward",
        ),
        claim(
            statement="A side outside the clip has no gradient, a side inside has one",
            result=f"{100 * outside:.0f} % of the sides outside; largest gradient there {most:g}, smallest "
            f"inside {least:.3f}",
            holds=verdict(most == 0, least > 0),
            what=f"{toy}; policy a tenth of a deviation away from the reference, {num_paths} pairs",
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, shares=shares, curves=curves, toy=toys[0]),
        caption="A final sample labels all but the last steps badly; a decoded step only the first two.",
        seconds=seconds,
        size=(12.0, 3.6),
    )


if __name__ == "__main__":
    main("diffusion_steps", run, __doc__)
