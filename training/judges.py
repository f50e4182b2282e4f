"""Adapters: judges that turn the verdicts of other judges into what a method asks for.

Shapes: K candidates of a group, U units, N users. An adapter's judges are its options `of` and `other`: built
ones or, through `build_judge`, `{name, options}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from triptych.objectives.advantages import win_share, win_share_with_self, z_score
from triptych.training.groups import Group, Verdict, preferences_of, scores_of
from triptych.training.judging import (
    JUDGES,
    Preferring,
    Scored,
    build_judge,
    check_choice,
    check_members,
    checked,
    judged,
    nested_memory,
    nested_needs,
)
from triptych.training.stages import Judge, Live

__all__ = [
    "JUDGES",
    "BradleyTerry",
    "Combine",
    "Ensemble",
    "Flipped",
    "Gap",
    "Minus",
    "OverUsers",
    "Preferring",
    "Scored",
    "WinRate",
    "build_judge",
]


@JUDGES.register("win_rate")
@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """score_i = mean_j P(i preferred to j), over the others or, with_self, over all K with P_ii = 1/2.

    Minimaximalist SPO (Swamy et al. 2024, arXiv 2401.04056) leaves the candidate itself out; SPPO's code (Wu
    et al. 2024, arXiv 2405.00675) has it in. Scores count by Bradley-Terry. A single candidate has 1/2.
    """

    of: Judge
    with_self: bool

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "preference", "score")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return self.of.gives | {"score", "preference"}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts, with shares of wins as scores and the preferences they come from."""
        share = win_share_with_self if self.with_self else win_share
        verdicts: list[Verdict] = []
        for g in judged(self.of, groups, live):
            p = preferences_of(g)
            score = share(p) if g.size > 1 else torch.full((1,), 0.5)
            verdicts.append(replace(g.verdict, score=score, preference=p))
        return verdicts


@JUDGES.register("bradley_terry")
@dataclass(frozen=True, slots=True, kw_only=True)
class BradleyTerry:
    """preference_ij = sigmoid((R_i - R_j) / temperature)."""

    of: Judge
    temperature: float = 1.0

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return self.of.gives | {"preference"}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts, with preferences made of their scores."""
        verdicts: list[Verdict] = []
        for g in judged(self.of, groups, live):
            score = scores_of(g) / self.temperature
            verdicts.append(replace(g.verdict, preference=torch.sigmoid(score[:, None] - score)))
        return verdicts


def _hard_wins(group: Group) -> Tensor:
    """1 where i beats j, 1/2 where they tie, [K, K]."""
    verdict = group.verdict
    if verdict.preference is not None:
        lead = verdict.preference - 0.5
    else:
        score = scores_of(group)
        lead = score[:, None] - score
    return (lead.sign() + 1) / 2


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda s: s.mean(0),
    "min": lambda s: s.amin(0),
    "max": lambda s: s.amax(0),
    "median": lambda s: s.quantile(0.5, dim=0),
    "normalised": lambda s: z_score(s, eps=1e-6).mean(0),
}


@JUDGES.register("ensemble")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """One score of n judges: their mean, min (all agree), max (any), median, the mean of z-scores, or votes.

    vote: wins over n judges and K - 1 rivals / (n (K - 1)), ties one half (phi of RankDPO, Karthik et al.
    2024, arXiv 2410.18013); its preferences are the shares of judges. Each member's scores are `users`.
    """

    of: Sequence[Judge]
    how: Literal["mean", "min", "max", "median", "vote", "normalised"] = "mean"

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        check_choice("how", self.how, (*_REDUCE, "vote"))
        check_members(self.of)

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return frozenset({"score", "users"} | ({"preference"} if self.how == "vote" else set()))

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Verdicts of all members together."""
        members = [judged(j, groups, live) for j in self.of]
        verdicts: list[Verdict] = []
        for of_group in zip(*members, strict=True):
            scores = torch.stack([scores_of(g) for g in of_group])
            if self.how != "vote":
                verdicts.append(Verdict(score=_REDUCE[self.how](scores), users=scores.T))
                continue
            wins = torch.stack([_hard_wins(g) for g in of_group]).mean(0)
            share = win_share(wins) if len(wins) > 1 else torch.full((1,), 0.5)
            verdicts.append(Verdict(score=share, preference=wins, users=scores.T))
        return verdicts


@JUDGES.register("combine")
@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """score = sum_m weights_m score_m; a negative weight is a penalty."""

    of: Sequence[Judge]
    weights: Sequence[float]

    gives = frozenset({"score", "users"})
    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        check_members(self.of)
        if len(self.weights) != len(self.of):
            raise ValueError(f"weights={list(self.weights)} must be one for each of {len(self.of)} judges")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Weighted sums; the members' scores are `users`."""
        members = [judged(j, groups, live) for j in self.of]
        weights = torch.tensor(self.weights, dtype=torch.float32)
        tables = [torch.stack([scores_of(g) for g in row], dim=-1) for row in zip(*members, strict=True)]
        return [Verdict(score=users @ weights, users=users) for users in tables]


