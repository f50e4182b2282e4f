"""Which credit makes a second attempt better than the first, and which one teaches to fail on purpose?

    python -m triptych.scripts.experiments.score_credit --save

Problems with five answers, one of them right. A log-linear policy answers from weak evidence; then it sees
its answer and answers again, now with better evidence too (checking is easier than finding), which it does
not use at first: it mostly repeats itself. Its few weights are shared by all problems, so neither attempt can
be learned by heart. Expected rewards are exact: every pair of attempts, weighed by its probability. Rewards,
bonus, KL and credit are those of `PerTurn`, as a training run uses them. 'Return' credits a turn with its own
reward and all later ones, 'own' with its own alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy, as_actions, completions
from triptych.objectives import UnitLogLik, build
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
from triptych.training.groups import Group, Verdict
from triptych.training.stats import Estimate
from triptych.training.unit_credits import PerTurn

NUM_ANSWERS, NUM_PROBLEMS, RIGHT = 5, 12, 0
REPEATS = (2.0, 4.0, 6.0)  # logit of repeating the first attempt; the last is where all recipes are tried
WEAK, STRONG = 1.0, 3.0  # evidence for the right answer in the first and in the second attempt, over noise 1
RATE = 0.1
KL = 0.01
ATTEMPTS = as_actions(completions(NUM_ANSWERS, 2, None))
CORRECT = (ATTEMPTS == RIGHT).float()
PAPER = "Kumar et al. 2024, arXiv 2409.12917"

STAGE_ONE = PerTurn(credit="return", weight_per_turn=(0.0, 1.0), kl_per_turn=(0.1, KL))
NAIVE = PerTurn(credit="return", kl_per_turn=(KL, KL))
BONUS_RETURN = PerTurn(credit="return", alpha=10.0, kl_per_turn=(KL, KL))
BONUS_OWN = PerTurn(credit="own", alpha=10.0, kl_per_turn=(KL, KL))
RECIPES: dict[str, tuple[PerTurn, ...]] = {
    "two-turn RL": (NAIVE,),
    "stage I, then two-turn RL": (STAGE_ONE, NAIVE),
    "alpha 10, return": (BONUS_RETURN,),
    "alpha 10, own": (BONUS_OWN,),
    "stage I, then alpha 10, return": (STAGE_ONE, BONUS_RETURN),
    "stage I, then alpha 10, own": (STAGE_ONE, BONUS_OWN),
}
METRICS = ("acc1", "acc2", "fix|wrong", "break|right")


@dataclass(frozen=True, slots=True)
class History:
    """Metrics of one recipe over its steps, [M, C, S] for M metrics, C checkpoints and S seeds."""

    steps: tuple[int, ...]
    values: Tensor

    def last(self, metric: str) -> Tensor:
        """At the end, [S]."""
        return self.values[METRICS.index(metric), -1]


def beginners(seeds: int, repeats: float) -> tuple[Tensor, Tensor]:
    """Logits [S * P, nodes, A] and features [S * P, nodes, A, S * 3]; every seed has weights of its own.

    Features: the weak evidence in both attempts; the strong evidence and 'the same answer again' in the
    second. Policies begin without evidence, with the logit `repeats` for the same answer.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (seeds, NUM_PROBLEMS, 1, NUM_ANSWERS)
    right = torch.eye(NUM_ANSWERS)[RIGHT]
    weak, strong = (torch.randn(shape, generator=generator) + m * right for m in (WEAK, STRONG))
    second = torch.zeros(1 + NUM_ANSWERS, 1)
    second[1:] = 1
    again = torch.cat([torch.zeros(1, NUM_ANSWERS), torch.eye(NUM_ANSWERS)])
    own = torch.stack(torch.broadcast_tensors(weak, strong * second, again), -1)
    apart = torch.eye(seeds)[:, None, None, None, :, None] * own.unsqueeze(-2)
    features = apart.flatten(-2).flatten(0, 1)
    return (repeats * again).expand(features.shape[:-1]), features


def metrics_of(terms: Tensor) -> Tensor:
    """METRICS of each seed from the log-probs of every pair of attempts [S * P, N, 2], [M, S]."""
    p = terms.sum(-1).exp()
    first, second = CORRECT.bool().unbind(-1)
    right, both = p[:, first].sum(-1), p[:, first & second].sum(-1)
    fixed = p[:, ~first & second].sum(-1)
    rows = torch.stack([right, both + fixed, fixed, 1 - right, right - both])
    acc1, acc2, fixed, wrong, broken = rows.view(5, -1, NUM_PROBLEMS).mean(-1)
    return torch.stack([acc1, acc2, fixed / wrong, broken / acc1])


