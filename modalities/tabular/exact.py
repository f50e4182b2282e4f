"""Exact expectations over everything a tabular policy can do, with gradients where the policy has them.

N candidates in the order of `all_candidates`, S nodes, A actions. `logp`, `ref`: log-probs of whole
candidates, [N]; `reward`, `advantage`: one value a candidate, [N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy, child, node_of
from triptych.objectives.kl import exact_entropy, exact_kl


def gradient(value: Tensor, policy: TabularPolicy) -> Tensor:
    """Gradient of a number in all that the policy learns, as one row, [D]; 0 where it does not reach."""
    learnt = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, learnt, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def expected(policy: TabularPolicy, values: Tensor, context: int = 0) -> Tensor:
    """E_{y ~ policy} f(y) = sum_y pi(y) f(y), a number; values: f(y), [N]. Differentiable in the policy."""
    return (policy.distribution(context).exp() * values).sum()


def population(policy: TabularPolicy, loss: Tensor, context: int = 0) -> Tensor:
    """sum_y sg(pi(y)) loss(y), a number: a loss [N] in expectation over samples that are constants."""
    return (policy.distribution(context).exp().detach() * loss).sum()


def kl(policy: TabularPolicy, ref: Tensor, context: int = 0) -> Tensor:
    """KL(policy || ref) of whole candidates, a number."""
    return exact_kl(policy.distribution(context), ref)


def entropy(policy: TabularPolicy, context: int = 0) -> Tensor:
    """Entropy of whole candidates, a number."""
    return exact_entropy(policy.distribution(context))


def regularised_reward(
    policy: TabularPolicy, reward: Tensor, ref: Tensor, *, beta: float, context: int = 0
) -> Tensor:
    """E[R] - beta KL(policy || ref), a number: what RLHF maximises."""
    return expected(policy, reward, context) - beta * kl(policy, ref, context)


def reinforce_gradient(policy: TabularPolicy, advantage: Tensor, context: int = 0) -> Tensor:
    """sum_y pi(y) A(y) grad log pi(y), [D], A constant: Williams 1992."""
    return gradient(population(policy, advantage.detach() * policy.distribution(context), context), policy)


def optimum(reward: Tensor, ref: Tensor, *, beta: float) -> Tensor:
    """log of pi* = ref exp(R / beta) / Z, [N]: the maximum of `regularised_reward`."""
    return (ref + reward / beta).log_softmax(-1)


def optimal_value(reward: Tensor, ref: Tensor, *, beta: float) -> Tensor:
    """beta log sum_y ref(y) exp(R(y) / beta), a number: `regularised_reward` at the optimum."""
    return beta * (ref.log_softmax(-1) + reward / beta).logsumexp(-1)


def soft_values(policy: TabularPolicy, reward: Tensor, ref: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Soft-optimal values and log-probs of a tree, [S] and [S, A]: what OREO's critic and policy come to.

    V(s) = beta log sum_a ref(a | s) exp(Q(s, a) / beta), Q the next node's value, or the reward [N] where a
    candidate ends; pi(a | s) = ref(a | s) exp((Q - V) / beta). ref: log-probs at nodes, [S, A]. Nodes after
    `stop` have value 0.
    """
    ends = {actions: reward[i] for i, actions in enumerate(policy.all_candidates())}
    values, logps = ref.new_zeros(len(ref)), ref.clone()

    def solve(prefix: tuple[int, ...]) -> Tensor:
        following = [(*prefix, a) for a in range(policy.num_actions)]
        q = torch.stack([ends[p] if p in ends else solve(p) for p in following])
        node = node_of(prefix, policy.num_actions)
        values[node] = beta * (ref[node] + q / beta).logsumexp(-1)
        logps[node] = ref[node] + (q - values[node]) / beta
        return values[node]

    solve(())
    return values, logps


def visit_chances(policy: TabularPolicy, context: int = 0) -> Tensor:
    """Probability that a sample comes through each node, [S]; 1 at the root."""
    logp = policy.conditionals()[context]
    chances = [logp.new_zeros(())] * len(logp)
    chances[0] = logp.new_ones(())

    def walk(node: int, depth: int) -> None:
        for action in range(policy.num_actions):
            if depth + 1 < policy.length and action != policy.stop:
                below = child(node, action, policy.num_actions)
                chances[below] = chances[node] * logp[node, action].exp()
                walk(below, depth + 1)

    walk(0, 0)
    return torch.stack(chances)


def rewards(policy: TabularPolicy, reward_of: dict[tuple[int, ...], float] | Sequence[float]) -> Tensor:
    """A reward for every candidate, [N]: by its actions, or in the order of `all_candidates`."""
    candidates = policy.all_candidates()
    row = [reward_of[c] for c in candidates] if isinstance(reward_of, dict) else list(reward_of)
    if len(row) != len(candidates):
        raise ValueError(f"{len(row)} rewards for {len(candidates)} candidates")
    return torch.tensor(row, dtype=policy.logits.dtype)