@JUDGES.register("over_users")
@dataclass(frozen=True, slots=True, kw_only=True)
class OverUsers:
    """score = mean, min (the worst-off user), or weighted mean over users [K, N]; weights: [N], any scale."""

    of: Judge
    how: Literal["mean", "min", "weighted"] = "mean"
    weights: Sequence[float] | None = None

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "users")
        check_choice("how", self.how, ("mean", "min", "weighted"))
        if (self.how == "weighted") != (self.weights is not None):
            raise ValueError(f"weights={self.weights} goes with how=weighted, and with it only")
        if self.weights is not None and (min(self.weights, default=0) < 0 or not sum(self.weights) > 0):
            raise ValueError(f"weights={list(self.weights)} must be at least 0, and not all 0")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return (self.of.gives | {"score"}) - {"preference"}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts with these scores; preferences of before are left out."""
        return [replace(v, score=self._reduced(v), preference=None) for v in self.of(groups, live)]

    def _reduced(self, verdict: Verdict) -> Tensor:
        users = verdict.users
        assert users is not None
        if self.weights is None:
            return users.mean(-1) if self.how == "mean" else users.amin(-1)
        if len(self.weights) != users.shape[-1]:
            raise ValueError(f"{len(self.weights)} weights for {users.shape[-1]} users")
        weights = torch.tensor(self.weights, dtype=torch.float32)
        return users @ (weights / weights.sum())


@JUDGES.register("minus")
@dataclass(frozen=True, slots=True, kw_only=True)
class Minus:
    """score - coefficient * what: the number of units ('length'), log policy - log ref, or a judge's score.

    length: the penalty of RLHF Workflow (Dong et al. 2024, arXiv 2405.07863). log_ratio: the KL penalty in
    the reward, one sample of it (k1), [K].
    """

    of: Judge
    coefficient: float
    what: Literal["length", "log_ratio"] | Judge = "length"

    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score", "preference")
        if isinstance(self.what, str):
            check_choice("what", self.what, ("length", "log_ratio"))
        else:
            checked(self.what, "what", "score")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return (self.of.gives | {"score"}) - {"preference"}

    @property
    def needs(self) -> frozenset[str]:
        """See `Judge`."""
        return nested_needs(self) | ({"logp", "ref"} if self.what == "log_ratio" else set())

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts with these scores; preferences of before are left out."""
        inner = judged(self.of, groups, live)
        if isinstance(self.what, str):
            penalties = [g.count if self.what == "length" else _log_ratio(g) for g in inner]
        else:
            penalties = [scores_of(g) for g in judged(self.what, groups, live)]
        return [
            replace(g.verdict, score=scores_of(g) - self.coefficient * p, preference=None)
            for g, p in zip(inner, penalties, strict=True)
        ]


def _log_ratio(group: Group) -> Tensor:
    if group.logp is None or group.ref is None:
        raise ValueError(f"group {group.key}: what=log_ratio needs log-probs of policy and reference")
    return torch.where(group.mask, group.logp - group.ref, 0.0).sum(-1)


@JUDGES.register("gap")
@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """score = G(candidate) - G(reference answer): how much better than what was there.

    The reference answer is the group's first candidate of such an origin, else the first of the context's own
    `candidates`. After PIT (Wang et al. 2023, arXiv 2310.00898), whose G sees both answers at once; here
    it is a difference, so `of` must score a candidate by itself.
    """

    of: Judge
    origins: Sequence[str] = ("reference", "data")

    gives = frozenset({"score"})
    needs = frozenset[str]()
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score")
        if self.of.needs:
            raise ValueError(f"of needs {', '.join(sorted(self.of.needs))}, which a reference answer lacks")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Differences; ValueError for a group that has no reference answer."""
        places = [next((i for i, o in enumerate(g.origin) if o in self.origins), None) for g in groups]
        apart = [g for g, place in zip(groups, places, strict=True) if place is None]
        references = iter(judged(self.of, [_reference_alone(g) for g in apart], live) if apart else [])
        verdicts: list[Verdict] = []
        for g, place in zip(judged(self.of, groups, live), places, strict=True):
            score = scores_of(g)
            level = scores_of(next(references))[0] if place is None else score[place]
            verdicts.append(Verdict(score=score - level))
        return verdicts


def _reference_alone(group: Group) -> Group:
    candidates = getattr(group.context, "candidates", ())
    if not candidates:
        raise ValueError(f"group {group.key} has no reference answer: neither in it nor in its context")
    return replace(
        group, candidates=(candidates[0],), mask=torch.ones(1, 1, dtype=torch.bool), origin=("data",),
        logp=None, proposal=None, turn=None, ref=None, value=None, verdict=Verdict(),
    )  # fmt: skip


@JUDGES.register("flipped")
@dataclass(frozen=True, slots=True, kw_only=True)
class Flipped:
    """Label noise for experiments: each pair's preference is turned round, P -> 1 - P, with probability rate.

    Gives preferences only, as scores would let the true order through. The noise is a function of seed,
    stage, round and the group's key and depth.
    """

    of: Judge
    rate: float

    gives = frozenset({"preference"})
    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score", "preference")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate} must be in [0, 1]")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Noisy preferences, antisymmetric as before."""
        verdicts: list[Verdict] = []
        seen = Counter[tuple[str, int]]()
        for g in judged(self.of, groups, live):
            place = (g.key, g.depth)
            draw = torch.rand((g.size, g.size), generator=live.generator("flipped", *place, seen[place]))
            seen[place] += 1
            upper = (draw < self.rate).triu(1)
            p = preferences_of(g)
            verdicts.append(Verdict(preference=torch.where(upper | upper.T, 1 - p, p)))
        return verdicts
