"""Short checks: CREAM's margin and labels, P3O's invariance, the difficulty bias of GRPO.

    python -m triptych.scripts.experiments.small_identities

Gradients are exact: of one pair, of random bandits, or of every group that can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.objectives import build
from triptych.objectives.advantages import centred, leave_one_out, z_score
from triptych.scripts.experiments import arms
from triptych.scripts.experiments.common import (
    COLOURS,
    MUTED,
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
from triptych.training.agreement import kendall

NAME = "small_identities"
BETA = 0.1
CONSISTENCIES = (0.6, 0.75, 0.9, 0.99, 1.0)
PROMPTS, ANSWERS, WIDTH, DRAWN, NOISE = 32, 12, 8, 5, 1.5
CREAM = "Wang et al. 2024, arXiv 2410.12735"


@dataclass(frozen=True, slots=True)
class Fit:
    """How a self-rewarding model is trained in each iteration."""

    optimizer: Callable[[list[Tensor], float], torch.optim.Optimizer]
    rate: float
    num_steps: int


# Adam makes up for the smaller gradients of softened labels, which are CREAM's point; so both are tried.
FITS = {
    "gradient descent, 60 steps": Fit(torch.optim.SGD, 2.0, 60),
    "gradient descent, 120 steps": Fit(torch.optim.SGD, 2.0, 120),
    "Adam, 20 steps": Fit(torch.optim.Adam, 0.05, 20),
}


def margins(num_steps: int) -> Tensor:
    """log-ratio margin of one pair a context by step, [T, C], smoothed by 1 - C of CONSISTENCIES."""
    ref = torch.zeros(len(CONSISTENCIES), 2, dtype=torch.float64).log_softmax(-1)
    policy, dpo = arms.policy_of(ref), build("dpo", beta=BETA)
    smoothing = 1 - torch.tensor(CONSISTENCIES, dtype=torch.float64).unsqueeze(-1)
    chosen, rejected = torch.tensor([0]), torch.tensor([1])
    curve = []
    for _ in range(num_steps):
        pair = arms.pairs_of(arms.logp_of(policy), ref, chosen, rejected, smoothing=smoothing)
        (gradient,) = torch.autograd.grad(dpo(pair).sum(), [policy.logits])
        with torch.no_grad():
            policy.logits.sub_(50 * gradient)
        curve.append((policy.logits.detach()[:, 0, 0] - policy.logits.detach()[:, 0, 1]).clone())
    return torch.stack(curve)


def self_rewarding(seeds: int, num_iterations: int, fit: Fit, *, consistent: bool) -> Tensor:
    """Share of self-made pairs whose chosen is truly better, [T, S].

    A log-linear policy is trained on one truly labelled pair a prompt, then on its own rankings of 5 samples
    a prompt by its log-ratio to the base, blurred by NOISE standard deviations. consistent: whether pairs
    are smoothed by its agreement with the model before it (CREAM) or not.
    """
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = normal(seeds, PROMPTS * ANSWERS, WIDTH)
    blocks = arms.separate(features).view(seeds * PROMPTS, 1, ANSWERS, seeds * WIDTH)
    truth = (features @ normal(seeds, WIDTH, 1)).view(-1, ANSWERS)
    base = torch.zeros_like(truth).log_softmax(-1)
    policy = arms.TabularPolicy(base.unsqueeze(1), features=blocks)
    first = torch.rand(truth.shape, generator=generator).argsort(-1)[:, :2]
    train(policy, *ordered(truth, first), torch.zeros(len(truth), 1), fit)
    before, accuracy = normal(*truth.shape), []
    for _ in range(num_iterations):
        now = arms.logp_of(policy).detach() - base
        drawn = torch.rand(truth.shape, generator=generator).argsort(-1)[:, :DRAWN]
        ranked = [blurred(s, drawn, NOISE * normal(len(truth), DRAWN)) for s in (now, before)]
        chosen, rejected = (drawn.gather(1, i) for i in extremes(ranked[0]))
        accuracy.append((truth.gather(1, chosen) > truth.gather(1, rejected)).double())
        agreement = torch.tensor([(kendall(a, b) + 1) / 2 for a, b in zip(*ranked, strict=True)])
        share = agreement.view(seeds, -1).mean(-1).repeat_interleave(PROMPTS).unsqueeze(-1)
        smoothing = 1 - share if consistent else torch.zeros_like(share)
        train(policy, chosen, rejected, smoothing, fit)
        before = now
    return torch.stack(accuracy).view(num_iterations, seeds, -1).mean(-1)


def blurred(score: Tensor, drawn: Tensor, noise: Tensor) -> Tensor:
    """Scores of the drawn answers, in standard deviations, and noise, [X, K]."""
    own = score.gather(1, drawn)
    return (own - own.mean(-1, keepdim=True)) / own.std(-1, keepdim=True).clamp(min=1e-9) + noise


def extremes(score: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the best and the worst, [X, 1] each."""
    return score.argmax(-1, keepdim=True), score.argmin(-1, keepdim=True)


