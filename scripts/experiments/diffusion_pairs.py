"""Does Diffusion-DPO obey its labels: true, flipped, random, noisy, and a scorer's?

    python -m triptych.scripts.experiments.diffusion_pairs --save
    python -m triptych.scripts.experiments.diffusion_pairs --cache runs/evidence/diffusion   # keep the base

A small SDXL-class UNet samples a pool of pictures, pairs are labelled by how red they are, and the UNet is
trained on them. It is judged on held-out prompts by another measure, the share of warm hues, which no label
and no scorer ever saw, from the same noise as the untrained model. Training on random labels moves a model
too: every effect is reported less that of random labels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from triptych.modalities.diffusion.likelihood import DiffusionBatch
from triptych.modalities.diffusion.policy import Denoiser
from triptych.objectives import Input
from triptych.scripts.experiments.common import (
    COLOURS,
    MARKERS,
    MUTED,
    Claim,
    Outcome,
    bars,
    command,
    over_seeds,
    stopwatch,
    verdict,
)
from triptych.scripts.experiments.diffusion_toy import (
    FULL,
    MAX_SEEDS,
    QUICK,
    TOY,
    Judge,
    Pair,
    Pool,
    Sizes,
    align,
    likelihood,
    main,
    make_pool,
    pretrained,
    train,
)
from triptych.training.config import ObjectiveConfig, OptimConfig
from triptych.training.order import key
from triptych.training.stats import Estimate

NAME = "diffusion_pairs"
PAPER = "Wallace et al. 2023, arXiv 2311.12908"
REWARD, JUDGED = "redness", "warm_share"
BETA, RATE = 500.0, 1e-4
BETAS = (50.0, BETA, 5000.0)
# Of Bradley-Terry labels, in deviations of the reward; the last is close to chance.
TEMPERATURES = (0.1, 1.0, 6.0)
SCORER_PAIRS = (12, 600)
SCORER_STEPS = 150
BEST, BEST_OF, SHOWN = "best of 4", 4, 20
Row = dict[str, float]


def bradley_terry(pool: Pool, *, temperature: float, seed: int) -> list[Pair]:
    """Every pair of the pool, the preferred picture first: P = sigmoid(gap of the reward / temperature)."""
    reward = pool.score(REWARD)
    return preferred(pool.pairs(), reward / (temperature * reward.std()), seed=key("labels", seed))


def preferred(pairs: Sequence[Pair], score: Tensor, *, seed: int) -> list[Pair]:
    """The pairs by a draw of Bradley-Terry's model on score [P, K]."""
    generator = torch.Generator().manual_seed(seed)
    coin = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    gap = torch.stack([score[i, a] - score[i, b] for i, a, b in pairs])
    kept = coin < gap.sigmoid()
    return [(i, a, b) if k else (i, b, a) for (i, a, b), k in zip(pairs, kept.tolist(), strict=True)]


def flipped(pairs: Sequence[Pair]) -> list[Pair]:
    """The opposite labels: those of the reward -r."""
    return [(i, b, a) for i, a, b in pairs]


def accuracy(pairs: Sequence[Pair], score: Tensor) -> float:
    """Share of the pairs whose preferred picture has the higher score."""
    return float(torch.stack([score[i, a] > score[i, b] for i, a, b in pairs]).double().mean())


class Scorer(nn.Module):
    """A small convolutional net that gives each picture [N, Z, H, W] a score, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores, [N]."""
        return self.net(pictures).squeeze(-1)


