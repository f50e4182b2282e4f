"""Credit: from a judged group to the advantages and targets of its units, [K, U]. Nothing carries a gradient.

A credit is a frozen dataclass, or a function that makes one; its fields are its options and its call gives
fields of `UnitLogLik` by name, 0 at padding. The arithmetic is `objectives.advantages`; here it meets groups.
Credits of whole candidates are here, those that differ between units in `unit_credits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from triptych.objectives import advantages
from triptych.objectives.aggregation import clean
from triptych.training.groups import Group, preferences_of, scores_of
from triptych.training.plugs import Registry
from triptych.training.unit_credits import (
    ADVANTAGE,
    KL_NEEDS,
    SCORES,
    Gae,
    PerTurn,
    StepAdvantage,
    check_reward_kl,
    kl_of,
    log_ratio,
)


class Credit(Protocol):
    """Judged group -> fields of `UnitLogLik`. needs: as `Shape.needs`. provides: the fields that it gives.

    per_unit: whether advantages differ between the units of a row.
    """

    @property
    def needs(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def per_unit(self) -> bool:
        """See the class."""
        ...

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """The fields, [K, U] each."""
        ...


CREDITS: Registry[Credit] = Registry("credit")
CREDITS.register("gae")(Gae)
CREDITS.register("per_turn")(PerTurn)
CREDITS.register("step_advantage")(StepAdvantage)

# What each objective's paper does with its rewards; those absent learn from no advantage and no target.
DEFAULT_CREDIT: Mapping[str, str] = {
    **dict.fromkeys(
        ("grpo", "dapo", "gspo", "luspo", "gmpo", "sapo", "vespo", "cispo", "ecpo", "gbpo", "ddpo"), "z_score"
    ),
    "dr_grpo": "centred",
    **dict.fromkeys(("rloo", "reinforce"), "leave_one_out"),
    **dict.fromkeys(("ppo", "ppo_value", "value_regression"), "gae"),
    "a2po": "optimal_value",
    **dict.fromkeys(("oreo_policy", "oreo_value"), "outcome"),
}


def win_rates(group: Group, *, with_self: bool = False, rivals: str = "others") -> Tensor:
    """mean_j P(y_i preferred to y_j), [K].

    rivals: 'others' is every candidate, else those of one origin. with_self counts a candidate's one half
    against itself where it is among its rivals (SPPO's code does, minimaximalist SPO does not). A candidate
    without rivals gets one half; ValueError where the group has none of that origin.
    """
    preference = preferences_of(group)
    among = torch.tensor([rivals in ("others", origin) for origin in group.origin])
    if not among.any():
        known = ", ".join(sorted(set(group.origin)))
        raise ValueError(f"group {group.key} has no candidate of origin '{rivals}'; it has {known}")
    if rivals == "others" and group.size > 1:
        return (advantages.win_share_with_self if with_self else advantages.win_share)(preference)
    itself = torch.eye(group.size, dtype=torch.bool)
    counted = among.expand(group.size, group.size) & (with_self | ~itself)
    rate = clean(preference, counted).sum(-1) / counted.sum(-1).clamp(min=1)
    return torch.where(counted.any(-1), rate, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfScores:
    """One advantage a candidate, the same at all its units: rule(score - kl * sum_u k1) over the group.

    In float64, so that equal scores have advantages of exactly 0. rule: [1, K] -> [1, K].
    """

    rule: Callable[[Tensor], Tensor]
    kl: float = 0.0
    kl_estimator: str = "k1"
    provides: ClassVar[frozenset[str]] = ADVANTAGE
    per_unit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_reward_kl(self.kl, self.kl_estimator)

    @property
    def needs(self) -> frozenset[str]:
        """Scores, and both log-probs for a KL."""
        return SCORES | (KL_NEEDS if self.kl else frozenset())

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, [K, U]."""
        reward = scores_of(group).double() - kl_of(group, self.kl).double().sum(-1)
        advantage = self.rule(reward.unsqueeze(0)).squeeze(0).float()
        return {"advantage": advantages.per_unit(advantage, group.mask)}


@CREDITS.register("centred")
def centred(*, kl: float = 0.0, kl_estimator: str = "k1") -> OfScores:
    """R_i - mean_j R_j (Dr. GRPO)."""
    return OfScores(rule=advantages.centred, kl=kl, kl_estimator=kl_estimator)


@CREDITS.register("leave_one_out")
def leave_one_out(*, kl: float = 0.0, kl_estimator: str = "k1") -> OfScores:
    """R_i - mean_{j != i} R_j (RLOO)."""
    return OfScores(rule=advantages.leave_one_out, kl=kl, kl_estimator=kl_estimator)


@CREDITS.register("z_score")
def z_score(*, eps: float = 1e-4, kl: float = 0.0, kl_estimator: str = "k1") -> OfScores:
    """(R_i - mean R) / (std R + eps) (GRPO)."""
    if not eps >= 0:
        raise ValueError(f"eps={eps!r} must be at least 0")
    return OfScores(rule=lambda r: advantages.z_score(r, eps=eps), kl=kl, kl_estimator=kl_estimator)


@CREDITS.register("half")
@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Win rate - 1/2 - kl * sum_u k1, the same at all units of a candidate.

    Against the 'others' it is minimaximalist SPO (Swamy et al. 2024, arXiv 2401.04056); with the policy's
    candidates trained and those of a blend as rivals, and kl = tau, Nash-MD (Munos et al. 2023, arXiv
    2312.00886).
    """

    rivals: str = "others"
    kl: float = 0.0
    kl_estimator: str = "k1"
    provides: ClassVar[frozenset[str]] = ADVANTAGE
    per_unit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_reward_kl(self.kl, self.kl_estimator)

    @property
    def needs(self) -> frozenset[str]:
        """Preferences, and both log-probs for a KL."""
        return SCORES | (KL_NEEDS if self.kl else frozenset())

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, [K, U]."""
        advantage = win_rates(group, rivals=self.rivals) - 0.5 - kl_of(group, self.kl).sum(-1)
        return {"advantage": advantages.per_unit(advantage, group.mask)}


@CREDITS.register("optimal_value")
@dataclass(frozen=True, slots=True, kw_only=True)
class OptimalValue:
    """R_i - V, V = beta log E_ref exp(R / beta), the same at all units.

    Brantley et al. 2025 (A*-PO), arXiv 2505.20686. The paper estimates V beforehand from samples of the
    reference: name their origin in `samples`. 'all' takes the group's own samples, weighed by ref / policy;
    at the optimal policy the weighted terms are all equal, and A = beta (logp - ref) exactly.
    """

    beta: float
    samples: str = "all"
    provides: ClassVar[frozenset[str]] = ADVANTAGE
    per_unit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta!r} must be positive")

    @property
    def needs(self) -> frozenset[str]:
        """Scores, and both log-probs for samples of the policy."""
        return SCORES | (KL_NEEDS if self.samples == "all" else frozenset())

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Advantage, [K, U]."""
        score = scores_of(group)
        drawn = torch.tensor([self.samples in ("all", origin) for origin in group.origin])
        if not drawn.any():
            raise ValueError(f"group {group.key} has no candidate of origin '{self.samples}'")
        weight = log_ratio(group).sum(-1) if self.samples == "all" else torch.zeros_like(score)
        exponent = (score / self.beta - weight)[drawn]
        value = self.beta * (exponent.logsumexp(0) - math.log(len(exponent)))
        return {"advantage": advantages.per_unit(score - value, group.mask)}


@CREDITS.register("outcome")
@dataclass(frozen=True, slots=True)
class Outcome:
    """target = the score at every unit, no advantage (Wang et al. 2024, OREO, arXiv 2412.16145)."""

    needs: ClassVar[frozenset[str]] = SCORES
    provides: ClassVar[frozenset[str]] = frozenset({"target"})
    per_unit: ClassVar[bool] = False

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """Target, [K, U]."""
        return {"target": advantages.per_unit(scores_of(group), group.mask)}


@CREDITS.register("none")
@dataclass(frozen=True, slots=True)
class NoCredit:
    """Nothing: for a KL or an entropy on samples, which no judge has to see."""

    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    per_unit: ClassVar[bool] = False

    def __call__(self, group: Group) -> dict[str, Tensor]:
        """No field."""
        return {}
