"""Do OREO's values converge to the soft-optimal ones, and do they drop at the step that was wrong?

    python -m triptych.scripts.experiments.oreo_values --save

A reasoning tree of three steps with three choices each. The first choice of three is wrong in step 1, only
one is right in step 2, and step 3 does not matter; the reward is 1 for a path without a wrong step. First
all 27 paths, then samples of a behaviour policy that is neither the reference nor the policy. Control: DPO
on pairs of a right and a wrong path of the same samples, its credit of a step being beta * log-ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy, as_actions, completions, node_of, num_nodes_of
from triptych.objectives import LogLik, PairLogLik, UnitLogLik, build
from triptych.scripts.experiments.common import (
    COLOURS,
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
from triptych.training.stats import Estimate

NUM_ACTIONS, LENGTH, BETA = 3, 3, 0.5
PATHS = completions(NUM_ACTIONS, LENGTH, None)
NODES = torch.tensor([[node_of(path[:u], NUM_ACTIONS) for u in range(LENGTH)] for path in PATHS])
WRONG_STEP = torch.tensor([0 if path[0] == 2 else 1 if path[1] != 0 else -1 for path in PATHS])
REWARD = (WRONG_STEP < 0).double()
PAPER = "Wang et al. 2024, arXiv 2412.16145"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A policy and its critic after learning, and errors at checkpoints.

    terms, ref: log-prob of each step of each path, [X, N, U]; value: V before each step, [X, N, U]; errors:
    largest error of V and of the probabilities, [X, C] each; steps: when, [C].
    """

    terms: Tensor
    ref: Tensor
    value: Tensor
    value_errors: Tensor
    policy_errors: Tensor
    steps: tuple[int, ...]