@dataclass(frozen=True, slots=True)
class ScoreLikelihood:
    """A scorer's score of the clean picture in the place of a log-likelihood, for `reward_bt`."""

    def __call__(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Input:
        """The objective's input."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Tensor:
        """Scores of the candidates, [C, 1]."""
        (stack,) = batch.stacks
        return policy(stack.latents)[stack.cell.argsort()].unsqueeze(-1)

    def assemble(self, terms: Tensor, batch: DiffusionBatch) -> Input:
        """As for the log-likelihoods of pictures."""
        return likelihood().assemble(terms, batch)


def scored(pool: Pool, *, num_pairs: int, num_steps: int, seed: int) -> Tensor:
    """Scores [P, K] of a scorer that learnt from some of the pool's pairs, labelled at temperature 1."""
    labels = bradley_terry(pool, temperature=1.0, seed=key("scorer", seed))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key("taken", seed)))
    taken = [pool.pair(labels[i]) for i in order[:num_pairs].tolist()]
    batch = min(32, len(taken))
    optim = OptimConfig(lr=3e-3, batch_size=batch, micro_batch_size=batch, num_steps=num_steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("scorer", seed, num_pairs))
        scorer = Scorer()
    objective = ObjectiveConfig(name="reward_bt", reference="none")
    train(scorer, taken, objective, optim, seed=seed, adapter=ScoreLikelihood())
    with torch.no_grad():
        return scorer(pool.pictures.flatten(0, 1)).view(pool.pictures.shape[:2]).double()


def labels_of(pool: Pool, *, seed: int, num_steps: int) -> dict[str, list[Pair]]:
    """Every kind of label, on the same pairs."""
    true, noisy, chance = (bradley_terry(pool, temperature=t, seed=seed) for t in TEMPERATURES)
    named = {
        "true": true,
        "flipped": flipped(true),
        "random": preferred(pool.pairs(), torch.zeros(pool.pictures.shape[:2]), seed=key("random", seed)),
        "noisy": noisy,
        "near chance": chance,
    }
    for name, num_pairs in zip(("weak scorer", "good scorer"), SCORER_PAIRS, strict=True):
        said = scored(pool, num_pairs=num_pairs, num_steps=num_steps, seed=seed)
        # A scorer's label is its order: Bradley-Terry at temperature 0.
        named[name] = preferred(pool.pairs(), 1e9 * said, seed=0)
    return named


def arms() -> dict[str, tuple[str, float, float]]:
    """Name -> labels, beta, learning rate."""
    low, _, high = BETAS
    same = ("true", "flipped", "random", "noisy", "near chance", "weak scorer", "good scorer")
    return {
        **{name: (name, BETA, RATE) for name in same},
        **{f"{n}, beta {b:g}": (n, b, RATE) for n in ("true", "random") for b in (low, high)},
        "fast": ("true", BETA, 10 * RATE),
    }


def run_seed(base: Denoiser, sizes: Sizes, *, seed: int) -> tuple[dict[str, Row], dict[str, Tensor]]:
    """Every arm on one pool: what `Judge.look` says of it, its labels' accuracy, first loss and cost.

    Also some pictures of those that are shown, [P, Z, H, W].
    """
    pool, judge = make_pool(base, sizes, seed=seed), Judge.of(base, sizes, seed=seed)
    steps = SCORER_STEPS if sizes is not QUICK else 10
    labels, truth = labels_of(pool, seed=seed, num_steps=steps), pool.score(REWARD)
    look = partial(judge.look, reward=REWARD, judged=JUDGED)
    found: dict[str, Row] = {"base": look(base), BEST: best_of(judge)}
    shown = {"base": judge.pool.pictures[:SHOWN, 0]}
    for name, (kind, beta, lr) in arms().items():
        pairs = [pool.pair(pair) for pair in labels[kind]]
        trained = align(base, pairs, "dpo", sizes, seed=seed, lr=lr, beta=beta)
        found[name] = look(trained.policy) | {
            "labels": accuracy(labels[kind], truth),
            "first": trained.losses[0],
            "evaluations": trained.evaluations,
        }
        if name in ("true", "flipped", "random") and seed == 0:
            shown[name] = judge.draw(trained.policy)[:SHOWN, 0]
        print(f"seed {seed}, {name}: {_short(found[name])}", file=sys.stderr, flush=True)
    winners = [pool.single((i, a)) for i, a, _ in labels["true"]]
    trained = align(base, winners, "sft", sizes, seed=seed, lr=RATE)
    found["sft"] = look(trained.policy) | {"evaluations": trained.evaluations}
    print(f"seed {seed}, sft: {_short(found['sft'])}", file=sys.stderr, flush=True)
    return found, shown


