"""Preferences that go round in a circle: self-play against preference optimisation that fits one ranking.

    python -m triptych.scripts.experiments.cyclic_game

Four arms; A beats B, B beats C, C beats A, all beat D. No ranking fits, so what a policy should be is the
Nash policy, which nothing beats more often than it is beaten. Distance from it: exploitability. The first
game is fixed, the others (one a seed) draw their strengths from [0.55, 0.95]. Every update is the
population's.
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.tabular.games import cyclic_game
from triptych.objectives import build
from triptych.scripts.experiments import arms
from triptych.scripts.experiments.common import (
    COLOURS,
    INK,
    MUTED,
    Claim,
    Outcome,
    bars,
    command,
    line,
    main,
    over_seeds,
    stopwatch,
    verdict,
)
from triptych.training.stats import win_rate

NAME = "cyclic_game"
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
ETAS = (0.1, 1.0)
SPPO = "Wu et al. 2024, arXiv 2405.00675"


def games(num: int) -> Tensor:
    """P(row preferred to column) of the fixed game and of num - 1 random ones, [X, 4, 4]."""
    generator = torch.Generator().manual_seed(0)
    strengths = 0.55 + 0.4 * torch.rand(num, 4, generator=generator, dtype=torch.float64)
    preference = torch.full((num, 4, 4), 0.5, dtype=torch.float64)
    for k, (better, worse) in enumerate([(0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3)]):
        preference[:, better, worse] = strengths[:, min(k, 3)]
        preference[:, worse, better] = 1 - strengths[:, min(k, 3)]
    preference[0] = cyclic_game()
    return preference


def uniform(num: int) -> Tensor:
    """Log-probs of the uniform policy, [X, 4]."""
    return torch.full((num, 4), -math.log(4), dtype=torch.float64)


def offline_dpo(preference: Tensor, *, beta: float) -> Tensor:
    """Probabilities of DPO's optimum on all pairs of arms, labelled by the true preferences, [X, 4]."""
    ref = uniform(len(preference))
    policy, dpo = arms.policy_of(ref), build("dpo", beta=beta)
    first, second = arms.ordered_pairs(4)
    weight, strength = torch.full((len(ref), 16), 1 / 16), preference[:, first, second]

    def loss() -> Tensor:
        pairs = arms.pairs_of(arms.logp_of(policy), ref, first, second, strength=strength)
        return arms.expected(dpo, pairs, weight)

    arms.minimise(policy, loss, 200)
    return arms.logp_of(policy).detach().exp()


def spo(preference: Tensor, *, eta: float, num_steps: int) -> Tensor:
    """Policies visited by natural policy gradient on win rates against themselves, [T, X, 4]."""
    policy, reinforce = arms.policy_of(uniform(len(preference))), build("reinforce")
    every, visited = torch.arange(4), []
    for _ in range(num_steps):
        logp = arms.logp_of(policy)
        probs = logp.detach().exp()
        visited.append(probs)
        advantage = arms.wins(preference, probs) - 0.5
        units = arms.units_of(logp, every, advantage, logp)
        arms.natural_step(policy, arms.expected(reinforce, units, probs), eta)
    return torch.stack(visited)


def sppo(preference: Tensor, *, eta: float, num_steps: int) -> Tensor:
    """Policies visited by SPPO: each is the regression of the one before it onto its win rates, [T, X, 4]."""
    policy, objective = arms.policy_of(uniform(len(preference))), build("sppo", beta=1 / eta)
    first, second = arms.ordered_pairs(4)
    visited = []
    for _ in range(num_steps):
        old = arms.logp_of(policy).detach()
        visited.append(old.exp())
        share = arms.wins(preference, old.exp())
        won = {"win_chosen": share[:, first], "win_rejected": share[:, second]}
        weight = old.exp()[:, first] * old.exp()[:, second]
        # The regression is a square in the log-ratios: natural steps of one half are Newton's.
        for _ in range(3):
            pairs = arms.pairs_of(arms.logp_of(policy), old, first, second, **won)
            arms.natural_step(policy, arms.expected(objective, pairs, weight), 0.5)
    return torch.stack(visited)


def dno(preference: Tensor, *, eta: float, num_steps: int) -> tuple[Tensor, float]:
    """(Win rate of each policy against the one before it, [T, X]; largest |eta D - (R_1 - R_2)|)."""
    policy, objective = arms.policy_of(uniform(len(preference))), build("dno", beta=eta)
    first, second = arms.ordered_pairs(4)
    weight = torch.full((len(preference), 16), 1 / 16)
    rates, residual = [], 0.0
    for _ in range(num_steps):
        old = arms.logp_of(policy).detach()
        share = arms.wins(preference, old.exp())
        won = {"win_chosen": share[:, first], "win_rejected": share[:, second]}

        def loss(old: Tensor = old, won: dict[str, Tensor] = won) -> Tensor:
            pairs = arms.pairs_of(arms.logp_of(policy), old, first, second, **won)
            return arms.expected(objective, pairs, weight)

        arms.minimise(policy, loss, 200)
        new = arms.logp_of(policy).detach()
        gap = eta * (new - old) - share
        residual = max(residual, (gap - gap.mean(-1, keepdim=True)).abs().max().item())
        rates.append((new.exp() * share).sum(-1))
    return torch.stack(rates), residual


