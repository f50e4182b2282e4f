"""A best arm that the reference hardly knows: online DPO never meets it, VPO's optimism does.

    python -m triptych.scripts.experiments.exploration_vpo

Ten arms; the best one has prior 1e-4, a decoy of middling reward most of the mass. Each round draws pairs of
arms from the policy, labels them by Bradley-Terry of the true reward, adds them to all past ones and refits:
DPO plus alpha beta E_ref[log-ratio], the expectation being exact. Each seed is a context.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.objectives import LogLik, PairLogLik, build
from triptych.scripts.experiments import arms
from triptych.scripts.experiments.common import (
    Claim,
    Outcome,
    band,
    bars,
    command,
    main,
    over_seeds,
    stopwatch,
    verdict,
)
from triptych.training.stats import win_rate

NAME = "exploration_vpo"
ALPHAS = (0.0, 0.003, 0.01, 0.03, 0.1, 1.0)
BETA = 0.4
NUM_PAIRS = 8
FAINT = 0.25
BEST = 9
REWARD = (2.0, 1.2, 0.8, 1.6, 0.4, 1.2, 0.8, 1.6, 0.4, 4.0)
PRIOR = (0.6, 0.1, 0.05, 0.05, 0.05, 0.05, 0.04, 0.03, 0.0299, 0.0001)


def explore(
    alpha: float, seeds: int, num_rounds: int, num_fits: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(Expected reward after each round, [T, S]; whether the best arm was ever drawn, [S]).

    scale: of rewards and beta together: the optimum stays where it is and labels say more or less of it.
    """
    generator = torch.Generator().manual_seed(4)
    reward = scale * torch.tensor(REWARD, dtype=torch.float64)
    ref = torch.tensor(PRIOR, dtype=torch.float64).log().expand(seeds, -1)
    policy, objective = arms.policy_of(ref), build("vpo", beta=scale * BETA, alpha=alpha, regime="online")
    first, second = arms.ordered_pairs(len(REWARD))
    won = torch.zeros(seeds, len(REWARD), len(REWARD), dtype=torch.float64)
    rows, curve = torch.arange(seeds).unsqueeze(-1).expand(seeds, NUM_PAIRS), []
    for _ in range(num_rounds):
        a, b = (arms.draw(arms.logp_of(policy), NUM_PAIRS, generator) for _ in range(2))
        chance = torch.sigmoid(reward[a] - reward[b])
        first_won = torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance
        better, worse = torch.where(first_won, a, b), torch.where(first_won, b, a)
        won.index_put_((rows, better, worse), torch.ones_like(chance), accumulate=True)
        weight = (won / won.sum((1, 2), keepdim=True))[:, first, second]
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        for _ in range(num_fits):
            optimizer.zero_grad()
            pairs = calibrated(arms.logp_of(policy), ref, first, second)
            arms.expected(objective, pairs, weight).backward()
            optimizer.step()
        curve.append((arms.logp_of(policy).detach().exp() * reward).sum(-1))
    tried = won[:, BEST].sum(-1) + won[:, :, BEST].sum(-1) > 0
    return torch.stack(curve), tried


def calibrated(logp: Tensor, ref: Tensor, first: Tensor, second: Tensor) -> PairLogLik:
    """All pairs of arms; the calibration is an expectation over the reference: the term is linear in it."""
    pairs = arms.pairs_of(logp, ref, first, second)
    mean, base = ((ref.exp() * t).sum(-1).repeat_interleave(len(first)) for t in (logp, ref))
    calibration = LogLik(mean, torch.ones_like(mean), base)
    return PairLogLik(pairs.chosen, pairs.rejected, calibration=calibration)


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """How often each alpha finds the best arm, and the reward it ends with."""
    num_rounds, num_fits = (10, 5) if quick else (60, 20)
    with stopwatch() as passed:
        seeds = max(2, seeds)
        found = {alpha: explore(alpha, seeds, num_rounds, num_fits) for alpha in ALPHAS}
        faint = {alpha: explore(alpha, seeds, num_rounds, num_fits, FAINT) for alpha in (0.0, 0.01)}
        claims = _claims(found, faint, seeds, num_rounds, num_fits)

        def figure(figure: Figure) -> None:
            _draw(figure, found)

        return Outcome(
            claims=claims,
            figure=figure,
            caption="Expected reward by round, the share of seeds that ever drew the best arm, and the "
            "reward at the end, by the strength alpha of the optimism; 95 % intervals over seeds. The best "
            "arm has reward 4, the decoy that the reference prefers 2.",
            seconds=passed(),
            size=(12.0, 3.6),
        )