def _short(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def best_of(judge: Judge) -> Row:
    """The reddest of four of the base's pictures of each held-out prompt: no training, more sampling."""
    reward, judged = (judge.pool.score(name)[:, :BEST_OF] for name in (REWARD, JUDGED))
    place = reward.argmax(-1, keepdim=True)
    taken = judged.gather(-1, place)
    return {"reward": float(reward.gather(-1, place).mean()), "judged": float(taken.mean())}


@dataclass(frozen=True, slots=True)
class Results:
    """Arm -> quantity -> a value a seed."""

    rows: Sequence[Mapping[str, Row]]

    def of(self, arm: str, quantity: str = "judged") -> Tensor:
        """[S] float64."""
        return torch.tensor([row[arm][quantity] for row in self.rows], dtype=torch.float64)

    def mean(self, arm: str, quantity: str = "judged") -> Estimate:
        """With its interval over seeds."""
        return over_seeds(self.of(arm, quantity))

    def over(self, arm: str, control: str = "random", *, quantity: str = "judged") -> Estimate:
        """The arm less another one of the same seed."""
        return over_seeds(self.of(arm, quantity) - self.of(control, quantity))


def claims_of(found: Results, what: str) -> list[Claim]:
    """The table."""
    claim = partial(Claim, family="Diffusion", paper=PAPER, command=command(NAME))
    dpo = partial(claim, method="Diffusion-DPO", what=what)
    first = torch.stack([found.of(name, "first") for name in arms()])
    wrong = float((first - math.log(2)).abs().max())
    half = over_seeds((found.of("true") - found.of("flipped")) / 2)
    up, down, drift = found.over("true"), found.over("flipped"), found.mean("random", "drift")
    moved = found.over("random", "base")
    return [
        dpo(
            statement="The loss before the first update is ln 2, whatever the labels and beta",
            result=f"largest difference {wrong:.1e} over {first.numel()} runs",
            holds=wrong < 1e-6,
        ),
        dpo(
            statement="True labels raise what is judged over the random-label control, flipped ones lower it",
            result=f"warm share less the control: true {up:+.3f}, flipped {down:+.3f}, half their difference "
            f"{half:+.3f}; redness {found.over('true', quantity='reward'):+.3f} and "
            f"{found.over('flipped', quantity='reward'):+.3f}; the control itself moved by {moved:+.3f} from "
            f"the base's {found.mean('base'):.3f} (drift {drift:.4f})",
            holds=verdict(up.low > 0, down.high < 0),
        ),
        _beta_claim(found, dpo),
        _accuracy_claim(found, dpo),
        _scorer_claim(found, dpo),
        _rivals_claim(found, dpo),
        _implicit_claim(found, dpo),
    ]


def _beta_claim(found: Results, claim: Any) -> Claim:
    names = [_at_beta("true", beta) for beta in BETAS]
    controls = [_at_beta("random", beta) for beta in BETAS]
    net = [found.of(n) - found.of(c) for n, c in zip(names, controls, strict=True)]
    gains = [over_seeds(a - b) for a, b in pairwise(net)]
    grown = [found.over(a, b, quantity="drift") for a, b in pairwise(names)]
    points = [
        f"beta {beta:g}: {over_seeds(value):+.3f} at drift {found.mean(name, 'drift'):.3f}"
        for beta, value, name in zip(BETAS, net, names, strict=True)
    ]
    return claim(
        statement="As beta falls, the effect over random labels of the same beta rises and the drift grows",
        result="; ".join(points)
        + f"; effects {falling(net)}; steps down in beta, from the largest: effect {gains[1]:+.3f}, "
        f"{gains[0]:+.3f}, drift {grown[1]:+.3f}, {grown[0]:+.3f}",
        holds=verdict(*(e.low > 0 for e in (*gains, *grown))),
    )


def falling(values: Sequence[Tensor]) -> str:
    """In how many seeds values [S] of several arms fall from arm to arm: what wide intervals hide."""
    ordered = torch.stack([a > b for a, b in pairwise(values)]).all(0)
    return f"falling in this order in {int(ordered.sum())} of {len(ordered)} seeds"


def _at_beta(labels: str, beta: float) -> str:
    return labels if beta == BETA else f"{labels}, beta {beta:g}"


def _accuracy_claim(found: Results, claim: Any) -> Claim:
    names = ("true", "noisy", "near chance")
    steps = [found.over(a, b, quantity="wins") for a, b in pairwise(names)]
    points = [f"{found.mean(n, 'labels'):.3f} right: {found.mean(n, 'wins'):.3f}" for n in names]
    return claim(
        statement="The win rate against the base grows with the accuracy of the labels",
        result="; ".join(points)
        + f", {falling([found.of(n, 'wins') for n in names])}; steps {steps[0]:+.3f} and {steps[1]:+.3f}; "
        f"random labels {found.mean('random', 'wins'):.3f}",
        holds=verdict(*(step.low > 0 for step in steps)),
    )


def _scorer_claim(found: Results, claim: Any) -> Claim:
    names = ("weak scorer", "good scorer", "true")
    points = [f"{n} ({found.mean(n, 'labels'):.3f} right) {found.over(n):+.3f}" for n in names]
    step, left = found.over("good scorer", "weak scorer"), found.over("true", "good scorer")
    return claim(
        method="Diffusion-DPO, AI feedback",
        statement="Labels of a learnt scorer teach more the better it is, and a good one's nearly as much as "
        "the true ones",
        result=f"warm share less the control: {', '.join(points)}; good and weak "
        f"{falling([found.of(n) for n in reversed(names[:2])])}; good less weak {step:+.3f}, true less good "
        f"{left:+.3f}",
        holds=verdict(step.low > 0, left.high < 0.5 * found.over("true").mean),
    )


def _rivals_claim(found: Results, claim: Any) -> Claim:
    lead, best = found.over("true", "sft"), found.over("true", BEST)
    cost = {name: found.of(name, "evaluations")[0].item() for name in ("true", "sft")}
    return claim(
        statement="On the same winners it gains more than SFT at the same number of pictures a step",
        result=f"warm share over the base: DPO {found.over('true', 'base'):+.3f}, SFT "
        f"{found.over('sft', 'base'):+.3f}, {BEST} {found.over(BEST, 'base'):+.3f}; DPO less SFT "
        f"{lead:+.3f}, less {BEST} {best:+.3f}; rows through a UNet {cost['true']:.0f} "
        f"and {cost['sft']:.0f}; diversity "
        + ", ".join(f"{n} {found.mean(n, 'diversity'):.3f}" for n in ("base", "true", "sft")),
        holds=verdict(lead.low > 0),
    )


def _implicit_claim(found: Results, claim: Any) -> Claim:
    seen = ("true", "fast", "flipped", "random")
    points = [
        f"{n}: accuracy {found.mean(n, 'accuracy'):.3f}, warm share {found.over(n, 'base'):+.3f}, drift "
        f"{found.mean(n, 'drift'):.3f}"
        for n in seen
    ]
    same = found.over("fast", "true", quantity="accuracy")
    times = over_seeds((found.of("fast", "drift") / found.of("true", "drift")).log10())
    return claim(
        statement="The implicit reward's accuracy on held-out pairs is no evaluation: at ten times the "
        "learning rate it stays within 0.05 while the model drifts more than twice as far",
        result=f"{'; '.join(points)} (fast: ten times the rate); accuracy {same:+.3f}, log10 of the drifts' "
        f"ratio {times:.2f}",
        holds=verdict(same.low > -0.05 and same.high < 0.05, times.low > math.log10(2)),
    )


def draw_figure(figure: Figure, *, found: Results, shown: Mapping[str, Tensor]) -> None:
    """Pictures from the same noise; effects by label; beta; accuracy of the labels."""
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.5, 2])
    top, below = halves
    axes = top.subplots(len(shown), 1)
    titles = {"base": "base", "true": "true labels", "flipped": "flipped", "random": "random"}
    for ax, (name, pictures) in zip(axes, shown.items(), strict=True):
        strip = torch.nn.functional.pad((pictures + 1) / 2, (1, 1, 1, 1), value=1.0)
        ax.imshow(torch.cat(list(strip.permute(0, 2, 3, 1)), 1).numpy(), interpolation="nearest")
        ax.set_axis_off()
        ax.text(-0.01, 0.5, titles[name], transform=ax.transAxes, ha="right", va="center")
    axes[0].set_title("Held-out prompts, the same noise in every row")
    first, middle, last = below.subplots(1, 3)
    labels = {"true": "true", "good scorer": "good\nscorer", "weak scorer": "weak\nscorer", "noisy": "noisy"}
    labels |= {"near chance": "near\nchance", "flipped": "flipped"}
    first.axhline(0, color=MUTED, linewidth=1)
    bars(first, list(labels.values()), [found.over(n) for n in labels])
    first.tick_params(axis="x", labelsize=8)
    first.set(title="What the labels do", ylabel="warm share less random labels")
    for series, (kind, label) in enumerate((("true", "true labels"), ("random", "random labels"))):
        names = [_at_beta(kind, beta) for beta in BETAS]
        _cross(middle, found, names, "drift", "judged", series, label)
    for beta in BETAS:
        place = (found.mean(_at_beta("true", beta), "drift").mean, found.mean(_at_beta("true", beta)).mean)
        middle.annotate(f"{beta:g}", place, textcoords="offset points", xytext=(6, -12), fontsize=8)
    middle.set(title="As beta falls", xlabel="drift from the base", ylabel="warm share", xscale="log")
    middle.minorticks_off()
    middle.legend()
    _cross(last, found, ["near chance", "noisy", "true"], "labels", "wins", 0, "Bradley-Terry")
    _cross(last, found, ["weak scorer", "good scorer"], "labels", "wins", 1, "learnt scorer")
    last.axhline(found.mean("random", "wins").mean, color=MUTED, linewidth=1, label="random labels")
    last.set(title="Better labels win more", xlabel="accuracy of the labels", ylabel="wins against the base")
    last.legend()


