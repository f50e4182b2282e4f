"""Does a policy trained on the gap over a given answer improve every answer, and does it need both stages?

    python -m triptych.scripts.experiments.pit_gap --save

Answers have one of six qualities, two wordings each. A gap reward model learns from noisy pairs by `pit_gap`;
the policy, a table of answers by the answer to improve, starts from what the pairs prefer and maximises the
gap less a KL, with exact gradients. Stage 1 improves answers of the data, stage 2 those of an ordinary RLHF
policy, which are mostly good ones. Compared at the same number of steps: both stages, and either one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy
from triptych.objectives import LogLik, PairLogLik, UnitLogLik, build
from triptych.objectives.critics import gap_list
from triptych.scripts.experiments.common import (
    COLOURS,
    Claim,
    Outcome,
    band,
    command,
    main,
    over_seeds,
    stopwatch,
    verdict,
)

NUM_LEVELS, WORDINGS = 6, 2
NUM_ANSWERS = NUM_LEVELS * WORDINGS
LEVEL = torch.arange(NUM_ANSWERS) // WORDINGS
QUALITY = LEVEL.double()
# The data's answers are rarely the best ones.
DATA = torch.tensor([3.0, 4, 4, 3, 1.5, 0.5])[LEVEL].log().double().log_softmax(0)
SHARPNESS, RLHF_BETA, KL = 1.5, 0.3, 0.1
PAPER = "Wang et al. 2023, arXiv 2310.00898"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Preference pairs of every seed: better and worse answer, [S, N]."""

    better: Tensor
    worse: Tensor


def draw_pairs(seeds: int, num_pairs: int) -> Pairs:
    """Two answers of the data, labelled by Bradley-Terry of their qualities."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(DATA.exp(), seeds * num_pairs * 2, replacement=True, generator=generator)
    first, second = drawn.view(2, seeds, num_pairs)
    wins = torch.sigmoid(SHARPNESS * (QUALITY[first] - QUALITY[second]))
    chosen = torch.rand(wins.shape, generator=generator) < wins
    return Pairs(torch.where(chosen, first, second), torch.where(chosen, second, first))


def fit_rewards(pairs: Pairs, *, num_steps: int) -> tuple[Tensor, Tensor]:
    """Gap of every answer over every other, [S, A, A], and an ordinary reward of each, [S, A]."""
    seeds, num_pairs = pairs.better.shape
    gap = torch.zeros(seeds, NUM_ANSWERS, NUM_ANSWERS, dtype=torch.float64, requires_grad=True)
    reward = torch.zeros(seeds, NUM_ANSWERS, dtype=torch.float64, requires_grad=True)
    row, good, bad = (
        torch.arange(seeds).repeat_interleave(num_pairs),
        pairs.better.flatten(),
        pairs.worse.flatten(),
    )
    gap_loss, reward_loss = build("pit_gap"), build("reward_bt")
    optimizer = torch.optim.Adam([gap, reward], lr=0.05, weight_decay=1e-3)
    one = torch.ones(len(row), dtype=torch.float64)
    for _ in range(num_steps):
        scores = [gap[row, a, b] for a, b in ((good, bad), (good, good), (bad, bad), (bad, good))]
        ordinary = PairLogLik(LogLik(reward[row, good], one), LogLik(reward[row, bad], one))
        loss = gap_loss(gap_list(*scores)).sum() + reward_loss(ordinary).sum()
        optimizer.zero_grad()
        (loss / num_pairs).backward()
        optimizer.step()
    return gap.detach(), reward.detach()


def imitation(pairs: Pairs) -> Tensor:
    """Log-prob of an answer given the one to improve, [S, A (to improve), A]: pairs' counts + 1/2."""
    counts = torch.full((len(pairs.better), NUM_ANSWERS, NUM_ANSWERS), 0.5, dtype=torch.float64)
    for s, (better, worse) in enumerate(zip(pairs.better, pairs.worse, strict=True)):
        counts[s].index_put_((worse, better), torch.ones(len(better), dtype=torch.float64), accumulate=True)
    return (counts / counts.sum(-1, keepdim=True)).log()


def improve(start: Tensor, gap: Tensor, stages: Sequence[Tensor], *, num_steps: int) -> Tensor:
    """Log-probs after stages of `num_steps`, [S, A, A]; each stage draws answers to improve by [S, A].

    Gradient of E[G - KL k1] over all answers by `reinforce`; start is the reference.
    """
    shape = start.shape
    policy = TabularPolicy(start.flatten(0, 1).unsqueeze(1))
    reward = gap.transpose(1, 2).flatten(0, 1)  # [S * A (to improve), A]
    ref = start.flatten(0, 1)
    objective = build("reinforce")
    optimizer = torch.optim.SGD(policy.parameters(), lr=4.0)
    mask = torch.ones(ref.shape, dtype=torch.bool)
    for given in stages:
        for _ in range(num_steps):
            logp = policy.conditionals().squeeze(1)
            fixed = logp.detach()
            advantage = reward - KL * (fixed - ref)
            # Every answer is a row of one unit; here a row is all answers to one, weighed by probability.
            loss = objective(UnitLogLik(logp, mask, advantage=fixed.exp() * advantage))
            optimizer.zero_grad()
            (given.flatten() * loss).sum().backward()
            optimizer.step()
    return policy.conditionals().detach().view(shape)