def _claims(
    found: dict[float, tuple[Tensor, Tensor]],
    faint: dict[float, tuple[Tensor, Tensor]],
    seeds: int,
    num_rounds: int,
    num_fits: int,
) -> list[Claim]:
    share = {alpha: win_rate(tried.double()) for alpha, (_, tried) in found.items()}
    final = {alpha: curve[-1] for alpha, (curve, _) in found.items()}
    text = [f"alpha {a:g}: found {share[a]}, reward {over_seeds(final[a]):.2f}" for a in found]
    best = max(final, key=lambda a: final[a].mean().item())
    less, more = (over_seeds(final[best] - final[a]) for a in (0.0, max(found)))
    found_by = max(share, key=lambda a: share[a].mean)

    weak = [win_rate(tried.double()) for _, tried in faint.values()]
    gain = over_seeds(faint[0.01][0][-1] - faint[0.0][0][-1])

    def claim(statement: str, result: str, holds: bool | None) -> Claim:
        return Claim(
            family="Online preferences",
            method="VPO (online), XPO",
            paper="Cen et al. 2024, arXiv 2405.19320; Xie et al. 2024, arXiv 2405.21046 (the same gradient)",
            statement=statement,
            what=f"10 arms, best prior 1e-4, {num_rounds} rounds of {NUM_PAIRS} pairs, {num_fits} steps of "
            f"Adam on all past pairs a round, beta {BETA}, {seeds} seeds",
            result=result,
            holds=holds,
            command=command(NAME),
        )

    return [
        claim(
            "without optimism the best arm is hardly ever drawn; with some it is found more often and the "
            "reward is higher",
            "; ".join(text) + f". Gain of the best alpha, {best:g}, over alpha 0, same seeds: {less:.2f}",
            verdict(share[found_by].low > share[0.0].high, less.low > 0),
        ),
        claim(
            "the same where labels are near chance: rewards, and beta, a quarter as large",
            f"found {weak[1]} at alpha 0.01, {weak[0]} at alpha 0; gain in reward {gain.mean / FAINT:.2f} "
            f"[{gain.low / FAINT:.2f}, {gain.high / FAINT:.2f}] in units of the other rows",
            verdict(weak[1].low > weak[0].high, gain.low > 0),
        ),
        claim(
            "too much optimism hurts",
            f"reward at alpha {best:g} less that at alpha {max(found):g}, same seeds: {more:.2f}; found "
            f"{share[best]} against {share[max(found)]}",
            verdict(more.low > 0),
        ),
    ]


def _draw(figure: Figure, found: dict[float, tuple[Tensor, Tensor]]) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    labels = [f"{alpha:g}" for alpha in found]
    for series, (alpha, (curve, _)) in enumerate(found.items()):
        band(left, torch.arange(1, len(curve) + 1), curve.T, series, f"alpha {alpha:g}")
    left.set(xlabel="round", ylabel="expected reward", title="Reward by round", ylim=(0, 4))
    left.legend(loc="upper left", ncols=2)
    bars(middle, labels, [win_rate(tried.double()) for _, tried in found.values()])
    middle.set(xlabel="alpha", ylabel="share of seeds", title="Found the best arm", ylim=(-0.04, 1.04))
    bars(right, labels, [over_seeds(curve[-1]) for curve, _ in found.values()])
    right.set(xlabel="alpha", ylabel="expected reward", title="Reward at the end", ylim=(0, 4))


if __name__ == "__main__":
    main(NAME, run, __doc__)