def shared_features(seeds: int, num_steps: int) -> dict[str, Tensor]:
    """Final log-ratios of a nearly parallel (chosen, rejected), [S, 2], by objective.

    Log-linear policies over 10 arms with 8 random features; the rejected's are the chosen's and some noise.
    """
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(seeds, 10, 8, generator=generator, dtype=torch.float64)
    features[:, 1] = features[:, 0] + 0.3 * torch.randn(seeds, 8, generator=generator, dtype=torch.float64)
    ref = torch.full((seeds, 10), -math.log(10), dtype=torch.float64)
    won = {"win_chosen": torch.full((seeds, 1), 1.0), "win_rejected": torch.full((seeds, 1), 0.0)}
    cases = {"DPO": build("dpo", beta=0.1), "IPO": build("ipo", tau=0.5, reduce="sum")}
    cases["SPPO"] = build("sppo", beta=1.0)
    found = {}
    for label, objective in cases.items():
        policy = arms.TabularPolicy(ref.unsqueeze(1), features=arms.separate(features))
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
        fields = won if label == "SPPO" else {}
        for _ in range(num_steps):
            optimizer.zero_grad()
            pair = arms.pairs_of(arms.logp_of(policy), ref, torch.tensor([0]), torch.tensor([1]), **fields)
            objective(pair).sum().backward()
            optimizer.step()
        found[label] = (arms.logp_of(policy).detach() - ref)[:, :2]
    return found


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Exploitability of DPO, SPO and SPPO; DNO's monotone wins; what happens to the chosen."""
    num_steps = 200 if quick else 2000
    with stopwatch() as passed:
        preference = games(max(2, seeds))
        dpo = {beta: offline_dpo(preference, beta=beta) for beta in BETAS}
        played = {("SPO", eta): spo(preference, eta=eta, num_steps=num_steps) for eta in ETAS}
        played |= {("SPPO", eta): sppo(preference, eta=eta, num_steps=num_steps) for eta in ETAS}
        rates, residual = dno(preference, eta=1.0, num_steps=5 if quick else 30)
        ratios = shared_features(max(2, seeds), 300 if quick else 2000)
        claims = [
            *_exploited(preference, dpo, played, num_steps),
            _dno_claim(rates, residual),
            _shared_claim(ratios, 300 if quick else 2000),
        ]

        def figure(figure: Figure) -> None:
            _draw(figure, preference, dpo[0.1], played, ratios)

        return Outcome(
            claims=claims,
            figure=figure,
            caption="Left: distance from Nash in the fixed game; the last policy of self-play stays away "
            "from it, the average of all policies comes close. Middle: the same policies among A, B and C: "
            "DPO commits itself to one arm, self-play circles round the Nash policy. Right: final log-ratios "
            "of the two sides when their features are nearly the same, mean and 95 % interval over random "
            "features.",
            seconds=passed(),
            size=(12.0, 3.9),
        )


def _exploited(
    preference: Tensor, dpo: dict[float, Tensor], played: dict[tuple[str, float], Tensor], num_steps: int
) -> list[Claim]:
    by_beta = torch.stack([arms.exploitability(preference, p) for p in dpo.values()])
    usual, best = arms.exploitability(preference, dpo[0.1]), by_beta.amin(0)
    what = (
        f"4-arm games with a cycle: 1 fixed, {len(preference) - 1} random; uniform reference; {num_steps} "
        "population updates"
    )
    claims = []
    papers = {"SPO": "Swamy et al. 2024, arXiv 2401.04056", "SPPO": SPPO}
    titles = {"SPO": "SPO (minimaximalist)", "SPPO": "SPPO"}
    for method in ("SPO", "SPPO"):
        text, parts = [], []
        for eta in ETAS:
            visited = played[method, eta]
            average = arms.exploitability(preference, visited.mean(0))
            last = torch.stack([arms.exploitability(preference, p) for p in visited[-200:]]).mean(0)
            parts += [over_seeds(usual - average).low > 0, over_seeds(best - average).low > 0]
            parts += [bool(average[0] < last[0]) and over_seeds(last - average).low > 0]
            text.append(
                f"eta {eta:g}: average policy {average[0]:.4f}, over games {over_seeds(average):.4f}; last "
                f"200 policies {last[0]:.3f}, over games {over_seeds(last):.3f}"
            )
        claims.append(
            Claim(
                family="Self-play and games",
                method=titles[method],
                paper=papers[method],
                statement="where preferences form a cycle, the average policy of self-play comes close to "
                "Nash while its last policy circles round it, and offline DPO stays exploitable",
                what=what + f"; DPO on all pairs, beta 0.1 and the best of {', '.join(map(str, BETAS))}",
                result=f"exploitability: DPO at beta 0.1 {usual[0]:.3f}, over games {over_seeds(usual):.3f} "
                f"(at each game's best beta {over_seeds(best):.3f}). {'. '.join(text)}",
                holds=verdict(*parts),
                command=command(NAME),
            )
        )
    return claims