def ordered(truth: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """(Better, worse) of two arms by the truth, [X, 1] each."""
    swap = (truth.gather(1, pair[:, :1]) < truth.gather(1, pair[:, 1:])).expand(-1, 2)
    pair = torch.where(swap, pair.flip(-1), pair)
    return pair[:, :1], pair[:, 1:]


def train(policy: arms.TabularPolicy, chosen: Tensor, rejected: Tensor, smoothing: Tensor, fit: Fit) -> None:
    """DPO on pairs smoothed each by its own rate; the reference is the policy as it comes."""
    ref, dpo = arms.logp_of(policy).detach(), build("dpo", beta=BETA)
    optimizer = fit.optimizer([p for p in policy.parameters() if p.requires_grad], fit.rate)
    for _ in range(fit.num_steps):
        optimizer.zero_grad()
        pairs = arms.pairs_of(arms.logp_of(policy), ref, chosen, rejected, smoothing=smoothing.double())
        dpo(pairs).sum().backward()
        optimizer.step()


def shifts(seeds: int) -> dict[str, Tensor]:
    """Relative change of the gradient when both rewards of a pair rise by the same amount, [S]."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(seeds, 6, generator=generator, dtype=torch.float64)
    reward = torch.randn(seeds, 6, generator=generator, dtype=torch.float64)
    moved = 10 * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
    old = (logits + 0.2 * torch.randn(seeds, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    policy = arms.policy_of(logits)
    drawn = torch.rand(seeds, 6, generator=generator).argsort(-1)[:, :2]
    first, second = drawn[:, :1], drawn[:, 1:]

    def gradient(method: str, given: Tensor) -> Tensor:
        logp = arms.logp_of(policy)
        if method == "REINFORCE":
            loss = build("reinforce")(arms.units_of(logp, drawn, given.gather(1, drawn), old))
        else:
            gap = given.gather(1, first) - given.gather(1, second)
            pairs = arms.pairs_of(logp, old, first, second, margin=gap)
            options = {"P3O-V1": ("p3o", {"clip": 0.2}), "P3O-V2": ("p3o_joint", {"delta": 0.3})}
            name, hyperparameters = options[method]
            loss = build(name, **hyperparameters)(pairs)
        return torch.autograd.grad(loss.sum(), [policy.logits])[0].flatten(1)

    found = {}
    for method in ("P3O-V1", "P3O-V2", "REINFORCE"):
        plain, shifted = gradient(method, reward), gradient(method, reward + moved)
        # A clipped pair has no gradient at all, shifted or not.
        found[method] = (shifted - plain).norm(dim=-1) / plain.norm(dim=-1).clamp(min=1e-6)
    return found


def expected_gradients(chances: Tensor, size: int) -> dict[str, Tensor]:
    """Gradient in the logit of the right answer by its chance p, in expectation over groups, [P].

    A question with a right and a wrong answer; groups of `size` samples with m right ones are enumerated.
    """
    old = torch.stack([chances, 1 - chances], -1).log()
    policy = arms.policy_of(old)
    m = torch.arange(size + 1, dtype=torch.float64)
    arm = (torch.arange(size) >= m.unsqueeze(-1)).long()
    reward = (arm == 0).double()
    log_choose = math.lgamma(size + 1) - torch.lgamma(m + 1) - torch.lgamma(size - m + 1)
    weight = (log_choose + m * old[:, :1] + (size - m) * old[:, 1:]).exp()
    credits = {"GRPO": z_score(reward), "Dr. GRPO": centred(reward), "RLOO": leave_one_out(reward)}
    names = {"GRPO": "grpo", "Dr. GRPO": "dr_grpo", "RLOO": "rloo"}
    found = {}
    for method, advantage in credits.items():
        units = arms.units_of(arms.logp_of(policy), arm.flatten(), advantage.expand(len(old), -1, -1), old)
        loss = build(names[method], clip=0.2)(units).view(len(old), len(m), size).mean(-1)
        (gradient,) = torch.autograd.grad((weight * loss).sum(), [policy.logits])
        found[method] = -gradient[:, 0, 0]
    return found


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """All four checks."""
    num_iterations = 2 if quick else 5
    with stopwatch() as passed:
        seeds = max(2, seeds)
        curve = margins(500 if quick else 4000)
        accuracy = {
            (label, consistent): self_rewarding(seeds, num_iterations, fit, consistent=consistent)
            for label, fit in FITS.items()
            for consistent in (True, False)
        }
        changes = shifts(seeds)
        chances = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
        pulls = expected_gradients(chances, 8)
        claims = [
            _margin_claim(curve),
            _accuracy_claim(accuracy, seeds),
            _shift_claim(changes),
            _difficulty_claim(chances, pulls),
        ]

        def figure(figure: Figure) -> None:
            _draw(figure, curve, accuracy, chances, pulls)

        return Outcome(
            claims=claims,
            figure=figure,
            caption="Left: the margin of a pair whose label is trusted to C, and logit(C) / beta (thin "
            "lines). Middle: share of self-made pairs that are right (gradient descent, 60 "
            "steps), mean and 95 % interval over seeds. "
            "Right: weight of a question by its chance of a right answer, over that of the true gradient, "
            "groups of 8.",
            seconds=passed(),
            size=(12.0, 3.6),
        )


def _margin_claim(curve: Tensor) -> Claim:
    soft = torch.tensor(CONSISTENCIES[:-1], dtype=torch.float64)
    aim = soft.logit() / BETA
    away = (curve[-1, :-1] - aim).abs().max().item()
    hard, half = curve[-1, -1].item(), curve[len(curve) // 2, -1].item()
    text = ", ".join(f"C {c:g}: {m:.3f}" for c, m in zip(CONSISTENCIES, curve[-1].tolist(), strict=True))
    return Claim(
        family="Online preferences",
        method="CREAM",
        paper=CREAM,
        statement="the margin of a pair stops at logit(C) / beta; with C = 1, which is DPO, it keeps growing",
        what=f"one pair, beta {BETA}, {len(curve)} exact steps",
        result=f"margins {text}; largest distance from logit(C) / beta {away:.1e}; at C = 1 still growing, "
        f"from {half:.1f} halfway to {hard:.1f}",
        holds=verdict(away < 1e-3, hard > half + 1),
        command=command(NAME),
    )


def _accuracy_claim(accuracy: dict[tuple[str, bool], Tensor], seeds: int) -> Claim:
    saved = {label: over_seeds(accuracy[label, True][-1] - accuracy[label, False][-1]) for label in FITS}
    text = []
    for label in FITS:
        soft, hard = accuracy[label, True], accuracy[label, False]
        text.append(
            f"{label}: from {soft[0].mean():.3f} to {over_seeds(soft[-1]):.3f} (CREAM) and "
            f"{over_seeds(hard[-1]):.3f} (C = 1), difference on the same seeds {saved[label]:.3f}"
        )
    return Claim(
        family="Online preferences",
        method="CREAM",
        paper=CREAM,
        statement="when a model labels its own samples with noise, the accuracy of its labels falls more "
        "slowly with labels softened by consistency than with C = 1, however it is trained",
        what=f"log-linear policies, {PROMPTS} prompts, {DRAWN} samples a prompt, "
        f"{len(next(iter(accuracy.values())))} iterations, {seeds} seeds; judge noise of {NOISE} standard "
        "deviations of the scores",
        result="; ".join(text),
        holds=verdict(*(estimate.low > 0 for estimate in saved.values())),
        command=command(NAME),
    )


def _shift_claim(changes: dict[str, Tensor]) -> Claim:
    p3o = max(changes["P3O-V1"].max().item(), changes["P3O-V2"].max().item())
    other = changes["REINFORCE"]
    return Claim(
        family="Policy gradients",
        method="P3O",
        paper="Wu et al. 2023, arXiv 2310.00212",
        statement="adding the same amount to both rewards of a pair changes nothing; it changes REINFORCE",
        what=f"{len(changes['REINFORCE'])} random bandits of 6 arms, shifts of size 10, both forms of P3O",
        result=f"largest relative change of a gradient: P3O {p3o:.1e}; REINFORCE at least "
        f"{other.min():.2f}, {over_seeds(other):.1f} on average",
        holds=verdict(p3o < 1e-12, other.min().item() > 0.01),
        command=command(NAME),
    )


def _difficulty_claim(chances: Tensor, pulls: dict[str, Tensor]) -> Claim:
    true = chances * (1 - chances)
    shape = {name: (p / true) / (p / true)[len(true) // 2] for name, p in pulls.items()}
    others = max((shape[name] - 1).abs().max().item() for name in ("Dr. GRPO", "RLOO"))
    exact = (pulls["RLOO"] - true).abs().max().item()
    ten = int((chances - 0.1).abs().argmin())
    return Claim(
        family="Policy gradients",
        method="GRPO",
        paper="Shao et al. 2024, arXiv 2402.03300; the bias: Liu et al. 2025, arXiv 2503.20783",
        statement="dividing by the group's deviation weighs questions by their difficulty, easy and hard "
        "ones most; centring alone (Dr. GRPO) and leave-one-out (RLOO) do not",
        what="a question with one right answer, groups of 8 enumerated, chances of success 0.02 to 0.98",
        result=f"GRPO's weight over that of the true gradient: {shape['GRPO'][0]:.2f} at p = 0.02, "
        f"{shape['GRPO'][ten]:.2f} at p = 0.1, 1 at p = 0.5; Dr. GRPO and RLOO differ from 1 by at most "
        f"{others:.1e}; RLOO from the exact gradient p (1 - p) by {exact:.1e}",
        holds=verdict(bool(shape["GRPO"][ten] > 1.2), others < 1e-9, exact < 1e-9),
        command=command(NAME),
    )


def _draw(
    figure: Figure,
    curve: Tensor,
    accuracy: dict[tuple[str, bool], Tensor],
    chances: Tensor,
    pulls: dict[str, Tensor],
) -> None:
    left, middle, right = figure.subplots(1, 3)
    steps = torch.arange(1, len(curve) + 1)
    for series, consistency in enumerate(CONSISTENCIES):
        line(left, steps, curve[:, series], series, f"C {consistency:g}")
        if consistency < 1:
            aim = math.log(consistency / (1 - consistency)) / BETA
            left.axhline(aim, color=COLOURS[series], lw=0.7, alpha=0.6)
    left.set(xscale="log", xlabel="step", ylabel="log-ratio margin", title="CREAM: where the margin stops")
    left.legend(loc="upper left")
    for series, (consistent, name) in enumerate(((True, "CREAM"), (False, "C = 1"))):
        values = accuracy[next(iter(FITS)), consistent]
        band(middle, torch.arange(1, len(values) + 1), values.T, series, name)
        middle.set_xticks(range(1, len(values) + 1))
    middle.set(xlabel="iteration", ylabel="labels that are right", title="Labels of its own")
    middle.legend(loc="best")
    for series, (name, pull) in enumerate(pulls.items()):
        weight = pull / (chances * (1 - chances))
        line(right, chances, weight / weight[len(weight) // 2], series, name)
    right.axhline(1, color=MUTED, lw=0.7)
    right.set(xlabel="chance of a right answer", ylabel="relative weight", title="GRPO: weight by difficulty")
    right.legend(loc="upper center")


if __name__ == "__main__":
    main(NAME, run, __doc__)
