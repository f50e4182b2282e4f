"""Where labels are spent: on fresh samples of the policy, or all at once on samples of the reference.

    python -m triptych.scripts.experiments.on_policy_labels

Bandits of 30 arms whose true reward the reference half knows; a label is Bradley-Terry of the true rewards.
Every method pays for the same number of labels and takes the same number of steps of the same size. A seed
is 8 bandits, whose rewards are averaged.
"""

from __future__ import annotations

from collections.abc import Callable

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
    main,
    over_seeds,
    stopwatch,
)

NAME = "on_policy_labels"
NUM_ARMS, BANDITS, BATCH = 30, 8, 4
BETA, RATE, STAGES = 0.5, 0.1, 4

Pairs = tuple[Tensor, Tensor]


def bandits(seeds: int) -> tuple[Tensor, Tensor]:
    """(True rewards, log-probs of the reference), [X, A] each, X = 8 bandits a seed."""
    generator = torch.Generator().manual_seed(5)
    reward = 1.5 * torch.randn(seeds * BANDITS, NUM_ARMS, generator=generator, dtype=torch.float64)
    noise = torch.randn(reward.shape, generator=generator, dtype=torch.float64)
    return reward, (0.5 * reward + 1.5 * noise).log_softmax(-1)


def labelled(reward: Tensor, a: Tensor, b: Tensor, generator: torch.Generator) -> Pairs:
    """(Chosen, rejected) of pairs [X, N], drawn by Bradley-Terry of the true rewards."""
    chance = torch.sigmoid(reward.gather(1, a) - reward.gather(1, b))
    first_won = torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance
    return torch.where(first_won, a, b), torch.where(first_won, b, a)


def extremes(reward: Tensor, drawn: Tensor) -> Pairs:
    """(Best, worst) of the arms drawn, [X, 1] each, by the true reward."""
    value = reward.gather(1, drawn)
    best, worst = value.argmax(-1, keepdim=True), value.argmin(-1, keepdim=True)
    return drawn.gather(1, best), drawn.gather(1, worst)


