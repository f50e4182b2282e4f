"""Is it the votes of several scorers that help, or the ranking that is made of them?

    python -m triptych.scripts.experiments.diffusion_ranked --save
    python -m triptych.scripts.experiments.diffusion_ranked --cache runs/evidence/base   # keep the base

Five scorers see a hidden reward, each with a bias of its own and noise; their votes grade lists of four
pictures. A small SDXL-class UNet learns from the lists, from their pairs, or from one scorer's pairs, at the
same number of pictures a step. It is judged on held-out prompts, from the base's noise, by the hidden reward
and by the share of warm hues, which is in no label. Training on random labels moves a model, too: every
effect is reported less that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.diffusion.likelihood import Example
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.ranking import relevance_from_votes
from triptych.objectives import ListLogLik, LogLik, PairLogLik, build
from triptych.scripts.experiments.common import MUTED, Claim, Outcome, bars, command, over_seeds, stopwatch
from triptych.scripts.experiments.diffusion_toy import (
    FULL,
    QUICK,
    TOY,
    Judge,
    Pool,
    Sizes,
    align,
    main,
    make_pool,
    pretrained,
)
from triptych.training.order import key
from triptych.training.stats import Estimate

NAME = "diffusion_ranked"
PAPER = "Karthik et al. 2024, arXiv 2410.18013"
REWARD, JUDGED = "redness", "warm_share"
# What each scorer likes besides the reward; ink hardly varies here.
BIASES = ("brightness", "saturation", "ink", "sharpness", "colourfulness")
BIAS, NOISE = 1.0, 0.7
BETA, RATE = 500.0, 1e-4
NUM_SEEDS = 3
SIZES = replace(FULL, lists=2, steps=40, images=32, repeats=4, ddim=10, probes=2)
Row = dict[str, float]


def scorers(pool: Pool, *, seed: int) -> Tensor:
    """Scores of every scorer, [n, P, K]: z(reward) + BIAS z(nuisance) + NOISE N(0, 1), z within lists."""
    generator = torch.Generator().manual_seed(key("scorers", seed))
    true = within(pool.score(REWARD))
    noise = torch.randn((len(BIASES), *true.shape), generator=generator, dtype=torch.float64)
    liked = torch.stack([within(pool.score(name)) for name in BIASES])
    return true + BIAS * liked + NOISE * noise


def within(score: Tensor) -> Tensor:
    """Less the list's mean, in deviations over the pool, [P, K]; only the order in a list counts."""
    centred = score - score.mean(-1, keepdim=True)
    return centred / centred.std().clamp(min=1e-12)


def votes(scores: Tensor) -> Tensor:
    """phi of scores [n, P, K], [P, K]."""
    return torch.tensor([relevance_from_votes(one.tolist()) for one in scores.unbind(1)], dtype=torch.float64)


def order_accuracy(said: Tensor, truth: Tensor) -> float:
    """Share of the pairs within each list that are said in the order of the truth; a tie counts half."""
    a, b = (list(side) for side in zip(*combinations(range(truth.shape[1]), 2), strict=True))
    agrees = (said[:, a] - said[:, b]).sign() * (truth[:, a] - truth[:, b]).sign()
    return float((0.5 + 0.5 * agrees).mean())


def top_and_bottom(said: Tensor, truth: Tensor) -> tuple[float, float]:
    """How often the best of a list [P, K] is said to be, and its two worst are said in their order."""
    order = truth.argsort(-1)
    top = said.argmax(-1) == order[:, -1]
    worst, next_worst = (said.gather(-1, order[:, [i]]) for i in (0, 1))
    return float(top.double().mean()), float((next_worst > worst).double().mean())


def pairs_of(pool: Pool, relevance: Tensor) -> list[Example]:
    """Every pair of unequal relevance, the better picture preferred."""
    gap = [float(relevance[i, a] - relevance[i, b]) for i, a, b in pool.pairs()]
    return [
        pool.pair((i, a, b) if g > 0 else (i, b, a))
        for (i, a, b), g in zip(pool.pairs(), gap, strict=True)
        if g != 0
    ]


def arms(pool: Pool, *, seed: int) -> dict[str, Callable[[Denoiser, Sizes], Denoiser]]:
    """Name -> what trains the base; all at sizes.images pictures a step."""
    scores = scorers(pool, seed=seed)
    phi = votes(scores)
    chance = torch.rand(phi.shape, generator=torch.Generator().manual_seed(key("chance", seed)))
    best = [pool.single((i, int(k))) for i, k in enumerate(phi.argmax(-1))]

    def learns(name: str, examples: Sequence[Example], **options: Any):
        def train(base: Denoiser, sizes: Sizes) -> Denoiser:
            return align(base, examples, name, sizes, seed=seed, lr=RATE, **options).policy

        return train

    return {
        "rank_dpo": learns("rank_dpo", pool.ranked(phi), beta=BETA, weights="normalised"),
        "plackett_luce": learns("plackett_luce", pool.ranked(phi), beta=BETA),
        "dpo": learns("dpo", pairs_of(pool, phi), beta=BETA),
        "dpo, one scorer": learns("dpo", pairs_of(pool, scores[0]), beta=BETA),
        "sft": learns("sft", best),
        "random": learns("dpo", pairs_of(pool, chance), beta=BETA),
    }