def _cross(ax: Axes, found: Results, names: Sequence[str], x: str, y: str, series: int, label: str) -> None:
    """Points of two quantities joined by a line, the second one's interval as a bar."""
    across, up = [found.mean(n, x).mean for n in names], [found.mean(n, y) for n in names]
    bar = [[e.mean - e.low for e in up], [e.high - e.mean for e in up]]
    style = {"marker": MARKERS[series], "color": COLOURS[series], "capsize": 3, "label": label}
    ax.errorbar(across, [e.mean for e in up], yerr=bar, **style)


def run(*, seeds: int, quick: bool = False, cache: Path | None = None) -> Outcome:
    """Every arm for each of at most `MAX_SEEDS` seeds, as a seed costs minutes."""
    sizes, num = QUICK if quick else FULL, min(seeds, MAX_SEEDS)
    with stopwatch() as elapsed:
        base = pretrained(sizes.pretraining, cache)
        done = [run_seed(base, sizes, seed=seed) for seed in range(num)]
        seconds = elapsed()
    found = Results([rows for rows, _ in done])
    what = (
        f"{TOY}; {len(arms()) + 1} runs of {sizes.steps} steps with {sizes.images} pictures in each of {num} "
        f"seeds, labels by redness on {sizes.prompts} prompts, warm share on {sizes.judged} others with "
        f"{sizes.repeats} pictures; beta {BETA:g} on mean errors, {BETA / 768:.2g} on sums"
    )
    return Outcome(
        claims=claims_of(found, what),
        figure=partial(draw_figure, found=found, shown=done[0][1]),
        caption="Pictures follow the labels they were trained on, as far as these are right and beta lets "
        "them. Rows of pictures: the untrained model, then training on redness, on the opposite and on "
        "coin flips; effects are those on held-out prompts, with 95 % intervals over seeds.",
        seconds=seconds,
        size=(12.0, 6.6),
    )


if __name__ == "__main__":
    main(NAME, run, __doc__)