def train(
    reward: Tensor, ref: Tensor, num_steps: int, source: Callable[[int, Tensor], Pairs], stages: int = 1
) -> Tensor:
    """Expected true reward by step, [T, X], of DPO on the pairs that a source gives of (step, log-probs).

    stages: how often the reference becomes the policy of the moment: 1 keeps it fixed.
    """
    policy, dpo, anchor = arms.policy_of(ref), build("dpo", beta=BETA), ref
    optimizer = torch.optim.Adam(policy.parameters(), lr=RATE)
    curve = []
    for step in range(num_steps):
        if step and step % max(1, num_steps // stages) == 0:
            anchor = arms.logp_of(policy).detach()
        optimizer.zero_grad()
        chosen, rejected = source(step, arms.logp_of(policy).detach())
        dpo(arms.pairs_of(arms.logp_of(policy), anchor, chosen, rejected)).sum().backward()
        optimizer.step()
        curve.append((arms.logp_of(policy).detach().exp() * reward).sum(-1))
    return torch.stack(curve)


def per_seed(curve: Tensor) -> Tensor:
    """Mean over the bandits of each seed, [T, X] -> [T, S]."""
    return curve.unflatten(1, (-1, BANDITS)).mean(-1)


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """True reward by where the labels went, and by which pair of 8 samples is trained on."""
    num_steps = 40 if quick else 200
    with stopwatch() as passed:
        reward, ref = bandits(max(2, seeds))
        found = {name: per_seed(curve) for name, curve in _spent(reward, ref, num_steps).items()}
        chosen = {name: per_seed(curve) for name, curve in _selected(reward, ref, num_steps).items()}
        start = per_seed((ref.exp() * reward).sum(-1).unsqueeze(0))[0]
        claims = _claims(found, chosen, start, num_steps)

        def figure(figure: Figure) -> None:
            _draw(figure, found, chosen)

        return Outcome(
            claims=claims,
            figure=figure,
            caption="True reward by step, mean and 95 % interval over seeds. Left: the same number of "
            "labels, on samples of the policy as it is, of the policy at the start of each of 4 iterations, "
            "or of the reference. Right: which pair of 8 samples an iterative learner trains on.",
            seconds=passed(),
        )


def _spent(reward: Tensor, ref: Tensor, num_steps: int) -> dict[str, Tensor]:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(6)

    rng, frozen_rng, staged_rng = generator(), generator(), generator()
    drawn_by: list[Tensor] = [ref]

    def online(step: int, logp: Tensor) -> Pairs:
        a, b = (arms.draw(logp, BATCH, rng) for _ in range(2))
        return labelled(reward, a, b, rng)

    def frozen(step: int, logp: Tensor) -> Pairs:
        a, b = (arms.draw(ref, BATCH, frozen_rng) for _ in range(2))
        return labelled(reward, a, b, frozen_rng)

    def staged(step: int, logp: Tensor) -> Pairs:
        if step % max(1, num_steps // STAGES) == 0:
            drawn_by[0] = logp
        a, b = (arms.draw(drawn_by[0], BATCH, staged_rng) for _ in range(2))
        return labelled(reward, a, b, staged_rng)

    return {
        "fresh each step": train(reward, ref, num_steps, online),
        "4 iterations": train(reward, ref, num_steps, staged),
        "frozen": train(reward, ref, num_steps, frozen),
    }


def _selected(reward: Tensor, ref: Tensor, num_steps: int) -> dict[str, Tensor]:
    rng, other = (torch.Generator().manual_seed(7) for _ in range(2))

    def max_min(step: int, logp: Tensor) -> Pairs:
        return extremes(reward, arms.draw(logp, 8, rng))

    def random(step: int, logp: Tensor) -> Pairs:
        return extremes(reward, arms.draw(logp, 8, other)[:, :2])

    return {
        "best against worst": train(reward, ref, num_steps, max_min, STAGES),
        "two at random": train(reward, ref, num_steps, random, STAGES),
    }


def _claims(
    found: dict[str, Tensor], chosen: dict[str, Tensor], start: Tensor, num_steps: int
) -> list[Claim]:
    final = {name: curve[-1] for name, curve in (found | chosen).items()}
    gained = {name: over_seeds(final["frozen"] - final[name]) for name in ("fresh each step", "4 iterations")}
    pair = over_seeds(final["best against worst"] - final["two at random"])
    what = (
        f"bandits of {NUM_ARMS} arms, {BANDITS} a seed, {len(start)} seeds; {num_steps} steps of Adam, beta "
        f"{BETA}; the reference has reward {over_seeds(start):.2f}"
    )

    def claim(method: str, paper: str, statement: str, more: str, result: str, holds: bool) -> Claim:
        return Claim(
            family="Online preferences",
            method=method,
            paper=paper,
            statement=statement,
            what=what + more,
            result=result,
            holds=holds,
            command=command(NAME),
        )

    def against(name: str) -> str:
        away = gained[name]
        gain = f"{-away.mean:.2f} [{-away.high:.2f}, {-away.low:.2f}]"
        ours, theirs = over_seeds(final[name]), over_seeds(final["frozen"])
        return f"true reward {ours:.2f} against {theirs:.2f}; gain, same bandits: {gain}"

    labels = f"; {BATCH} labels a step, reference fixed"
    return [
        claim(
            "Online DPO (OAIF)",
            "Guo et al. 2024, arXiv 2402.04792",
            "labels on fresh samples of the policy beat the same number of labels on the reference's samples",
            labels,
            against("fresh each step"),
            gained["fresh each step"].high < 0,
        ),
        claim(
            "RLHF Workflow",
            "Dong et al. 2024, arXiv 2405.07863",
            "drawing anew a few times beats offline DPO on the first draw at equal labels",
            labels,
            against("4 iterations"),
            gained["4 iterations"].high < 0,
        ),
        claim(
            "RLHF Workflow",
            "Dong et al. 2024, arXiv 2405.07863",
            "best against worst of 8 samples beats a random pair at equal updates",
            "; 1 pair of 8 samples a step, graded by the true reward, reference renewed 4 times",
            f"true reward {over_seeds(final['best against worst']):.2f} against "
            f"{over_seeds(final['two at random']):.2f}; gain, same bandits: {pair:.2f}",
            pair.low > 0,
        ),
    ]


def _draw(figure: Figure, found: dict[str, Tensor], chosen: dict[str, Tensor]) -> None:
    panels = figure.subplots(1, 2)
    titles = ("Where the labels go", "Which pair of 8 samples")
    for ax, curves, title in zip(panels, (found, chosen), titles, strict=True):
        for series, (name, curve) in enumerate(curves.items()):
            every = max(1, len(curve) // 60)
            steps = torch.arange(1, len(curve) + 1)[::every]
            band(ax, steps, curve[::every].T, series, name)
        ax.set(xlabel="step", ylabel="true reward", title=title)
        ax.legend(loc="lower right")


if __name__ == "__main__":
    main(NAME, run, __doc__)
