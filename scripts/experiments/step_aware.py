"""Is a denoising step better judged by itself than by the picture that its path ends in?

    python -m triptych.scripts.experiments.step_aware --save
    python -m triptych.scripts.experiments.step_aware --cache runs/evidence/base   # keep the base

A small SDXL-class UNet learns online, from siblings of one step that are judged by x_0 as the next step sees
it (step-aware SPO), or from whole paths judged by their pictures (D3PO, DDPO), at equal UNet evaluations. A
detail that late steps settle is rewarded, or a layout that early ones do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.diffusion.measures import diversity
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.transitions import shared_state_margin
from triptych.objectives import LogLik, PairLogLik, build
from triptych.scripts.experiments.common import (
    MUTED,
    Claim,
    Outcome,
    band,
    bars,
    command,
    over_seeds,
    stopwatch,
)
from triptych.scripts.experiments.diffusion_ranked import Results, Row, positive, together
from triptych.scripts.experiments.diffusion_toy import images, main
from triptych.scripts.experiments.step_aware_arms import (
    BETA,
    CLIP,
    DRIFT,
    SIBLINGS,
    Arm,
    arms,
    counted,
    learn,
)
from triptych.scripts.experiments.step_aware_scorers import BINS, KINDS, NOISY, by_time
from triptych.scripts.experiments.step_aware_toy import (
    DETAIL,
    FULL,
    HELD_OUT,
    LAYOUT,
    QUICK,
    REWARDS,
    TOY,
    TRAINED,
    Reward,
    Sizes,
    clean_by_step,
    finished,
    live_of,
    pictures_of,
    placeless,
    port,
    predictions,
    prompts_of,
)
from triptych.training.groups import Group
from triptych.training.stats import Estimate

NAME = "step_aware"
SPO = "Liang et al. 2024, arXiv 2406.04314"
TUNING_SEED = 100
NUM_SEEDS = 3
TRUE = ("step-wise", "d3po", "ddpo")
Fields = dict[str, Any]


def deviation(values: Tensor) -> float:
    """Mean standard deviation within the rows of [P, K]."""
    return float(values.std(-1).mean())


def of_pictures(reward: Reward, pictures: Tensor, *, judged: bool = False) -> Tensor:
    """A reward's measure, or what is judged beside it, of [P, K, Z, H, W], [P, K]."""
    found = (reward.judged if judged else reward.measure)(pictures.flatten(0, 1))
    return found.view(pictures.shape[:2])


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out prompts, the noise of a seed, and what the base makes of them.

    groups: the base's paths; said: its predictions there, [T, N, Z, H, W].
    """

    sizes: Sizes
    seed: int
    groups: list[Group]
    pictures: Tensor
    said: Tensor

    @classmethod
    def of(cls, base: Denoiser, sizes: Sizes, *, seed: int) -> Judged:
        """The base's own pictures are drawn once."""
        groups = pictures_of(base, HELD_OUT, sizes.pictures, sizes.steps, seed=seed)
        some = [
            replace(g, candidates=g.candidates[:3], mask=g.mask[:3], logp=None, origin=()) for g in groups
        ]
        return cls(sizes, seed, some, finished(groups), predictions(base, some, sizes.steps))

    def draw(self, policy: Denoiser) -> Tensor:
        """A policy's pictures from the noise of the base's, [P, K, Z, H, W]."""
        return finished(pictures_of(policy, HELD_OUT, self.sizes.pictures, self.sizes.steps, seed=self.seed))

    def look(self, policy: Denoiser) -> tuple[Row, Tensor]:
        """Gains over the base in deviations of its pictures of a prompt, drift and diversity; pictures.

        drift: mean (v_policy - v_base)^2 along the base's paths. level: a gain as it would be at DRIFT.
        """
        pictures, row = self.draw(policy), {}
        for reward in REWARDS:
            for judged, name in ((False, reward.name), (True, f"{reward.name}, judged")):
                before, after = (of_pictures(reward, p, judged=judged) for p in (self.pictures, pictures))
                row[name] = float((after - before).mean()) / max(deviation(before), 1e-12)
        away = predictions(policy, self.groups, self.sizes.steps) - self.said
        row["drift"] = float(away.square().mean())
        for reward in REWARDS:
            # Near the base gains grow as the root of the drift.
            row[f"{reward.name}, level"] = row[reward.name] * math.sqrt(DRIFT / max(row["drift"], 1e-12))
        row["diversity"] = float(np.mean(diversity([images(p) for p in pictures])))
        return row, pictures