def run_seed(base: Denoiser, sizes: Sizes, *, seed: int) -> dict[str, Row]:
    """Every arm on one pool, and how right the labels are."""
    pool, judge = make_pool(base, sizes, seed=seed), Judge.of(base, sizes, seed=seed)
    scores, truth = scorers(pool, seed=seed), pool.score(REWARD)
    single = [order_accuracy(one, truth) for one in scores]
    found: dict[str, Row] = {
        "base": judge.look(base, reward=REWARD, judged=JUDGED),
        "labels": {
            "votes": order_accuracy(votes(scores), truth),
            "single": sum(single) / len(single),
            "best": max(single),
            "first": single[0],
        },
    }
    for name, learn in arms(pool, seed=seed).items():
        policy = learn(base, sizes)
        said, _ = judge.probe.implicit(policy)
        top, bottom = top_and_bottom(said, judge.pool.score(REWARD))
        found[name] = judge.look(policy, reward=REWARD, judged=JUDGED) | {"top": top, "bottom": bottom}
        text = ", ".join(f"{n} {v:.4g}" for n, v in found[name].items())
        print(f"seed {seed}, {name}: {text}", file=sys.stderr, flush=True)
    return found


@dataclass(frozen=True, slots=True)
class Results:
    """A row a seed: arm -> quantity -> value."""

    rows: Sequence[Mapping[str, Row]]

    def of(self, arm: str, quantity: str) -> Tensor:
        """[S] float64."""
        return torch.tensor([row[arm][quantity] for row in self.rows], dtype=torch.float64)

    def gap(self, arm: str, other: str, quantity: str) -> Estimate:
        """One arm less another on the same seeds."""
        return over_seeds(self.of(arm, quantity) - self.of(other, quantity))


def two_as_weighted_dpo(num: int = 200) -> tuple[float, float]:
    """Largest difference of raw rank_dpo at K = 2 from gain-weighted dpo, and largest gradient of a tie."""
    generator = torch.Generator().manual_seed(0)
    logp, ref, phi = (torch.rand((num, 2), generator=generator, dtype=torch.float64) for _ in range(3))
    rank_dpo, dpo = build("rank_dpo", beta=5.0, weights="raw"), build("dpo", beta=5.0)
    ranked = rank_dpo(ListLogLik(LogLik(logp, torch.ones_like(logp), ref), phi))
    order = phi.argsort(-1, descending=True)
    good, bad = (
        LogLik(logp.gather(1, i), torch.ones(num, 1).double(), ref.gather(1, i)) for i in order.split(1, 1)
    )
    plain = dpo(PairLogLik(good.mapped(lambda t: t.squeeze(1)), bad.mapped(lambda t: t.squeeze(1))))
    discount = (1 / torch.tensor([2.0, 3.0], dtype=torch.float64).log()).diff().abs()
    weight = phi.exp2().diff().abs().squeeze(1) * discount
    tied = logp.clone().requires_grad_()
    level = rank_dpo(ListLogLik(LogLik(tied, torch.ones_like(tied), ref), torch.full_like(phi, 0.5)))
    (gradient,) = torch.autograd.grad(level.sum(), tied)
    return float((ranked - weight * plain).abs().max()), float(gradient.abs().max())


def draw_figure(figure: Figure, *, found: Results) -> None:
    """Effects less the control, and what the implicit reward gets right."""
    left, middle, right = figure.subplots(1, 3)
    names = ["rank_dpo", "plackett_luce", "dpo", "dpo, one scorer", "sft"]
    titles = ["rank_dpo", "plackett\n_luce", "dpo", "dpo, one\nscorer", "sft"]
    for ax, quantity, title in (
        (left, "reward", "Hidden reward"),
        (middle, "judged", "Warm hues, in no label"),
    ):
        bars(ax, titles, [found.gap(name, "random", quantity) for name in names])
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        ax.set(title=title, ylabel="less that of random labels")
        ax.tick_params(axis="x", labelsize=8)
    for series, (quantity, label) in enumerate(
        (("top", "best of a list"), ("bottom", "order of the two worst"))
    ):
        estimates = [over_seeds(found.of(name, quantity)) for name in [*names[:4], "random"]]
        bars(
            right,
            [*titles[:4], "random\nlabels"],
            estimates,
            series=series,
            shift=0.16 * series - 0.08,
            label=label,
        )
    right.set(title="Implicit reward is right", ylabel="share of held-out lists", ylim=(0, 1.0))
    right.tick_params(axis="x", labelsize=8)
    right.legend(loc="lower left")