def random_tables(num: int, seed: int) -> Tensor:
    """Logits of `num` unrelated policies, [X, S, A] float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, num_nodes_of(NUM_ACTIONS, LENGTH), NUM_ACTIONS)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def of_paths(policy: TabularPolicy, names: tuple[str, ...] = ()) -> Tensor:
    """What the policy says of every path in every context, [X, N, U], or [names + 1, X, N, U]."""
    num, paths = policy.num_contexts, as_actions(PATHS)
    contexts = torch.arange(num).repeat_interleave(len(PATHS))
    found = policy(paths.repeat(num, 1), contexts, None, names)
    return found.view(*found.shape[:-2], num, len(PATHS), LENGTH)


def soft_optimum(ref: Tensor) -> tuple[Tensor, Tensor]:
    """V before each step and log-prob of each step under the soft-optimal policy, [X, N, U] each.

    V(s) = beta log sum over the paths through s of ref(path | s) exp(R / beta).
    """
    gain = ref.sum(-1) + REWARD / BETA
    mass = [ref[..., :u].sum(-1) for u in range(LENGTH)]
    values: list[Tensor] = []
    for u in range(LENGTH):
        through = NODES[:, u].unsqueeze(0) == NODES[:, u].unsqueeze(1)
        total = gain.unsqueeze(1).masked_fill(~through, -torch.inf).logsumexp(-1)
        values.append(BETA * (total - mass[u]))
    value = torch.stack(values, -1)
    return value, ref + credit_of_values(value) / BETA


def credit_of_values(value: Tensor) -> Tensor:
    """V after a step less V before it, [X, N, U]; after the last step it is the reward."""
    outcome = REWARD.expand(value.shape[:-1]).unsqueeze(-1)
    return torch.cat([value[..., 1:], outcome], -1) - value


def fit_oreo(tables: Tensor, counts: Tensor, *, num_steps: int, checkpoints: int = 40) -> Fitted:
    """`oreo_value` and `oreo_policy` on paths with their counts [X, N], by full-batch gradient descent."""
    policy = TabularPolicy(tables, length=LENGTH, critic=True)
    ref = of_paths(policy).detach()
    best_value, best_terms = soft_optimum(ref)
    share = (counts / counts.sum(-1, keepdim=True)).flatten()
    mask = torch.ones(share.numel(), LENGTH, dtype=torch.bool)
    target = REWARD.repeat(len(tables)).unsqueeze(-1).expand(mask.shape)
    critic_loss, policy_loss = build("oreo_value", beta=BETA), build("oreo_policy", beta=BETA)
    assert policy.critic is not None
    optimizer = torch.optim.Adam([policy.logits, policy.critic], lr=0.03, betas=(0.9, 0.99), eps=1e-4)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 10 ** (-5 * max(0, s / num_steps - 0.4)))
    steps: list[int] = []
    errors: list[Tensor] = []
    seen = (counts > 0).unsqueeze(-1)
    for step in range(num_steps + 1):
        terms, value = of_paths(policy, ("value",))
        if step % (num_steps // checkpoints) == 0:
            away = (value - best_value).abs(), (terms.exp() - best_terms.exp()).abs()
            errors.append(torch.stack([torch.where(seen, a, 0.0).amax((1, 2)) for a in away]).detach())
            steps.append(step)
        units = UnitLogLik(
            terms.flatten(0, 1), mask, ref=ref.flatten(0, 1), value=value.flatten(0, 1), target=target
        )
        loss = (share * (critic_loss(units) + policy_loss(units))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    terms, value = (x.detach() for x in of_paths(policy, ("value",)))
    value_errors, policy_errors = torch.stack(errors, 1).permute(0, 2, 1)
    return Fitted(
        terms=terms,
        ref=ref,
        value=value,
        value_errors=value_errors,
        policy_errors=policy_errors,
        steps=tuple(steps),
    )


def fit_dpo(tables: Tensor, counts: Tensor, *, num_steps: int) -> tuple[Tensor, Tensor]:
    """DPO on all pairs of a right and a wrong path, weighted by counts: terms and reference, [X, N, U]."""
    policy = TabularPolicy(tables, length=LENGTH)
    ref = of_paths(policy).detach()
    right, wrong = REWARD.nonzero().squeeze(-1), (1 - REWARD).nonzero().squeeze(-1)
    good, bad = (x.flatten() for x in torch.meshgrid(right, wrong, indexing="ij"))
    weight = (counts[:, good] * counts[:, bad]).flatten()
    weight = weight / counts.sum(-1).repeat_interleave(len(good)).square()
    objective = build("dpo", beta=BETA)
    optimizer = torch.optim.Adam([policy.logits], lr=0.03, betas=(0.9, 0.99))
    for _ in range(num_steps):
        summed, summed_ref = of_paths(policy).sum(-1), ref.sum(-1)

        def side(which: Tensor, s: Tensor = summed, r: Tensor = summed_ref) -> LogLik:
            return LogLik(s[:, which].flatten(), torch.full_like(weight, LENGTH), r[:, which].flatten())

        loss = (weight * objective(PairLogLik(side(good), side(bad)))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return of_paths(policy).detach(), ref


def localised(credit: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Over wrong paths seen: share whose lowest credit is at the wrong step, and mean size of it afterwards.

    credit [X, N, U] -> [X] each. 'Afterwards' is the mean |credit| of the steps after the wrong one, which
    change nothing, over that of the wrong step.
    """
    wrong = (WRONG_STEP >= 0).nonzero().squeeze(-1)
    weight = counts[:, wrong]
    share = weight / weight.sum(-1, keepdim=True)
    own, place = credit[:, wrong], WRONG_STEP[wrong]
    found = (own.argmin(-1) == place).double()
    later = torch.arange(LENGTH) > place.unsqueeze(-1)
    at = own.gather(-1, place.expand(len(own), -1).unsqueeze(-1)).squeeze(-1).abs()
    after = (own.abs() * later).sum(-1) / later.sum(-1)
    return (share * found).sum(-1), (share * after).sum(-1) / (share * at).sum(-1)


def offline_counts(*, seeds: int, num_paths: int, behaviour: Tensor) -> Tensor:
    """How often each path was drawn by a behaviour policy of its own, [X, N]."""
    logp = of_paths(TabularPolicy(behaviour, length=LENGTH)).detach().sum(-1)
    rows = [
        torch.multinomial(row.exp(), num_paths, replacement=True, generator=torch.Generator().manual_seed(s))
        for s, row in enumerate(logp)
    ]
    return torch.stack([torch.bincount(row, minlength=len(PATHS)) for row in rows]).double()


