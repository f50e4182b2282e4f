"""Is BRAIn's gradient less noisy than DPG's and GDC++'s, with 8 samples of a proposal?

    python -m triptych.scripts.experiments.brain_variance --save

The toy of the authors' code: the prior and posterior is N(0, 1) (all rewards are equal), the policy is
N(1, 1), and the proposal slides from one to the other. DPG and GDC++ are BRAIn with a part left out, and are
written here as such: without the baseline b, and without dividing the weights by their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.objectives import ListLogLik, LogLik, build
from triptych.objectives.inputs import present
from triptych.scripts.experiments.common import (
    Claim,
    Outcome,
    band,
    command,
    main,
    over_seeds,
    stopwatch,
    verdict,
)

POLICY, POSTERIOR, NUM_SAMPLES = 1.0, 0.0, 8
GRADIENT = POLICY - POSTERIOR  # of KL(posterior || policy) by the policy's mean
TICKS = (0.1, 0.2, 0.5, 1.0, 2.0)
PAPER = "Pandey et al. 2024, arXiv 2402.02479"


def dpg(ranked: ListLogLik) -> Tensor:
    """-mean_i w_i logp_i, [B], w = ref exp(R) / q: no self-normalisation and no baseline."""
    weight = (ranked.loglik.reference() - present(ranked.proposal, "proposal")).exp()
    return -(weight * ranked.loglik.logp).mean(-1)


def gdc(ranked: ListLogLik) -> Tensor:
    """-mean_i (w_i - policy / q) logp_i, [B]: a baseline, but no self-normalisation (GDC++)."""
    proposal = present(ranked.proposal, "proposal")
    weight = (ranked.loglik.reference() - proposal).exp() - (ranked.loglik.logp - proposal).exp()
    return -(weight.detach() * ranked.loglik.logp).mean(-1)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "DPG": dpg,
    "GDC++": gdc,
    "BRAIn": build("brain", gamma=1.0),
}


def normal(x: Tensor, mean: float | Tensor) -> Tensor:
    """log N(x; mean, 1) without its constant, which all three densities share, [*]."""
    return -0.5 * (x - mean).square()


def gradients(proposal: float, *, num_draws: int, seed: int) -> dict[str, Tensor]:
    """The gradient by the policy's mean from each of `num_draws` lists of 8 samples, [D] by estimator."""
    generator = torch.Generator().manual_seed(seed)
    x = proposal + torch.randn(num_draws, NUM_SAMPLES, generator=generator, dtype=torch.float64)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    found: dict[str, Tensor] = {}
    for name, estimator in ESTIMATORS.items():
        mean = torch.full((num_draws, 1), POLICY, dtype=x.dtype, requires_grad=True)
        loglik = LogLik(normal(x, mean), one, normal(x, POSTERIOR))
        loss = estimator(ListLogLik(loglik, zero, proposal=normal(x, proposal), reward=zero))
        (gradient,) = torch.autograd.grad(loss.sum(), mean)
        found[name] = gradient.squeeze(-1)
    return found


def measure(proposals: Tensor, *, seeds: int, num_draws: int) -> dict[str, Tensor]:
    """Variance and mean of each estimator's gradient by seed and proposal, [2, S, P] by estimator."""
    table: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for seed in range(seeds):
        for i, proposal in enumerate(proposals.tolist()):
            drawn = gradients(proposal, num_draws=num_draws, seed=1000 * seed + i)
            for name, gradient in drawn.items():
                table[name].append(torch.stack([gradient.var(), gradient.mean()]))
    return {n: torch.stack(rows).view(seeds, len(proposals), 2).permute(2, 0, 1) for n, rows in table.items()}


def draw_figure(figure: Figure, *, proposals: Tensor, found: dict[str, Tensor]) -> None:
    """Variance, and variance over the squared mean, against the proposal's place."""
    left, right = figure.subplots(1, 2)
    for series, (name, (variance, mean)) in enumerate(found.items()):
        band(left, proposals, variance, series, name)
        band(right, proposals, variance / mean.square(), series, name)
    left.set_title("Variance of the gradient")
    right.set_title("Variance / squared mean")
    for ax in (left, right):
        ax.set(xlabel="mean of the proposal (0: posterior, 1: policy)", yscale="log")
        ax.set_yticks(TICKS, [str(t) for t in TICKS])
        ax.set_yticks([], minor=True)
    left.legend()


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Variances on a line of proposals from the posterior to the policy."""
    num_draws, num_proposals = (400, 5) if quick else (2000, 21)
    proposals = torch.linspace(POSTERIOR, POLICY, num_proposals)
    with stopwatch() as elapsed:
        found = measure(proposals, seeds=seeds, num_draws=num_draws)
        variance = {name: v for name, (v, _) in found.items()}
        middle, last = num_proposals // 2, num_proposals - 1

        def at(place: int) -> str:
            return "/".join(f"{over_seeds(v[:, place]):.3f}" for v in variance.values())

        below_gdc = (variance["BRAIn"] < variance["GDC++"]).all(0)
        below_dpg = variance["BRAIn"].mean(0) < variance["DPG"].mean(0)
        first = next((p for p, b in zip(proposals.tolist(), below_dpg, strict=True) if b), None)
        ends = bool(below_dpg[last] and below_dpg[middle] and not below_dpg[0])
        mean = {name: over_seeds(m[:, last]) for name, (_, m) in found.items()}
        relative = {n: over_seeds((v / m.square())[:, last]) for n, (v, m) in found.items()}
        claim = partial(
            Claim,
            family="Online preferences",
            method="BRAIn",
            paper=PAPER,
            what=f"gradient by the mean of N(1, 1) from {NUM_SAMPLES} samples, {num_draws} lists for each of "
            f"{num_proposals} proposals and {seeds} seeds; the authors' Gaussian toy",
            command=command("brain_variance"),
        )
        claims = [
            claim(
                statement="Self-normalising the weights lowers the variance: BRAIn is below GDC++ wherever "
                "the proposal is",
                result=f"below in every seed at {int(below_gdc.sum())} of {num_proposals} proposals; "
                f"DPG/GDC++/BRAIn with the proposal at the policy {at(last)}, midway {at(middle)}",
                holds=bool(below_gdc.all()),
            ),
            claim(
                statement="BRAIn is below DPG too while the proposal is away from the posterior, and only "
                "then",
                result=f"at the posterior itself {at(0)} (DPG lowest); BRAIn is lower from proposal mean "
                f"{'never' if first is None else f'{first:.2f}'} on",
                holds=verdict(ends),
            ),
            claim(
                statement="The price is a bias, and the lower variance is not a smaller gradient alone: "
                "variance over squared mean is lower too, with the proposal at the policy",
                result=f"mean gradient {mean['DPG']:.2f} DPG, {mean['GDC++']:.2f} GDC++, {mean['BRAIn']:.2f} "
                f"BRAIn (true {GRADIENT:.0f}); variance over squared mean {relative['DPG']:.2f}, "
                f"{relative['GDC++']:.2f}, {relative['BRAIn']:.2f}",
                holds=verdict(
                    relative["BRAIn"].high < relative["GDC++"].low,
                    relative["BRAIn"].high < relative["DPG"].low,
                ),
            ),
        ]
        seconds = elapsed()
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, proposals=proposals, found=found),
        caption="BRAIn's gradient is the least noisy one unless the proposal already is the posterior.",
        seconds=seconds,
    )


if __name__ == "__main__":
    main("brain_variance", run, __doc__)
