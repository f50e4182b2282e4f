"""Credit that differs between a candidate's units, from a critic, of turns or of steps; the KL in rewards.

Frozen dataclasses as `credits` describes them, registered there. A KL penalty in the reward is k1 = logp -
ref, the log-prob of drawing against the reference; every other estimator gives another gradient there and
is refused (`objectives.kl`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from triptych.objectives import UnitLogLik, advantages
from triptych.objectives.aggregation import clean
from triptych.objectives.kl import check_kl, kl_penalty
from triptych.training.groups import Group, scores_of

ADVANTAGE = frozenset({"advantage"})
SCORES = frozenset({"score|preference"})
KL_NEEDS = frozenset({"logp", "ref"})


def log_ratio(group: Group) -> Tensor:
    """k1 of each unit, logp - ref, [K, U]; ValueError where the group lacks either."""
    if group.logp is None or group.ref is None:
        absent = "log-probs of drawing" if group.logp is None else "log-probs under the reference"
        raise ValueError(f"group {group.key}: a KL in the reward needs {absent}")
    units = UnitLogLik(logp=group.logp, mask=group.mask, ref=group.ref)
    return clean(kl_penalty(units), group.mask)


def check_reward_kl(kl: float, estimator: str) -> None:
    """Accept a coefficient and an estimator of the KL in a reward; ValueError with the reason otherwise."""
    check_kl(estimator, "reward")
    if not (math.isfinite(kl) and kl >= 0):
        raise ValueError(f"kl={kl!r} is not a finite number of at least 0")


def kl_of(group: Group, kl: float) -> Tensor:
    """kl * k1 of each unit, [K, U]; 0 without a KL, and then no reference is asked for."""
    return kl * log_ratio(group) if kl else torch.zeros(group.mask.shape)


def one_of(**options: tuple[str, tuple[str, ...]]) -> None:
    """Refuse a value that is none of the valid ones; name=(value, valid)."""
    for name, (value, valid) in options.items():
        if value not in valid:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gae:
    """Generalised advantages against a critic; reward -kl * k1 at every unit and the score at the last.

    target: the return; old_value: the critic's value when the samples were drawn. Ivison et al. 2024, arXiv
    2406.09279, whose values of gamma and lam are the defaults.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.0
    kl_estimator: str = "k1"
    provides: ClassVar[frozenset[str]] = frozenset({"advantage", "target", "old_value"})
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_reward_kl(self.kl, self.kl_estimator)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is outside [0, 1]")

    @property
    def needs(self) -> frozenset[str]:
        """Scores, values, and both log-probs for a KL."""
        return SCORES | {"value"} | (KL_NEEDS if self.kl else frozenset())

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, target and old_value, [K, U]."""
        if group.value is None:
            raise ValueError(f"group {group.key}: credit 'gae' needs the critic's values, which are absent")
        reward = advantages.kl_shaped_reward(scores_of(group), kl_of(group, self.kl), group.mask, beta=1.0)
        advantage, target = advantages.gae(reward, group.value, group.mask, gamma=self.gamma, lam=self.lam)
        return {"advantage": advantage, "target": target, "old_value": clean(group.value, group.mask)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTurn:
    """Credit of each turn of an answer, the same at all units of the turn (SCoRe).

    Kumar et al. 2024, arXiv 2409.12917. The reward of turn t is weight_t R_t + alpha (R_t - R_{t-1}) - kl_t
    sum k1, where R_t sums the verdict's rewards of the turn's units and the bonus begins with the second
    turn. credit 'own' shows a turn this alone, 'return' its sum from that turn on: then a large alpha
    teaches to fail the first turn, to improve on it afterwards. baseline: the mean of the same turn over the
    group, or over the others. Stage I of SCoRe is weights (0, 1) with kl (0.1, 0.01), stage II alpha 10 with
    kl (0.01, 0.01).
    """

    credit: Literal["own", "return"] = "own"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    alpha: float = 0.0
    weight_per_turn: tuple[float, ...] = ()
    kl_per_turn: tuple[float, ...] = ()
    kl_estimator: str = "k1"
    provides: ClassVar[frozenset[str]] = ADVANTAGE
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of(credit=(self.credit, ("own", "return")), baseline=(self.baseline, ("mean", "leave_one_out")))
        for name in ("weight_per_turn", "kl_per_turn"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kl in (*self.kl_per_turn, 0.0):
            check_reward_kl(kl, self.kl_estimator)

    @property
    def needs(self) -> frozenset[str]:
        """Rewards of units, and both log-probs for a KL."""
        return frozenset({"units"}) | (KL_NEEDS if any(self.kl_per_turn) else frozenset())

    def rewards(self, group: Group) -> tuple[Tensor, Tensor]:
        """The reward of each turn, 0 for a turn that a row does not have, and the units of each.

        [K, T] and [K, U, T] bool.
        """
        units, turn = group.verdict.units, group.turn
        if units is None or turn is None:
            absent = "rewards of units" if units is None else "turns"
            raise ValueError(f"group {group.key}: credit 'per_turn' needs {absent}, which are absent")
        num_turns = int(turn[group.mask].max()) + 1 if group.mask.any() else 0
        of_turn = (turn.unsqueeze(-1) == torch.arange(num_turns)) & group.mask.unsqueeze(-1)
        exists = of_turn.any(1)

        def total(x: Tensor) -> Tensor:
            return clean(x.unsqueeze(-1), of_turn).sum(1)

        own = total(units)
        reward = own * self._coefficients(self.weight_per_turn, "weight_per_turn", num_turns, group, 1.0)
        reward[:, 1:] += self.alpha * own.diff(dim=-1)
        if any(self.kl_per_turn):
            kl = self._coefficients(self.kl_per_turn, "kl_per_turn", num_turns, group, 0.0)
            reward = reward - kl * total(log_ratio(group))
        return clean(reward, exists), of_turn

    def _coefficients(
        self, given: tuple[float, ...], name: str, num_turns: int, group: Group, default: float
    ) -> Tensor:
        """One number a turn, [T]; `default` where none were given."""
        if given and len(given) < num_turns:
            raise ValueError(
                f"group {group.key} has {num_turns} turns, and {name}={list(given)} has {len(given)}"
            )
        return torch.tensor(given[:num_turns] if given else (default,) * num_turns)

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, [K, U]."""
        reward, of_turn = self.rewards(group)
        if self.credit == "return":
            reward = reward.flip(-1).cumsum(-1).flip(-1)
        rule = advantages.centred if self.baseline == "mean" else advantages.leave_one_out
        advantage = rule(reward.double().T, of_turn.any(1).T).T.float()
        return {"advantage": clean(advantage.unsqueeze(1), of_turn).sum(-1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdvantage:
    """z-score of each unit's reward, less kl * k1, over the group's candidates at the same unit.

    For units that correspond to each other across candidates, such as denoising steps.
    """

    eps: float = 1e-4
    kl: float = 0.0
    kl_estimator: str = "k1"
    provides: ClassVar[frozenset[str]] = ADVANTAGE
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_reward_kl(self.kl, self.kl_estimator)

    @property
    def needs(self) -> frozenset[str]:
        """Rewards of units, and both log-probs for a KL."""
        return frozenset({"units"}) | (KL_NEEDS if self.kl else frozenset())

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, [K, U]."""
        if group.verdict.units is None:
            raise ValueError(f"group {group.key}: credit 'step_advantage' needs rewards of units")
        reward = (group.verdict.units - kl_of(group, self.kl)).double()
        return {"advantage": advantages.z_score(reward.T, group.mask.T, eps=self.eps).T.float()}