def settled(base: Denoiser, sizes: Sizes, *, seed: int) -> dict[str, list[float]]:
    """Reward -> its correlation, within prompts, at x_0 as each step sees it with that of the picture."""
    groups = pictures_of(base, TRAINED, max(2, sizes.pictures // 2), sizes.steps, seed=seed)
    clean = clean_by_step(base, groups, sizes.steps).clamp(-1, 1)
    found = {}
    for reward in REWARDS:
        values = torch.stack([of_pictures(reward, c) for c in clean])
        centred = values - values.mean(-1, keepdim=True)
        both = (centred * centred[-1]).sum((1, 2))
        found[reward.name] = (
            both / (centred.square().sum((1, 2)) * centred[-1].square().sum()).sqrt().clamp(min=1e-12)
        ).tolist()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Everything, over seeds. settled, scorers: lists a seed. pictures: of seed 0, by arm, [P, K, Z, H, W].

    exact: largest differences, see `shared_state`.
    """

    table: Results
    settled: Sequence[Mapping[str, Sequence[float]]]
    scorers: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]
    pictures: Mapping[str, Tensor]
    exact: Row

    def curve(self, reward: str) -> Tensor:
        """How settled the reward is by step, [S, T]."""
        return torch.tensor([one[reward] for one in self.settled])

    def accuracy(self, reward: str, kind: str) -> Tensor:
        """Of scorers by bin of times, [S, bins]."""
        return torch.tensor([one[reward][kind] for one in self.scorers])

    def lead(self, reward: str, kind: str, other: str) -> Estimate:
        """One scorer's accuracy less another's on noisy steps."""
        gap = self.accuracy(reward, kind) - self.accuracy(reward, other)
        return over_seeds(gap[:, list(NOISY)].mean(-1))


def search(base: Denoiser, sizes: Sizes, *, num_seeds: int) -> Found:
    """All arms and scorers of all seeds."""
    tuning = finished(pictures_of(base, TRAINED, sizes.pictures, sizes.steps, seed=TUNING_SEED))
    scales = {r.name: deviation(of_pictures(r, tuning)) for r in REWARDS}
    rows, kept, exact = [], {}, {}
    for seed in range(num_seeds):
        judged, row = Judged.of(base, sizes, seed=seed), {}
        kept.setdefault("base", judged.pictures)
        for name, arm in arms(scales, sizes).items():
            learnt = learn(base, arm, sizes, seed=seed)
            row[name], pictures = judged.look(learnt.policy)
            cost = learnt.rows
            row[name] |= {"rows": cost.total, "sampling": cost.sampling, "steps": learnt.num_steps}
            kept.setdefault(name, pictures)
            exact = exact or shared_state(learnt.policy, base, arm, sizes)
            text = ", ".join(f"{n} {v:.4g}" for n, v in row[name].items())
            print(f"seed {seed}, {name}: {text}", file=sys.stderr, flush=True)
        rows.append(row)
    scorers = [by_time(base, REWARDS, sizes, seed=seed) for seed in range(num_seeds)]
    print(f"scorers: {scorers}", file=sys.stderr, flush=True)
    return Found(
        table=Results(rows),
        settled=[settled(base, sizes, seed=seed) for seed in range(num_seeds)],
        scorers=scorers,
        pictures=kept,
        exact=exact,
    )


def shared_state(policy: Denoiser, base: Denoiser, arm: Arm, sizes: Sizes) -> Row:
    """The loss of pairs from one state in closed form, and by a forward of each side and model.

    loss: largest difference of -log sigmoid(beta margin); clipped: of `spo_step` as the rounds compute it;
    margin: of margins, over the largest one; rows of one pair either way.
    """
    with torch.no_grad():
        groups = arm.source(prompts_of(TRAINED), live_of(policy, sizes.steps, seed=TUNING_SEED))
    sides = [[(g.context, [c]) for g, c in zip(groups, cs, strict=True)] for cs in
             zip(*(g.candidates[:2] for g in groups), strict=True)]  # fmt: skip
    made = port(sizes.steps)
    seeds = [0] * len(groups)
    with torch.no_grad(), counted(policy, base) as naive:
        alone = [made.collate(side, seeds) for side in sides]
        logp, ref = [[made.terms(m, b).sum(-1) for b in alone] for m in (policy, base)]
        one = torch.ones(len(groups))
        slow = PairLogLik(LogLik(logp[0], one, ref[0]), LogLik(logp[1], one, ref[1]))
    with torch.no_grad(), counted(policy, base) as shared:
        batch = made.collate([(g.context, g.candidates[:2]) for g in groups], seeds)
        means = [made.likelihood.means(m, batch) for m in (policy, base)]
        dense = [made.likelihood.densities(m, batch).sum(-1).unflatten(0, (-1, 2)) for m in means]
        mine, theirs = dense
        fast = PairLogLik(LogLik(mine[:, 0], one, theirs[:, 0]), LogLik(mine[:, 1], one, theirs[:, 1]))
        (stack,) = batch.stacks
        nexts, state = stack.nexts.unflatten(0, (-1, 2)), stack.state_of[::2]
        closed = shared_state_margin(
            means[0][0][state], means[1][0][state], nexts[:, 0], nexts[:, 1], stack.std[state]
        )
    spo_step, logistic = build("spo_step", beta=BETA, clip=CLIP), torch.nn.functional.softplus
    margin = slow.chosen.log_ratio() - slow.rejected.log_ratio()
    return {
        "pairs": float(len(groups)),
        "loss": float((logistic(-BETA * closed) - logistic(-BETA * margin)).abs().max()),
        "clipped": float((spo_step(fast) - spo_step(slow)).abs().max()),
        "margin": float((closed - margin).abs().max() / margin.abs().max()),
        "naive": naive.total / len(groups),
        "shared": shared.total / len(groups),
    }


def run(*, seeds: int, quick: bool = False, cache: Path | None = None) -> Outcome:
    """All arms and scorers on up to three seeds."""
    sizes, num_seeds = (QUICK, 2) if quick else (FULL, min(seeds, NUM_SEEDS))
    with stopwatch() as elapsed:
        base = placeless(sizes.pretraining, sizes.placeless, cache)
        found = search(base, sizes, num_seeds=num_seeds)
        seconds = elapsed()
    return Outcome(
        claims=claims_of(found, sizes, num_seeds),
        figure=partial(draw_figure, found=found, sizes=sizes),
        caption="Steps judged by themselves against paths judged by their pictures, at equal UNet "
        "evaluations and about equal drift. Gains are over the base on held-out prompts from its noise, in "
        "deviations of its pictures of a prompt; 95 % intervals over seeds.",
        seconds=seconds,
        size=(13.0, 7.4),
    )


def claims_of(found: Found, sizes: Sizes, num_seeds: int) -> list[Claim]:
    """What is compared, with intervals over seeds."""
    names = [f"{kind}, {r.name}" for r in REWARDS for kind in TRUE]
    rows, drifts = (torch.cat([found.table.of(name, what) for name in names]) for what in ("rows", "drift"))
    what = (
        f"{TOY}; DDIM, eta 1, {sizes.steps} steps, the first {sizes.first} untrained; {SIBLINGS} siblings or "
        f"paths, best against worst, spo_step with beta {BETA:g} and clip {CLIP:g}; {int(rows.min())} to "
        f"{int(rows.max())} UNet evaluations an arm, drift {float(drifts.min()):.4f} to "
        f"{float(drifts.max()):.4f}; {len(HELD_OUT)} held-out prompts x {sizes.pictures}; gains in "
        f"deviations of the base's pictures of a prompt; {num_seeds} seeds"
    )
    claim = partial(Claim, family="Diffusion", method="SPO", paper=SPO, what=what, command=command(NAME))
    return [
        claim(**settled_claim(found, sizes)),
        claim(**detail_claim(found)),
        claim(**layout_claim(found)),
        claim(**onward_claim(found)),
        claim(**control_claim(found)),
        claim(**scorers_claim(found, sizes, num_seeds)),
        claim(**exact_claim(found.exact, sizes)),
    ]


def gained(found: Found, kind: str, reward: Reward, suffix: str = "") -> Estimate:
    """What an arm gained over the base; suffix: ', judged' or ', level'."""
    return over_seeds(found.table.of(f"{kind}, {reward.name}", f"{reward.name}{suffix}"))


def leads_of(found: Found, reward: Reward, other: str) -> list[Estimate]:
    """The step-wise gain less that of another arm: as it is, and at the same drift."""
    pair = (f"step-wise, {reward.name}", f"{other}, {reward.name}")
    return [found.table.gap(*pair, f"{reward.name}{suffix}") for suffix in ("", ", level")]


def gains(found: Found, reward: Reward) -> str:
    """The gains of a reward by arm, in words."""
    parts = [
        f"{kind} {gained(found, kind, reward):+.2f} at drift "
        f"{over_seeds(found.table.of(f'{kind}, {reward.name}', 'drift')):.4f}"
        for kind in TRUE
    ]
    for kind in TRUE[1:]:
        plain, level = leads_of(found, reward, kind)
        parts.append(f"step-wise less {kind} {plain:+.2f}, at drift {DRIFT:g} {level:+.2f}")
    beside = [f"{kind} {gained(found, kind, reward, ', judged'):+.2f}" for kind in TRUE]
    return f"{', '.join(parts)}; {reward.judged_name}, in no label: {', '.join(beside)}"


def settled_claim(found: Found, sizes: Sizes) -> Fields:
    """The premise."""
    middle = sizes.steps // 2 - 1
    layout, detail = (found.curve(r.name)[:, middle] for r in (LAYOUT, DETAIL))
    return {
        "method": "Two rewards",
        "statement": "Layout is settled by early denoising steps, detail by late ones",
        "result": f"correlation within prompts of what step {middle + 1} of {sizes.steps} sees with the "
        f"picture: leftness {over_seeds(layout):.2f}, sharpness {over_seeds(detail):.2f}, difference "
        f"{over_seeds(layout - detail):+.2f}",
        "holds": positive(over_seeds(layout - detail)),
    }


def detail_claim(found: Found) -> Fields:
    """Where step-wise labels should win."""
    return {
        "statement": "On detail, steps judged by themselves teach more than paths judged by their pictures "
        "(d3po, ddpo), at equal UNet evaluations",
        "result": f"sharpness: {gains(found, DETAIL)}",
        "holds": together(*(positive(e) for kind in TRUE[1:] for e in leads_of(found, DETAIL, kind))),
    }


def layout_claim(found: Found) -> Fields:
    """Where they should not."""
    share = {
        (r, suffix): found.table.of(f"d3po, {r.name}", f"{r.name}{suffix}")
        / found.table.of(f"step-wise, {r.name}", f"{r.name}{suffix}")
        for r in REWARDS
        for suffix in ("", ", level")
    }
    nearer = [over_seeds(share[LAYOUT, s] - share[DETAIL, s]) for s in ("", ", level")]
    return {
        "statement": "On layout they lose their edge: d3po comes nearer to them than on detail",
        "result": f"leftness: {gains(found, LAYOUT)}; d3po's share of the step-wise gain: layout "
        f"{over_seeds(share[LAYOUT, '']):.2f}, detail {over_seeds(share[DETAIL, '']):.2f}, difference "
        f"{nearer[0]:+.2f}, at drift {DRIFT:g} {nearer[1]:+.2f}",
        # An edge that is there at equal evaluations and at equal drift is not lost, however near d3po comes.
        "holds": False
        if all(positive(e) for e in leads_of(found, LAYOUT, "d3po"))
        else together(*map(positive, nearer)),
    }


def onward_claim(found: Found) -> Fields:
    """From which sibling to go on."""
    names = {"step-wise": "random", "worst": "worst", "best": "best"}
    pairs = (("step-wise", "worst"), ("worst", "best"), ("step-wise", "best"))
    gaps = [found.table.gap(f"{a}, detail", f"{b}, detail", "detail") for a, b in pairs]
    parts = [f"{label} {gained(found, kind, DETAIL):+.2f}" for kind, label in names.items()]
    parts += [f"{names[a]} less {names[b]} {g:+.2f}" for (a, b), g in zip(pairs, gaps, strict=True)]
    beside = [f"{label} {gained(found, kind, DETAIL, ', judged'):+.2f}" for kind, label in names.items()]
    drift = [
        f"{label} {over_seeds(found.table.of(f'{k}, detail', 'drift')):.4f}" for k, label in names.items()
    ]
    return {
        "statement": "Going on from a random sibling teaches more than from the worst, and that more than "
        "from the best",
        "result": f"sharpness: {', '.join(parts)}; JPEG size: {', '.join(beside)}; drift: {', '.join(drift)}",
        "holds": together(*(positive(g) for g in gaps[:2])),
    }


def control_claim(found: Found) -> Fields:
    """What training without information does."""
    parts, leads = [], []
    for r in REWARDS:
        leads.append(found.table.gap(f"step-wise, {r.name}", f"random, {r.name}", r.name))
        drift = over_seeds(found.table.of(f"random, {r.name}", "drift"))
        parts.append(
            f"{r.name}: random {gained(found, 'random', r):+.2f}, step-wise less random {leads[-1]:+.2f}, "
            f"drift of random {drift:.4f}"
        )
    return {
        "statement": "It is the labels that teach: siblings in a random order, at the same rate, gain less "
        "of either reward",
        "result": "; ".join(parts),
        "holds": together(*map(positive, leads)),
    }


def scorers_claim(found: Found, sizes: Sizes, num_seeds: int) -> Fields:
    """Time-conditioned, unconditioned and clean-image scorers on noisy steps."""
    parts, leads = [], []
    for r in REWARDS:
        right = [over_seeds(found.accuracy(r.name, k)[:, list(NOISY)].mean(-1)) for k in KINDS]
        leads += [found.lead(r.name, KINDS[0], KINDS[1]), found.lead(r.name, KINDS[1], KINDS[2])]
        said = ", ".join(f"{k} {e:.3f}" for k, e in zip(KINDS, right, strict=True))
        parts.append(f"{r.name}: {said}; time less none {leads[-2]:+.3f}, none less clean {leads[-1]:+.3f}")
    return {
        "method": "Step-aware scorers",
        "statement": "On noisy steps a scorer that knows the time orders more pairs rightly than one that "
        "does not, and that more than one of clean pictures",
        "result": "; ".join(parts),
        "holds": together(*map(positive, leads)),
        "what": f"{TOY}; {sizes.seen} noisy versions of {len(TRAINED)} x {sizes.scored} of the base's "
        f"pictures, pairs share noise, {sizes.scoring} steps; {len(HELD_OUT)} held-out prompts x "
        f"{sizes.scored} at times {', '.join(str(BINS[i]) for i in NOISY)}; {num_seeds} seeds",
    }


def exact_claim(exact: Row, sizes: Sizes) -> Fields:
    """The closed form of pairs that share their state."""
    return {
        "statement": "Siblings share their state: the closed form of their margin is the loss of four "
        "forwards, at one forward of the policy and one of the reference a pair",
        "result": f"largest difference of the loss {exact['loss']:.1g}, of the clipped loss as trained "
        f"{exact['clipped']:.1g}, of margins {exact['margin']:.1g} of the largest; {exact['naive']:g} UNet "
        f"evaluations a pair against {exact['shared']:g}",
        "holds": exact["loss"] < 1e-5 and exact["clipped"] < 1e-5 and exact["shared"] == 2,
        "what": f"{TOY}; {exact['pairs']:.0f} pairs of siblings of {sizes.steps - 1 - sizes.first} steps, "
        "float32, the policy after an arm's training",
    }


def draw_figure(figure: Figure, *, found: Found, sizes: Sizes) -> None:
    """When rewards are settled, gains, pictures, continuation, and what scorers get right."""
    (first, second, third), (fourth, *scored) = figure.subplots(2, 3)
    steps = range(1, sizes.steps + 1)
    for series, (reward, label) in enumerate(((DETAIL, "sharpness"), (LAYOUT, "leftness"))):
        band(first, steps, found.curve(reward.name), series, label)
        kinds = ("step-wise", "d3po", "ddpo", "random")
        bars(
            second,
            ["steps\n(SPO)", "paths\n(D3PO)", "paths\n(DDPO)", "random\nsteps"],
            [over_seeds(found.table.of(f"{k}, {reward.name}", reward.name)) for k in kinds],
            series=series,
            shift=0.16 * series - 0.08,
            label=label,
        )
    first.set(title="When it is settled", xlabel="denoising step", ylabel="correlation with the picture")
    first.legend()
    second.set(title="Gain at equal UNet evaluations", ylabel="deviations")
    second.legend()
    kinds = ("step-wise", "worst", "best")
    estimates = [over_seeds(found.table.of(f"{k}, detail", "detail")) for k in kinds]
    bars(fourth, ["random", "worst", "best"], estimates)
    fourth.set(title="Going on from which sibling", ylabel="gain in sharpness, deviations")
    for ax in (second, fourth):
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    for ax, (reward, label) in zip(scored, ((DETAIL, "sharpness"), (LAYOUT, "leftness")), strict=True):
        for series, kind in enumerate(KINDS):
            band(ax, BINS, found.accuracy(reward.name, kind), series, kind)
        ax.set(title=f"Scorers of {label}", xlabel="time, from clean to noise", ylabel="pairs right")
        ax.legend()
    draw_pictures(third, found)


def draw_pictures(ax: Axes, found: Found, num: int = 9) -> None:
    """Rows of pictures from the same noise: the base, then the arms."""
    names = {
        "base": "base",
        "step-wise, detail": "steps, detail",
        "d3po, detail": "paths, detail",
        "step-wise, layout": "steps, layout",
        "d3po, layout": "paths, layout",
    }
    rows = []
    for name in names:
        pictures = found.pictures[name]
        taken = pictures.transpose(0, 1).flatten(0, 1)[:num]
        rows.append(np.concatenate([np.asarray(p) for p in images(taken)], 1))
    ax.imshow(np.concatenate(rows), interpolation="nearest")
    height = rows[0].shape[0]
    ax.set_yticks([height * (i + 0.5) - 0.5 for i in range(len(names))], list(names.values()))
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.set_title("The same noise, held-out prompts")


if __name__ == "__main__":
    main(NAME, run, __doc__)
