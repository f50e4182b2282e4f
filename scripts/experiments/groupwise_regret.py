"""Is one online prediction good for every user group at once, where groups overlap?

    python -m triptych.scripts.experiments.groupwise_regret --save

Users belong to any of three groups, and to 'all'; what they like is a linear function of the item that is
their groups' own. An online ridge regression over everybody is compared with sleeping experts: one such
regression for each group, mixed by `Sleepers`. Losses are squared errors of outcomes in [0, 1]; the measure
is the loss over the best linear function of a group in hindsight, summed over the group's rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

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
from triptych.training.mixing import OnlineRidge, Sleepers
from triptych.training.stats import Estimate

GROUPS = ("all", "A", "B", "C")
CHANCE = (0.5, 0.3, 0.2)  # of belonging to A, B, C
DIM, NOISE = 4, 0.1
LEARNERS = ("single", "equal shares", "sleeping", "group features")
PAPER = "Acharya et al. 2023, arXiv 2310.04652"


@dataclass(frozen=True, slots=True)
class Users:
    """A stream of T users. x: [T, D], the last feature is 1; y: in [0, 1], [T]; belongs: [T, G] bool."""

    x: Tensor
    y: Tensor
    belongs: Tensor


def users(num_rounds: int, seed: int) -> Users:
    """Outcomes 1/2 + mean over the user's groups of w_g x + noise, cut to [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x = torch.cat([draw(num_rounds, DIM - 1), torch.ones(num_rounds, 1, dtype=torch.float64)], -1)
    weights = 0.2 * draw(len(GROUPS), DIM)
    others = torch.rand(num_rounds, len(CHANCE), generator=generator) < torch.tensor(CHANCE)
    belongs = torch.cat([torch.ones(num_rounds, 1, dtype=torch.bool), others], -1)
    # Who is of no special group likes what 'all' like; the others, on average, what their groups do.
    counts = torch.where(others.any(-1, keepdim=True), belongs & (torch.arange(len(GROUPS)) > 0), belongs)
    share = counts.double() / counts.sum(-1, keepdim=True)
    taste = (share * (x @ weights.T)).sum(-1)
    return Users(x, (0.5 + taste + NOISE * draw(num_rounds)).clamp(0, 1), belongs)


