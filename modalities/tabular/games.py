"""Preference games: P[i, j] = P(y_i preferred to y_j), [N, N], P + P^T = 1; exact values and equilibria.

Swamy et al. 2024 (arXiv 2401.04056), Munos et al. 2023 (arXiv 2312.00886), Calandriello et al. 2024
(arXiv 2403.08635). Policies are probabilities [N]; everything is computed in float64.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MOST_ACTIONS = 12


def check_game(preference: Tensor) -> Tensor:
    """The game in float64; ValueError unless it is [N, N], in [0, 1], and P + P^T = 1."""
    p = preference.double()
    if p.ndim != 2 or p.shape[0] != p.shape[1]:
        raise ValueError(f"a preference game is a square matrix, not {tuple(p.shape)}")
    if not bool(((p >= 0) & (p <= 1)).all()) or not torch.allclose(p + p.T, torch.ones_like(p), atol=1e-6):
        raise ValueError("a preference game needs P[i, j] in [0, 1] with P[i, j] + P[j, i] = 1")
    return p


def cyclic_game() -> Tensor:
    """Four actions: A beats B .8, B beats C .7, C beats A .9; D loses .4 to .6 to each. No best action."""
    return torch.tensor(
        [[0.5, 0.8, 0.1, 0.6], [0.2, 0.5, 0.7, 0.6], [0.9, 0.3, 0.5, 0.6], [0.4, 0.4, 0.4, 0.5]],
        dtype=torch.float64,
    )


def bradley_terry_game(reward: Tensor) -> Tensor:
    """sigmoid(R_i - R_j), [N, N]: preferences that a reward explains; reward [N]."""
    reward = reward.double()
    return torch.sigmoid(reward.unsqueeze(-1) - reward)


def win_rate(preference: Tensor, policy: Tensor, other: Tensor) -> Tensor:
    """P(policy > other) = pi^T P mu, a number."""
    return policy.double() @ check_game(preference) @ other.double()


def exploitability(preference: Tensor, policy: Tensor) -> Tensor:
    """max_i (P pi)_i - 1/2, a number: what the best answer to the policy wins beyond a half; 0 at Nash."""
    return (check_game(preference) @ policy.double()).max() - 0.5


def nash(preference: Tensor, *, tolerance: float = 1e-9) -> Tensor:
    """A Nash equilibrium (minimax winner), [N], exact: by trying supports from the smallest to the largest.

    On its support S every action wins a half: (P_SS - 1/2) x = 0, sum x = 1; no action wins more. A symmetric
    game has one. ValueError for more than 12 actions, whose supports are too many to try.
    """
    game = check_game(preference) - 0.5
    size = len(game)
    if size > MOST_ACTIONS:
        raise ValueError(f"this game has {size} actions; supports are tried one by one up to {MOST_ACTIONS}")
    for count in range(1, size + 1):
        for support in itertools.combinations(range(size), count):
            rows = list(support)
            system = torch.cat([game[rows][:, rows], game.new_ones(1, count)])
            aim = torch.cat([game.new_zeros(count), game.new_ones(1)])
            # gelsd takes systems of any rank: a game with ties has a whole set of equilibria.
            x = torch.linalg.lstsq(system, aim.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
            policy = game.new_zeros(size)
            policy[rows] = x
            if bool((x >= -tolerance).all()) and bool((game @ policy <= tolerance).all()):
                return policy.clamp(min=0) / policy.clamp(min=0).sum()
    raise AssertionError("a symmetric zero-sum game has an equilibrium")


def blend(policy: Tensor, ref: Tensor, coefficient: float) -> Tensor:
    """policy^(1 - c) ref^c, normalised, [N]; both are probabilities above 0."""
    return torch.lerp(policy.double().log(), ref.double().log(), coefficient).softmax(-1)


def regularised_step(
    preference: Tensor, policy: Tensor, ref: Tensor, *, tau: float, coefficient: float = 0.0
) -> Tensor:
    """ref exp(P mu / tau), normalised, [N]; mu = `blend` of policy and ref.

    A policy that it leaves alone is the fixed point of online IPO (coefficient 0) or of IPO-MD.
    """
    rival = blend(policy, ref, coefficient)
    return (ref.double().log() + check_game(preference) @ rival / tau).softmax(-1)


def residual(
    preference: Tensor, policy: Tensor, ref: Tensor, *, tau: float, coefficient: float = 0.0
) -> Tensor:
    """max_i |policy - regularised_step(policy)|, a number: 0 at the fixed point."""
    step = regularised_step(preference, policy, ref, tau=tau, coefficient=coefficient)
    return (step - policy.double()).abs().max()


def regularised_nash(
    preference: Tensor,
    ref: Tensor,
    *,
    tau: float,
    coefficient: float = 0.0,
    tolerance: float = 1e-12,
    num_steps: int = 200_000,
) -> Tensor:
    """The fixed point of `regularised_step`, [N]; its `residual` is below the tolerance.

    Each step goes min(1/2, tau^2) of the way, in log-probs: whole steps go round in circles when tau is
    small. ValueError when num_steps do not suffice.
    """
    rate = min(0.5, tau * tau)
    policy = ref.double()
    for _ in range(num_steps):
        step = regularised_step(preference, policy, ref, tau=tau, coefficient=coefficient)
        if float((step - policy).abs().max()) < tolerance:
            return policy
        policy = blend(policy, step, rate)
    raise ValueError(f"no fixed point to {tolerance} in {num_steps} steps at tau={tau}")


def multiplicative_weights(
    preference: Tensor, start: Tensor, *, eta: float, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Last and average policy of pi <- pi exp(eta P pi), [N] each: SPO and SPPO with exact updates.

    In a game with a cycle the last one goes round it; the average comes to Nash.
    """
    game, policy = check_game(preference), start.double()
    total = torch.zeros_like(policy)
    for _ in range(num_steps):
        policy = (policy.log() + eta * (game @ policy)).softmax(-1)
        total += policy
    return policy, total / num_steps