def train(
    start: tuple[Tensor, Tensor], credits: Sequence[PerTurn], *, num_steps: int, checkpoints: int = 50
) -> History:
    """Each credit for `num_steps` of exact gradient ascent, one after the other, from the reference."""
    logits, features = start
    policy = TabularPolicy(logits, features=features, length=2)
    num = len(logits)
    actions = ATTEMPTS.repeat(num, 1)
    contexts = torch.arange(num).repeat_interleave(len(ATTEMPTS))
    mask = torch.ones(actions.shape, dtype=torch.bool)
    turn = torch.arange(2).expand(mask.shape)
    judged = Verdict(units=CORRECT.repeat(num, 1))
    objective = build("reinforce")
    assert policy.theta is not None
    optimizer = torch.optim.SGD([policy.theta], lr=RATE)
    ref = policy(actions, contexts).detach()
    steps: list[int] = []
    rows: list[Tensor] = []
    for step in range(num_steps * len(credits) + 1):
        terms = policy(actions, contexts)
        fixed = terms.detach()
        if step % max(1, num_steps // checkpoints) == 0:
            steps.append(step)
            rows.append(metrics_of(fixed.view(num, -1, 2)))
        if step == num_steps * len(credits):
            break
        group = Group(
            key="all", context=None, candidates=tuple(range(len(actions))), mask=mask, unit="turn",
            logp=fixed, ref=ref, turn=turn, verdict=judged,
        )  # fmt: skip
        advantage = credits[step // num_steps](group)["advantage"]
        loss = objective(UnitLogLik(terms, mask, advantage=advantage))
        optimizer.zero_grad()
        ((fixed.sum(-1).exp() * loss).sum() / NUM_PROBLEMS).backward()
        optimizer.step()
    return History(tuple(steps), torch.stack(rows, 1))


def draw_figure(figure: Figure, *, found: dict[str, History]) -> None:
    """Both attempts' accuracies over the steps, a panel for each recipe."""
    shown = ("two-turn RL", "stage I, then two-turn RL", "alpha 10, return", "alpha 10, own")
    for ax, name in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        history = found[name]
        band(ax, history.steps, history.values[0].T, 1, "first attempt")
        band(ax, history.steps, history.values[1].T, 0, "second attempt")
        ax.set(title=name, xlabel="exact gradient steps", ylim=(0, 1))
    figure.axes[0].set_ylabel("probability that it is right")
    figure.axes[0].legend(loc="lower right")


def repeated(repeats: float) -> float:
    """Probability of the same answer again before any learning."""
    return math.exp(repeats) / (math.exp(repeats) + NUM_ANSWERS - 1)


@dataclass(frozen=True, slots=True)
class Staged:
    """gain: acc2 - acc1 of two-turn RL. more: acc2 with stage I first less that of as many steps without."""

    gain: Estimate
    more: Estimate


def stage_one(start: tuple[Tensor, Tensor], *, num_steps: int) -> Staged:
    """What stage I is worth from where these policies begin."""
    longer = train(start, (NAIVE, NAIVE), num_steps=num_steps)
    staged = train(start, (STAGE_ONE, NAIVE), num_steps=num_steps)
    half = longer.steps.index(num_steps)
    acc1, acc2 = (longer.values[METRICS.index(m), half] for m in ("acc1", "acc2"))
    return Staged(over_seeds(acc2 - acc1), over_seeds(staged.last("acc2") - longer.last("acc2")))


def summary(history: History) -> str:
    """Metrics at the end in words."""
    acc1, acc2, fix, broken = (over_seeds(history.last(m)).mean for m in METRICS)
    delta = over_seeds(history.last("acc2") - history.last("acc1"))
    return (
        f"acc1 {acc1:.3f}, acc2 {acc2:.3f} (gain {delta:+.3f}), fix|wrong {fix:.3f}, break|right {broken:.3f}"
    )


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Every recipe from the same beginners; the control of stage I is as many steps without it."""
    num_steps = 60 if quick else 200
    with stopwatch() as elapsed:
        cautious = {r: beginners(seeds, r) for r in REPEATS}
        stage = {r: stage_one(start, num_steps=num_steps) for r, start in cautious.items()}
        clinging = cautious[REPEATS[-1]]
        found = {name: train(clinging, credits, num_steps=num_steps) for name, credits in RECIPES.items()}
        returned, own = found["alpha 10, return"], found["alpha 10, own"]
        after = {c: found[f"stage I, then alpha 10, {c}"] for c in ("return", "own")}
        before = over_seeds(returned.values[0, 0])
        sandbag = over_seeds(returned.last("acc1") - returned.values[0, 0])
        kept = over_seeds(own.last("acc1") - own.values[0, 0])
        better = over_seeds(own.last("acc2") - found["two-turn RL"].last("acc2"))
        stage_own = over_seeds(after["own"].last("acc2") - own.last("acc2"))
        seconds = elapsed()
    claim = partial(
        Claim,
        family="Reasoning and trees",
        method="SCoRe",
        paper=PAPER,
        command=command("score_credit"),
        what=f"{NUM_PROBLEMS} problems with {NUM_ANSWERS} answers, two attempts, exact gradients, "
        f"{num_steps} steps a stage, {seeds} random sets of problems",
    )
    claims = [
        claim(
            statement="Plain two-turn RL leaves the second attempt little better than the first, and stage I "
            "first improves it more than as many steps of RL",
            result="; ".join(
                f"repeating itself with probability {repeated(r):.2f} at first: gain {s.gain:+.3f}, acc2 by "
                f"stage I {s.more:+.3f}"
                for r, s in stage.items()
            ),
            holds=verdict(*(s.gain.high < 0.1 and s.more.low > 0 for s in stage.values())),
        ),
        claim(
            statement="With alpha = 10 and the return as credit the first attempt is failed on purpose",
            result=f"acc1 {before:.3f} before, change {sandbag:+.3f}: {summary(returned)}; after stage I: "
            f"{summary(after['return'])}",
            holds=sandbag.high < 0,
        ),
        claim(
            statement="With credit per turn the same bonus keeps the first attempt and improves the second",
            result=f"acc1 change {kept:+.3f}, acc2 {better:+.3f} against two-turn RL: {summary(own)}; stage "
            f"I first changes acc2 by {stage_own:+.3f}",
            holds=verdict(kept.low > 0, better.low > 0),
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, found=found),
        caption="A bonus for improvement that the first attempt can see teaches it to fail.",
        seconds=seconds,
        size=(13.0, 3.6),
    )


if __name__ == "__main__":
    main("score_credit", run, __doc__)