def draw_figure(figure: Figure, *, exact: Fitted, offline: Fitted, scores: Sequence[Estimate]) -> None:
    """Convergence, values along two wrong paths, and how often the wrong step is found."""
    left, middle, right = figure.subplots(1, 3)
    band(left, exact.steps, exact.value_errors.clamp(min=1e-16).log10(), 0, "V")
    band(left, exact.steps, exact.policy_errors.clamp(min=1e-16).log10(), 1, "policy")
    left.set(
        title="Error, learning from all paths", xlabel="gradient steps", ylabel="log10 of the largest error"
    )
    left.legend()
    kinds = {"right path": -1, "wrong at step 2": 1, "wrong at step 1": 0}
    for series, (label, place) in enumerate(kinds.items()):
        of_kind = WRONG_STEP.eq(place).nonzero().squeeze(-1)
        outcome = REWARD[of_kind].expand(len(offline.value), -1)
        path = torch.cat([offline.value[:, of_kind], outcome.unsqueeze(-1)], -1).mean(1)
        band(middle, range(LENGTH + 1), path, (2, 0, 1)[series], label)
    middle.set(title="V along a path, from offline data", xlabel="steps taken", xticks=range(LENGTH + 1))
    middle.legend()
    bars(right, ["OREO's V", "OREO's policy", "DPO"], scores)
    right.axhline(1, color=COLOURS[2], linewidth=0.8)
    right.set(title="Wrong step found", ylabel="share of wrong paths", ylim=(0, 1.05))


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """All paths, then offline samples, then the control."""
    num_steps, num_paths = (400, 300) if quick else (2000, 300)
    with stopwatch() as elapsed:
        tables = random_tables(seeds, 1)
        everything = torch.ones(seeds, len(PATHS), dtype=torch.float64)
        exact = fit_oreo(tables, everything, num_steps=num_steps)
        counts = offline_counts(seeds=seeds, num_paths=num_paths, behaviour=random_tables(seeds, 2))
        offline = fit_oreo(tables, counts, num_steps=num_steps)
        pairs, ref = fit_dpo(tables, counts, num_steps=num_steps)
        ceiling = over_seeds(localised(credit_of_values(soft_optimum(ref)[0]), counts)[0])
        found, after = zip(
            localised(credit_of_values(offline.value), counts),
            localised(BETA * (offline.terms - offline.ref), counts),
            localised(BETA * (pairs - ref), counts),
            strict=True,
        )
        hits, rest = [over_seeds(f) for f in found], [over_seeds(a) for a in after]
        seconds = elapsed()
    worst_value, worst_policy = exact.value_errors[:, -1].max(), exact.policy_errors[:, -1].max()
    offline_value = over_seeds(offline.value_errors[:, -1])
    claim = partial(
        Claim, family="Reasoning and trees", method="OREO", paper=PAPER, command=command("oreo_values")
    )
    toy = f"tree of {LENGTH} steps and {NUM_ACTIONS} choices, beta {BETA}, {seeds} random references"
    claims = [
        claim(
            statement="From unpaired paths, V converges to beta log sum ref exp(R / beta) and the policy to "
            "the soft-optimal one",
            result=f"largest error over all seeds and states: V {worst_value:.1e}, probability "
            f"{worst_policy:.1e} after {num_steps} steps",
            holds=verdict(bool(worst_value < 1e-3), bool(worst_policy < 1e-3)),
            what=f"{toy}; all {len(PATHS)} paths, exact gradients",
        ),
        claim(
            statement="From offline samples of another policy V drops at the step that was wrong, and not "
            "after it",
            result=f"lowest credit at the wrong step in {hits[0]:.3f} of the wrong paths by V, {hits[1]:.3f} "
            f"by the policy's log-ratios, {ceiling:.3f} by the exact V (a right step may lose "
            f"more); credit of the neutral steps after it {rest[0]:.3f} and "
            f"{rest[1]:.3f} of the wrong step's; largest error of V {offline_value:.3f}",
            holds=verdict(hits[0].mean > ceiling.mean - 0.02, rest[0].high < 0.05),
            what=f"{toy}; {num_paths} paths of a random behaviour policy each",
        ),
        claim(
            statement="DPO on pairs of whole paths of the same samples does not show which step was wrong",
            result=f"lowest log-ratio at the wrong step in {hits[2]:.3f} of the wrong paths; that of the "
            f"neutral steps after it {rest[2]:.3f} of the wrong step's",
            holds=verdict(hits[2].high < hits[1].low, rest[2].low > rest[1].high),
            what=f"{toy}; all pairs of a right and a wrong path among the {num_paths}, {num_steps} steps",
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, exact=exact, offline=offline, scores=hits),
        caption="OREO's value falls where the mistake is made; DPO's log-ratios blame neutral steps as well.",
        seconds=seconds,
        size=(12.0, 3.6),
    )


if __name__ == "__main__":
    main("oreo_values", run, __doc__)