def gains(policy: Tensor) -> Tensor:
    """E[quality(out) - quality(given)] at each level of the answer given, [S, L]."""
    expected = (policy.exp() * QUALITY).sum(-1)
    return (expected - QUALITY).view(len(policy), NUM_LEVELS, WORDINGS).mean(-1)


def repeated(policy: Tensor, start: Tensor, num_times: int) -> Tensor:
    """Expected quality when answers are improved again and again, [S, num_times + 1]; start [S, A]."""
    found, now = [start @ QUALITY], start
    for _ in range(num_times):
        now = (now.unsqueeze(1) @ policy.exp()).squeeze(1)
        found.append(now @ QUALITY)
    return torch.stack(found, -1)


def draw_figure(figure: Figure, *, policies: dict[str, Tensor], data: Tensor) -> None:
    """Gain at each level of the given answer, and quality by rounds of improving."""
    left, right = figure.subplots(1, 2)
    for series, (name, policy) in enumerate(policies.items()):
        band(left, range(NUM_LEVELS), gains(policy), series, name)
        band(right, range(6), repeated(policy, data, 5), series, name)
    left.axhline(0, color=COLOURS[5], linewidth=0.8)
    left.set(title="Gain over the given answer", xlabel="its quality", ylabel="E[quality] gained")
    right.set(title="Improving again and again", xlabel="times", ylabel="expected quality", ylim=(0, 5.1))
    left.legend()


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Both stages, and either one alone, at the same number of steps."""
    num_pairs, num_steps = (200, 40) if quick else (1000, 100)
    with stopwatch() as elapsed:
        pairs = draw_pairs(seeds, num_pairs)
        gap, reward = fit_rewards(pairs, num_steps=2 * num_steps)
        start = imitation(pairs)
        data = DATA.exp().expand(seeds, -1)
        rlhf = (DATA + reward / RLHF_BETA).softmax(-1)
        recipes = {"both stages": (data, rlhf), "stage 1 only": (data, data), "stage 2 only": (rlhf, rlhf)}
        policies = {"imitation": start} | {
            name: improve(start, gap, stages, num_steps=num_steps) for name, stages in recipes.items()
        }
        found = {name: gains(policy) for name, policy in policies.items()}
        both = [over_seeds(level) for level in found["both stages"].T]
        low, high = slice(0, NUM_LEVELS // 2), slice(NUM_LEVELS // 2, NUM_LEVELS - 1)

        def lead(over: str, levels: slice) -> Tensor:
            return (found["both stages"] - found[over])[:, levels].mean(-1)

        lag_low, lag_high = (over_seeds(lead("stage 2 only", part)) for part in (low, high))
        first_low, first_high = (over_seeds(lead("stage 1 only", part)) for part in (low, high))
        first_top = over_seeds(lead("stage 1 only", slice(NUM_LEVELS - 1, NUM_LEVELS)))
        copied = over_seeds(found["imitation"][:, -1])
        best = over_seeds(gains((start + gap.transpose(1, 2) / KL).log_softmax(-1))[:, -1])
        quality = over_seeds(rlhf @ QUALITY)
        seconds = elapsed()
    claim = partial(
        Claim,
        family="Reasoning and trees",
        method="PIT",
        paper=PAPER,
        what=f"{NUM_ANSWERS} answers of {NUM_LEVELS} qualities, {num_pairs} noisy pairs, {num_steps} exact "
        f"gradient steps a stage, {seeds} seeds",
        command=command("pit_gap"),
    )
    levels = ", ".join(f"{e:+.2f}" for e in both)
    claims = [
        claim(
            statement="Every answer that is not among the best is improved on average, and the best are "
            "nearly kept",
            result=f"E[quality(out) - quality(given)] by quality given: {levels}; at the top imitation loses "
            f"{-copied.mean:.2f}, and the exact optimum of gap less KL still {-best.mean:.2f}",
            holds=verdict(*(e.low > 0 for e in both[:-1]), abs(both[-1].mean) < 0.25),
        ),
        claim(
            statement="Stage 2 alone lags behind: it seldom sees the weak answers of the data",
            result=f"both stages less stage 2 only, same steps: {lag_low:+.3f} on the lower half, "
            f"{lag_high:+.3f} on the upper half below the top (the RLHF policy's mean quality is "
            f"{quality:.2f})",
            holds=lag_low.low > 0,
        ),
        claim(
            statement="Stage 1 alone lags behind on good answers, of which the data have few",
            result=f"both stages less stage 1 only, same steps: {first_low:+.3f} on the lower half, "
            f"{first_high:+.3f} on the upper half below the top, {first_top:+.3f} at the top",
            holds=verdict(first_high.low > 0, first_top.low > 0),
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, policies=policies, data=data),
        caption="Without stage 1 weak answers stay weak; without stage 2 only the best answers suffer.",
        seconds=seconds,
    )


if __name__ == "__main__":
    main("pit_gap", run, __doc__)