def play(stream: Users) -> dict[str, Tensor]:
    """The squared error of every learner in every round, [T] each; each predicts before it learns."""
    sleepers = Sleepers(experts=GROUPS)
    memory: dict[str, Tensor] = {}
    experts = [OnlineRidge(DIM) for _ in GROUPS]
    wide = OnlineRidge(DIM * len(GROUPS))
    rows: list[list[float]] = []
    for x, y, belongs in zip(stream.x, stream.y.tolist(), stream.belongs, strict=True):
        predictions = torch.tensor([clipped(e.predict(x)) for e in experts], dtype=torch.float64)
        crossed = torch.outer(belongs.double(), x).flatten()
        share = sleepers.weights(memory, belongs)
        equal = belongs.double() / belongs.sum()
        mixed = [float(p @ predictions) for p in (equal, share)]
        guesses = (predictions[0].item(), *mixed, clipped(wide.predict(crossed)))
        rows.append([(guess - y) ** 2 for guess in guesses])
        sleepers.learn(memory, belongs, (predictions - y).square(), rows[-1][LEARNERS.index("sleeping")])
        for awake, expert in zip(belongs.tolist(), experts, strict=True):
            if awake:
                expert.learn(x, y)
        wide.learn(crossed, y)
    return dict(zip(LEARNERS, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def clipped(prediction: float) -> float:
    """Into [0, 1], where outcomes are."""
    return min(1.0, max(0.0, prediction))


def regrets(stream: Users, losses: dict[str, Tensor]) -> Tensor:
    """Loss over the best linear function of each group in hindsight, by round, [L, G, T]; 0 for others."""
    rows: list[Tensor] = []
    for g in range(len(GROUPS)):
        member = stream.belongs[:, g]
        x, y = stream.x[member], stream.y[member]
        best = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
        error = (stream.x @ best).clamp(0, 1) - stream.y
        rows.append(torch.stack([(losses[n] - error.square()) * member for n in LEARNERS]))
    return torch.stack(rows, 1)


def draw_figure(figure: Figure, *, cumulative: Tensor, rounds: Tensor) -> None:
    """Cumulative regret of every learner, a panel for each group. cumulative: [S, L, G, C]."""
    for g, ax in enumerate(figure.subplots(1, len(GROUPS))):
        for series, name in enumerate(LEARNERS):
            band(ax, rounds, cumulative[:, series, g], series, name)
        ax.set(title=f"group {GROUPS[g]}", xlabel="rounds")
    figure.axes[0].set_ylabel("cumulative excess loss")
    figure.axes[0].legend()


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Streams of users with their own tastes."""
    num_rounds = 600 if quick else 4000
    rounds = torch.linspace(num_rounds // 40, num_rounds, 40).long()
    with stopwatch() as elapsed:
        totals: list[Tensor] = []
        per_round: list[Tensor] = []
        num_streams = max(8, seeds // 2)
        for seed in range(num_streams):
            stream = users(num_rounds, seed)
            regret = regrets(stream, play(stream))
            totals.append(regret.cumsum(-1)[..., rounds - 1])
            per_round.append(1000 * regret.sum(-1) / stream.belongs.sum(0))
        cumulative, excess = torch.stack(totals), torch.stack(per_round)
        seconds = elapsed()

    def estimates(learner: str) -> list[Estimate]:
        return [over_seeds(column) for column in excess[:, LEARNERS.index(learner)].T]

    def listed(found: Sequence[Estimate]) -> str:
        return ", ".join(f"{name} {e:.2f}" for name, e in zip(GROUPS, found, strict=True))

    def less(a: str, b: str) -> list[Estimate]:
        gap = excess[:, LEARNERS.index(a)] - excess[:, LEARNERS.index(b)]
        return [over_seeds(column) for column in gap.T]

    against_single, against_equal = less("sleeping", "single"), less("sleeping", "equal shares")
    own, single = estimates("sleeping"), estimates("single")
    claim = partial(
        Claim,
        family="Many users and groups",
        method="Sleeping experts",
        paper=PAPER,
        what=f"{num_rounds} rounds, {len(GROUPS)} overlapping groups, {DIM} features, online ridge experts, "
        f"{num_streams} seeds; excess squared error per round of the group, times 1000",
        command=command("groupwise_regret"),
    )
    claims = [
        claim(
            statement="Mixed sleeping experts lose less than one learner for everybody, in every group",
            result=f"single: {listed(single)}; sleeping: {listed(own)}",
            holds=verdict(*(e.high < 0 for e in against_single)),
        ),
        claim(
            statement="Against the best linear function of each group in hindsight next to nothing is lost: "
            "at most a twentieth of what the single learner loses in the special groups",
            result=f"sleeping: {listed(own)} (positive is a loss)",
            holds=verdict(*(o.mean <= s.mean / 20 for o, s in zip(own[1:], single[1:], strict=True))),
        ),
        claim(
            statement="It is the learned weights: equal shares for the experts awake do worse in every group",
            result=f"equal shares: {listed(estimates('equal shares'))}; sleeping less equal shares: "
            f"{listed(against_equal)}; one regression on features crossed with groups (another model, for "
            f"scale): {listed(estimates('group features'))}",
            holds=verdict(*(e.high < 0 for e in against_equal)),
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, cumulative=cumulative, rounds=rounds),
        caption="One learner for everybody loses steadily where groups differ; sleeping experts do not.",
        seconds=seconds,
        size=(13.0, 3.6),
    )


if __name__ == "__main__":
    main("groupwise_regret", run, __doc__)
