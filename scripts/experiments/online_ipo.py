"""Regularised self-play: online IPO, IPO-MD and Nash-MD come to rest at the policies they are meant to find.

    python -m triptych.scripts.experiments.online_ipo

The games of `cyclic_game`, one a seed. Each update is the population's: pairs are weighted by their
probability under the policy that draws them, which is a constant, and a step is a natural gradient step. At
rest, log policy - log ref - P rival / tau is the same for every arm; the rival is the policy itself (online
IPO) or its geometric mixture with the reference (IPO-MD, Nash-MD).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.objectives import build
from triptych.scripts.experiments import arms
from triptych.scripts.experiments.common import (
    Claim,
    Outcome,
    band,
    command,
    line,
    main,
    over_seeds,
    stopwatch,
    verdict,
)
from triptych.scripts.experiments.cyclic_game import games

NAME = "online_ipo"
TAUS = (1.0, 0.3, 0.1, 0.03)
MIXTURE = 0.125
IPO = "Calandriello et al. 2024, arXiv 2403.08635"
NASH = "Munos et al. 2023, arXiv 2312.00886"


@dataclass(frozen=True, slots=True)
class Path:
    """Where a method went: exploitability by update, [T, X], and how far from rest it ended, [X]."""

    exploited: Tensor
    residual: Tensor


def mixed(logp_XA: Tensor, ref_XA: Tensor, mixture: float) -> Tensor:
    """Log-probs of policy^(1 - b) ref^b, normalised, [X, A]."""
    return ((1 - mixture) * logp_XA + mixture * ref_XA).log_softmax(-1)


def residual(preference: Tensor, logp: Tensor, ref: Tensor, *, tau: float, mixture: float) -> Tensor:
    """Largest |log policy - log ref - P rival / tau - its mean|, [X]."""
    rival = mixed(logp, ref, mixture).exp()
    gap = logp - ref - arms.wins(preference, rival) / tau
    return (gap - gap.mean(-1, keepdim=True)).abs().amax(-1)


def ipo(preference: Tensor, ref: Tensor, *, tau: float, mixture: float) -> Path:
    """IPO on pairs that the policy (mixture 0) or its mixture with the reference draws, labelled softly."""
    policy, objective = arms.policy_of(ref), build("ipo", tau=tau, reduce="sum")
    first, second = arms.ordered_pairs(ref.shape[1])
    strength = preference[:, first, second]
    exploited = []
    for _ in range(round(40 / rate(tau))):
        logp = arms.logp_of(policy)
        rival = mixed(logp.detach(), ref, mixture).exp()
        pairs = arms.pairs_of(logp, ref, first, second, strength=strength)
        loss = arms.expected(objective, pairs, rival[:, first] * rival[:, second])
        arms.natural_step(policy, loss, rate(tau) / 4)
        exploited.append(arms.exploitability(preference, logp.detach().exp()))
    return _path(policy, exploited, preference, ref, tau, mixture)


def nash_md(preference: Tensor, ref: Tensor, *, tau: float, mixture: float) -> Path:
    """Policy gradient of P(y > y') - 1/2 - tau log-ratio(y), y of the policy and y' of its mixture."""
    policy, objective = arms.policy_of(ref), build("reinforce")
    every, exploited = torch.arange(ref.shape[1]), []
    for _ in range(round(40 / rate(tau))):
        logp = arms.logp_of(policy)
        rival = mixed(logp.detach(), ref, mixture).exp()
        advantage = arms.wins(preference, rival) - 0.5 - tau * (logp.detach() - ref)
        units = arms.units_of(logp, every, advantage, logp)
        # The constant that the policy's mean advantage adds is no part of a natural gradient.
        arms.natural_step(policy, arms.expected(objective, units, logp.exp()), rate(tau) / tau)
        exploited.append(arms.exploitability(preference, logp.detach().exp()))
    return _path(policy, exploited, preference, ref, tau, mixture)


def rate(tau: float) -> float:
    """Share of the way to the target that a step goes: longer ones circle round it where tau is small."""
    return min(0.5, 10 * tau * tau)


def _path(
    policy: arms.TabularPolicy,
    exploited: list[Tensor],
    preference: Tensor,
    ref: Tensor,
    tau: float,
    mixture: float,
) -> Path:
    logp = arms.logp_of(policy).detach()
    left = residual(preference, logp, ref, tau=tau, mixture=mixture)
    return Path(torch.stack(exploited), left)


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Residuals at rest, and exploitability by tau."""
    taus = TAUS[:-1] if quick else TAUS
    with stopwatch() as passed:
        preference = games(max(2, seeds))
        generator = torch.Generator().manual_seed(2)
        ref = torch.randn(len(preference), 4, generator=generator, dtype=torch.float64)
        ref = (0.5 * ref).log_softmax(-1)
        ref[0] = torch.zeros(4).double().log_softmax(-1)
        online = {tau: ipo(preference, ref, tau=tau, mixture=0.0) for tau in taus}
        blend = {tau: ipo(preference, ref, tau=tau, mixture=MIXTURE) for tau in taus}
        nash = {tau: nash_md(preference, ref, tau=tau, mixture=MIXTURE) for tau in taus}
        what = (
            f"4-arm games with a cycle: 1 fixed with a uniform reference, {len(preference) - 1} random with "
            f"random references; 80 (tau 1) to {round(40 / rate(taus[-1]))} (tau {taus[-1]}) updates"
        )
        claims = [
            _claim("Online IPO", IPO, "log policy = log ref + P policy / tau", online, what),
            _claim("IPO-MD", IPO, "log policy = log ref + P mixture / tau", blend, what + "; mixture 0.125"),
            _claim("Nash-MD", NASH, "log policy = log ref + P mixture / tau", nash, what + "; mixture 0.125"),
        ]

        def figure(figure: Figure) -> None:
            _draw(figure, online, {"online IPO": online, "IPO-MD": blend, "Nash-MD": nash})

        return Outcome(
            claims=claims,
            figure=figure,
            caption="Left: online IPO in the fixed game; the last policy comes to rest, nearer to Nash the "
            "smaller tau is. Right: exploitability at rest, mean and 95 % interval over games; IPO-MD and "
            "Nash-MD rest at the same policy: their lines lie upon each other.",
            seconds=passed(),
            size=(10.0, 3.7),
        )


def _claim(method: str, paper: str, rest: str, paths: dict[float, Path], what: str) -> Claim:
    worst = max(path.residual.max().item() for path in paths.values())
    at_rest = torch.stack([path.exploited[-1] for path in paths.values()])
    falls = [over_seeds(more - less).low > 0 for more, less in pairwise(at_rest)]
    text = [
        f"tau {tau:g}: {path.exploited[-1][0]:.4f}, over games {over_seeds(path.exploited[-1]):.4f}"
        for tau, path in paths.items()
    ]
    return Claim(
        family="Self-play and games",
        method=method,
        paper=paper,
        statement=f"the last policy comes to rest where {rest} + constant, and is less exploitable the "
        "smaller tau is",
        what=what,
        result=f"largest distance from the equation {worst:.1e} in log-probs. Exploitability at "
        + "; ".join(text),
        holds=verdict(worst < 1e-4, all(falls)),
        command=command(NAME),
    )


def _draw(figure: Figure, online: dict[float, Path], methods: dict[str, dict[float, Path]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for series, (tau, path) in enumerate(online.items()):
        steps = torch.arange(1, len(path.exploited) + 1)
        line(left, steps, path.exploited[:, 0], series, f"tau {tau:g}")
    left.set(xscale="log", yscale="log", xlabel="update of online IPO", ylabel="exploitability")
    left.set_title("The last policy comes to rest")
    left.legend(loc="lower left")
    for series, (label, paths) in enumerate(methods.items()):
        band(right, list(paths), torch.stack([p.exploited[-1] for p in paths.values()], 1), series, label)
    right.set(xscale="log", yscale="log", xlabel="tau, the weight of the reference", ylabel="exploitability")
    right.set_title("At rest, over games")
    right.set_xticks(list(online), [f"{tau:g}" for tau in online])
    for ax in (left, right):
        ticks = [t for t in (0.003, 0.01, 0.03, 0.1) if ax.get_ylim()[0] < t < ax.get_ylim()[1]]
        ax.minorticks_off()
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    right.legend(loc="upper left")


if __name__ == "__main__":
    main(NAME, run, __doc__)
