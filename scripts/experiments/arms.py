"""Bandits and matrix games for experiments: many of them at once, one context of a tabular policy each.

X contexts (games, bandits or seeds, all independent), A arms, N pairs of arms. Everything is float64, and
expectations are exact sums over arms or pairs unless an experiment samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy
from triptych.objectives import LogLik, PairLogLik, UnitLogLik
from triptych.objectives.registry import Objective


def policy_of(logits_XA: Tensor) -> TabularPolicy:
    """A policy whose candidates are single arms, in float64."""
    return TabularPolicy(logits_XA.double().unsqueeze(1))


def logp_of(policy: TabularPolicy) -> Tensor:
    """Log-prob of every arm, [X, A]."""
    return policy.conditionals().squeeze(1)


def separate(features_XAF: Tensor) -> Tensor:
    """Features [X, 1, A, X F] with which every context has an F of its own, so that X seeds learn apart."""
    num_contexts, num_arms, width = features_XAF.shape
    blocks = features_XAF.double().new_zeros(num_contexts, num_arms, num_contexts, width)
    index = torch.arange(num_contexts)
    blocks[index, :, index] = features_XAF.double()
    return blocks.flatten(2).unsqueeze(1)


def ordered_pairs(num_arms: int) -> tuple[Tensor, Tensor]:
    """Every ordered pair of arms, an arm with itself included, as two tables of indices, [N = A^2]."""
    first, second = torch.cartesian_prod(torch.arange(num_arms), torch.arange(num_arms)).T
    return first, second


def taken(values_XA: Tensor, arms: Tensor) -> Tensor:
    """values of the arms, [X N] with the contexts one after another; arms [N] for all contexts, or [X, N]."""
    index = arms.expand(len(values_XA), -1) if arms.ndim == 1 else arms
    return values_XA.gather(1, index).flatten()


def pairs_of(logp_XA: Tensor, ref_XA: Tensor, first: Tensor, second: Tensor, **fields: Tensor) -> PairLogLik:
    """The pairs (first, second) of all contexts as the objectives' input, [X N]; fields as they take them."""
    sides = []
    for arms in (first, second):
        logp = taken(logp_XA, arms)
        sides.append(LogLik(logp, torch.ones_like(logp), taken(ref_XA, arms)))
    return PairLogLik(*sides, **{name: value.flatten() for name, value in fields.items()})


def units_of(logp_XA: Tensor, arms: Tensor, advantage: Tensor, old_XA: Tensor) -> UnitLogLik:
    """Arms as candidates of one unit each, [X N, 1]; old: log-probs of the policy that drew them."""
    logp, old = (taken(t, arms).unsqueeze(-1) for t in (logp_XA, old_XA))
    mask = torch.ones_like(logp, dtype=torch.bool)
    return UnitLogLik(logp, mask, old=old, advantage=advantage.flatten().unsqueeze(-1))


def wins(preference_XAA: Tensor, probs_XA: Tensor) -> Tensor:
    """P(arm preferred to a sample of the policy), [X, A]."""
    return torch.einsum("xij,xj->xi", preference_XAA, probs_XA)


def exploitability(preference_XAA: Tensor, probs_XA: Tensor) -> Tensor:
    """max_i P(i preferred to a sample of the policy) - 1/2, [X]; 0 for a Nash policy and only for it."""
    return wins(preference_XAA, probs_XA).amax(-1) - 0.5


def natural_step(policy: TabularPolicy, loss: Tensor, rate: float) -> None:
    """logits -= rate F^-1 grad, F = diag(p) - p p^T: a step that only knows distributions, not their logits.

    As in TRPO and its like. The gradient of a loss of log-probs sums to 0 over arms, so F^-1 grad = grad / p
    up to a constant, which logits do not feel.
    """
    (gradient,) = torch.autograd.grad(loss, [policy.logits])
    with torch.no_grad():
        logits = policy.logits - rate * gradient / policy.conditionals().exp()
        policy.logits.copy_(logits - logits.mean(-1, keepdim=True))


def minimise(policy: TabularPolicy, loss: Callable[[], Tensor], num_steps: int = 60) -> None:
    """Full-batch L-BFGS to a gradient below 1e-9, over all contexts together."""
    optimizer = torch.optim.LBFGS(
        [p for p in policy.parameters() if p.requires_grad],
        max_iter=num_steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]


def expected(objective: Objective, x: PairLogLik | UnitLogLik, weight: Tensor) -> Tensor:
    """sum of weight times the objective's rows, a number; weight carries no gradient."""
    return (weight.detach().flatten() * objective(x)).sum()


def draw(logp_XA: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Independent samples of every context, [X, num]."""
    return torch.multinomial(logp_XA.detach().exp(), num, replacement=True, generator=generator)