def _dno_claim(rates: Tensor, residual: float) -> Claim:
    return Claim(
        family="Self-play and games",
        method="DNO",
        paper="Rosset et al. 2024, arXiv 2404.03715",
        statement="each policy wins at least half the time against the one before it, and the soft loss is "
        "least where eta D = R_1 - R_2",
        what=f"the same {rates.shape[1]} games, {len(rates)} iterations, each to the optimum of the loss",
        result=f"least win rate of any step of any game {rates.min():.6f}, of the first step "
        f"{over_seeds(rates[0]):.3f} over games; largest |eta D - (R_1 - R_2)| {residual:.1e}",
        holds=verdict(rates.min().item() >= 0.5 - 1e-9, residual < 1e-4),
        command=command(NAME),
    )


def _shared_claim(ratios: dict[str, Tensor], num_steps: int) -> Claim:
    risen = {label: win_rate((r[:, 0] > 0).double()) for label, r in ratios.items()}
    text = [
        f"{label} raises the chosen in {risen[label]} of seeds (log-ratio {over_seeds(r[:, 0]):.2f}, of the "
        f"rejected {over_seeds(r[:, 1]):.2f})"
        for label, r in ratios.items()
    ]
    return Claim(
        family="Self-play and games",
        method="SPPO",
        paper=SPPO,
        statement="when chosen and rejected are nearly the same to the model, DPO and IPO often lower both "
        "sides; SPPO, which has a target for each side, raises the chosen",
        what=f"log-linear policies, 10 arms, 8 random features, {len(ratios['DPO'])} seeds, {num_steps} "
        "steps on one pair; beta 0.1, tau 0.5, eta 1",
        result="; ".join(text),
        holds=verdict(risen["SPPO"].low > risen["DPO"].high, risen["SPPO"].low > risen["IPO"].high),
        command=command(NAME),
    )


def _draw(
    figure: Figure,
    preference: Tensor,
    dpo: Tensor,
    played: dict[tuple[str, float], Tensor],
    ratios: dict[str, Tensor],
) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.95))
    visited = played["SPO", 0.1][:, :1]
    steps = torch.arange(1, len(visited) + 1)
    average = visited.cumsum(0) / steps.view(-1, 1, 1)
    for series, label, path in ((1, "last policy", visited), (0, "average policy", average)):
        line(left, steps, torch.cat([arms.exploitability(preference[:1], p) for p in path]), series, label)
    left.axhline(arms.exploitability(preference, dpo)[0], color=COLOURS[2], ls=":", label="DPO, beta 0.1")
    left.set(xscale="log", yscale="log", xlabel="self-play update (SPO, eta 0.1)", ylabel="exploitability")
    left.set_title("Distance from Nash")
    left.legend(loc="lower left")

    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    middle.plot(*corner[[0, 1, 2, 0]].T.tolist(), color=MUTED, lw=1)
    for (x, y), name, dx, dy in zip(
        corner.tolist(), "ABC", (-0.06, 0.06, 0), (-0.03, -0.03, 0.05), strict=True
    ):
        middle.text(x + dx, y + dy, name, ha="center", va="center", weight="bold", color=INK)

    def place(probs: Tensor) -> list[list[float]]:
        among = probs[..., :3] / probs[..., :3].sum(-1, keepdim=True)
        return (among @ corner).reshape(-1, 2).T.tolist()

    middle.plot(*place(visited), color=COLOURS[1], lw=0.9, alpha=0.8, label="self-play")
    middle.plot(*place(average[-1:]), "o", color=COLOURS[0], ms=8, label="its average")
    middle.plot(*place(dpo[:1]), "s", color=COLOURS[2], ms=8, label="DPO")
    middle.set_aspect("equal")
    middle.axis("off")
    middle.set_ylim(-0.1, 1.0)
    middle.set_title("Policies, among A, B, C")
    middle.legend(loc="upper left", bbox_to_anchor=(-0.16, 1.0))

    for series, side in enumerate(("chosen", "rejected")):
        estimates = [over_seeds(r[:, series]) for r in ratios.values()]
        bars(right, list(ratios), estimates, series=series, shift=0.2 * series - 0.1, label=side)
    right.axhline(0, color=MUTED, lw=1)
    right.set(ylabel="log-ratio to the reference")
    right.set_title("Nearly the same to the model")
    right.legend(loc="lower right")


if __name__ == "__main__":
    main(NAME, run, __doc__)