def run(*, seeds: int, quick: bool = False, cache: Path | None = None) -> Outcome:
    """All arms on up to three seeds."""
    sizes, num_seeds = (QUICK, 2) if quick else (SIZES, min(seeds, NUM_SEEDS))
    with stopwatch() as elapsed:
        base = pretrained(sizes.pretraining, cache)
        found = Results([run_seed(base, sizes, seed=seed) for seed in range(num_seeds)])
        exact = two_as_weighted_dpo()
        seconds = elapsed()
    return Outcome(
        claims=claims_of(found, exact, sizes, num_seeds),
        figure=partial(draw_figure, found=found),
        caption="Lists graded by five scorers' votes, at equal pictures a step. Left and middle: change on "
        "held-out prompts less that of random labels, 95 % intervals over seeds.",
        seconds=seconds,
        size=(13.0, 3.8),
    )


def positive(estimate: Estimate) -> bool | None:
    """Whether it is above 0: None where the interval contains 0, False where it is below."""
    return True if estimate.low > 0 else False if estimate.high < 0 else None


def together(*parts: bool | None) -> bool | None:
    """True if all are, False if none is, otherwise None."""
    return True if all(parts) else False if not any(p is not False for p in parts) else None


def claims_of(found: Results, exact: tuple[float, float], sizes: Sizes, num_seeds: int) -> list[Claim]:
    """What is compared, with intervals over seeds."""
    lists = sizes.lists * sizes.prompts
    what = (
        f"{TOY}; {lists} lists of 4 and five scorers (redness + {BIAS:g} x {', '.join(BIASES)}, "
        f"noise {NOISE:g}), {sizes.steps} steps of {sizes.images} pictures, beta {BETA:g}, rate {RATE:g}; "
        f"{sizes.judged} held-out prompts x {sizes.repeats} pictures, {sizes.ddim} DDIM steps; "
        f"{num_seeds} seeds"
    )
    claim = partial(
        Claim, family="Diffusion", method="RankDPO", paper=PAPER, what=what, command=command(NAME)
    )
    gap = found.gap
    right = over_seeds(found.of("labels", "votes") - found.of("labels", "single"))
    means = {n: float(found.of("labels", n).mean()) for n in ("votes", "single", "best", "first")}
    more = {q: gap("dpo", "dpo, one scorer", q) for q in ("reward", "judged")}
    single = {q: gap("dpo, one scorer", "random", q) for q in ("reward", "judged")}
    many = {q: gap("dpo", "random", q) for q in ("reward", "judged")}
    ranked = {q: gap("rank_dpo", "dpo", q) for q in ("reward", "judged")}
    dcg, luce, imitated = (gap(n, "random", "reward") for n in ("rank_dpo", "plackett_luce", "sft"))
    top, bottom = (found.of("rank_dpo", q) - found.of("plackett_luce", q) for q in ("top", "bottom"))
    difference, tied = exact
    return [
        claim(
            method="Votes of scorers",
            statement="The votes of five scorers order pairs by the hidden reward better than a scorer does",
            result=f"votes {means['votes']:.3f}, mean scorer {means['single']:.3f}, best "
            f"{means['best']:.3f}; votes less mean scorer {right:+.3f}",
            holds=positive(right),
        ),
        claim(
            method="Votes of scorers",
            statement="dpo on their votes gains more than dpo on one scorer, and that more than on random "
            "labels",
            result=f"hidden reward: votes less one scorer {more['reward']:+.4f}, one scorer less random "
            f"{single['reward']:+.4f}, votes less random {many['reward']:+.4f}; warm hues "
            f"{more['judged']:+.3f}, {single['judged']:+.3f}, {many['judged']:+.3f}; that scorer's labels "
            f"{means['first']:.3f} right",
            holds=together(positive(more["reward"]), positive(single["reward"])),
        ),
        claim(
            statement="rank_dpo gains more than pairwise dpo from the same votes at equal picture "
            "evaluations",
            result=f"rank_dpo less dpo: hidden reward {ranked['reward']:+.4f}, warm hues "
            f"{ranked['judged']:+.3f}; less random labels: rank_dpo "
            f"{dcg:+.4f}, plackett_luce {luce:+.4f}, sft on the best "
            f"{imitated:+.4f}",
            holds=positive(ranked["reward"]),
        ),
        claim(
            statement="DCG weights raise how often the best picture is found more than how often the two "
            "worst are in order, against the unweighted ranking of plackett_luce",
            result=f"best {over_seeds(top):+.3f}, two worst {over_seeds(bottom):+.3f}, "
            f"difference {over_seeds(top - bottom):+.3f}",
            holds=positive(over_seeds(top - bottom)),
        ),
        claim(
            statement="Of two pictures rank_dpo is dpo times a gain; pictures of equal relevance have no "
            "gradient",
            result=f"largest difference {difference:.1g}, largest gradient of a tie {tied:g}",
            holds=difference < 1e-12 and tied == 0,
            what="200 random lists of two, exact",
        ),
    ]


if __name__ == "__main__":
    main(NAME, run, __doc__)
