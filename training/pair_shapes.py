"""Shapes that make pairs: which candidates meet, and how sure one is that the chosen one is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from triptych.objectives import Input, PairLogLik
from triptych.training.credits import win_rates
from triptych.training.groups import Group, Sample, preferences_of, scores_of
from triptych.training.order import key
from triptych.training.unit_credits import SCORES, one_of

Which = Literal["best_worst", "all", "random", "first", "best_rest", "best_random", "siblings"]
Label = Literal["hard", "bt", "preference", "win_rate", "visits", "consistency"]
FILLS: dict[str, frozenset[str]] = {
    "hard": frozenset(),
    "bt": frozenset({"strength"}),
    "preference": frozenset({"strength"}),
    "win_rate": frozenset({"win_chosen", "win_rejected"}),
    "visits": frozenset({"smoothing"}),
    "consistency": frozenset({"smoothing"}),
}
_NEEDS = {"bt": "score", "visits": "visits", "consistency": "consistency"}


def generator_of(group: Group, seed: int, purpose: str) -> torch.Generator:
    """The randomness of one group for one purpose."""
    return torch.Generator().manual_seed(key(purpose, seed, group.key, group.depth))


def left_out(groups: Sequence[Group], samples: Sequence[Sample]) -> int:
    """Number of groups without any sample."""
    return len(groups) - len({s.group for s in samples})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs of one group's candidates, the better one chosen.

    which: best_worst; all; random, two different candidates; first, the first two as they were drawn;
    best_rest, the best against each other; best_random, the best against one other; siblings, best_worst
    whose equal scores go by visits. label: hard; bt, strength = sigmoid(R_w - R_l); preference, strength =
    P(w over l); win_rate, `win_rates` of both sides with the options with_self and rivals; visits, smoothing
    = N_l / (N_w + N_l), at most one half (MCTS-DPO, Xie et al. 2024, arXiv 2405.00451); consistency,
    smoothing = 1 - C, with `average` the round's mean C (CREAM, Wang et al. 2024, arXiv 2410.12735).
    ties: pairs of equal score are dropped, or count half: neither side is right (strength or smoothing 1/2).

    Scores are less length_penalty a unit (RLHF Workflow, Dong et al. 2024, arXiv 2405.07863). Left out are
    pairs closer than min_margin, or whose chosen candidate scores less than min_score (DNO-Prct, Rosset et
    al. 2024, arXiv 2404.03715). with_margin fills `margin` with the gap. calibration: the group's first
    sample of the reference (VPO online, XPO) or the chosen candidate (VPO offline).
    """

    which: Which = "best_worst"
    label: Label = "hard"
    ties: Literal["drop", "half"] = "drop"
    min_margin: float = 0.0
    min_score: float | None = None
    length_penalty: float = 0.0
    with_margin: bool = False
    with_self: bool | None = None
    rivals: str | None = None
    average: bool | None = None
    calibration: Literal["none", "reference", "chosen"] = "none"
    makes: ClassVar[type[Input]] = PairLogLik
    per_unit: ClassVar[bool] = False
    readout: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        one_of(
            which=(self.which, get_args(Which)),
            label=(self.label, get_args(Label)),
            ties=(self.ties, ("drop", "half")),
            calibration=(self.calibration, ("none", "reference", "chosen")),
        )
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ValueError(f"min_margin={self.min_margin!r} is not a finite number of at least 0")
        if self.ties == "half" and self.min_margin > 0:
            raise ValueError(
                f"ties=half keeps pairs without a gap, and min_margin={self.min_margin!r} drops them"
            )
        for name, label in {"with_self": "win_rate", "rivals": "win_rate", "average": "consistency"}.items():
            if getattr(self, name) is not None and self.label != label:
                raise ValueError(f"{name} goes with label={label}, and label is {self.label}")

    @property
    def needs(self) -> frozenset[str]:
        """What the label, the choice and the calibration read."""
        reads = {_NEEDS[self.label]} if self.label in _NEEDS else set[str]()
        return SCORES | reads | ({"calibration"} if self.calibration == "reference" else set())

    @property
    def provides(self) -> frozenset[str]:
        """Fields of `PairLogLik` that the options fill."""
        filled = set(FILLS[self.label])
        if self.ties == "half" and self.label == "hard":
            filled.add("strength")
        if self.with_margin:
            filled.add("margin")
        if self.calibration != "none":
            filled.add("calibration")
        return frozenset(filled)

    def most(self, num_candidates: int) -> int:
        """1, or K - 1 with best_rest, K (K - 1) / 2 with all."""
        k = num_candidates
        return {"all": k * (k - 1) // 2, "best_rest": k - 1}.get(self.which, min(1, k - 1))

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Pairs in the order of the groups."""
        average: float | None = None
        if self.average:
            known = [consistency_of(g) for g in groups]
            average = sum(known) / max(1, len(known))
        return [s for i, g in enumerate(groups) for s in self._pairs(i, g, average, seed)]

    def _pairs(self, index: int, group: Group, average: float | None, seed: int) -> Iterator[Sample]:
        if group.size < 2:
            return
        score = scores_of(group) - self.length_penalty * group.count
        calibration = None
        if self.calibration == "reference":
            calibration = _sample_of_reference(group)
        for a, b in self._meetings(group, score, seed):
            chosen, rejected = (
                (a, b) if self._order(group, score, a) >= self._order(group, score, b) else (b, a)
            )
            gap = float(score[chosen] - score[rejected])
            tie = self._order(group, score, chosen) == self._order(group, score, rejected)
            too_low = self.min_score is not None and float(score[chosen]) < self.min_score
            if (tie and self.ties == "drop") or gap < self.min_margin or too_low:
                continue
            fields = self._label(group, score, (chosen, rejected), tie, average)
            if self.with_margin:
                fields["margin"] = torch.tensor(gap)
            yield Sample(
                kind="pair",
                group=index,
                candidates=(chosen, rejected),
                calibration=chosen if self.calibration == "chosen" else calibration,
                fields=fields,
            )

    def _order(self, group: Group, score: Tensor, i: int) -> tuple[float, float]:
        """What candidates are compared by: the score, then for siblings their visits."""
        by_visits = self.which == "siblings" and group.verdict.visits is not None
        return float(score[i]), float(group.verdict.visits[i]) if by_visits else 0.0  # type: ignore[index]

    def _meetings(self, group: Group, score: Tensor, seed: int) -> list[tuple[int, int]]:
        """Pairs of candidates in no order."""
        k = group.size
        ranked = sorted(range(k), key=lambda i: self._order(group, score, i), reverse=True)
        best, others = ranked[0], ranked[1:]
        if self.which in ("best_worst", "siblings"):
            return [(best, ranked[-1])]
        if self.which == "all":
            return [(i, j) for i in range(k) for j in range(i + 1, k)]
        if self.which == "best_rest":
            return [(best, i) for i in sorted(others)]
        if self.which == "first":
            return [(0, 1)]
        drawn: list[int] = torch.randperm(k, generator=generator_of(group, seed, "pairs")).tolist()
        if self.which == "best_random":
            return [(best, next(i for i in drawn if i != best))]
        return [(drawn[0], drawn[1])]

    def _label(
        self, group: Group, score: Tensor, pair: tuple[int, int], tie: bool, average: float | None
    ) -> dict[str, Tensor]:
        """The label's fields of a pair (chosen, rejected), () each."""
        chosen, rejected = pair
        if self.label == "win_rate":
            with_self = True if self.with_self is None else self.with_self
            rate = win_rates(group, with_self=with_self, rivals=self.rivals or "others")
            return {"win_chosen": rate[chosen], "win_rejected": rate[rejected]}
        if self.label in ("visits", "consistency"):
            flip = 0.5
            if not tie and self.label == "visits":
                flip = _visited(group, chosen, rejected)
            elif not tie:
                flip = 1 - (consistency_of(group) if average is None else average)
            return {"smoothing": torch.tensor(flip)}
        fields = soft_label(self.label, group, score, pair)
        if self.label == "hard" and self.ties == "half":
            fields["strength"] = torch.tensor(0.5 if tie else 1.0)
        return fields


def soft_label(label: str, group: Group, score: Tensor, pair: tuple[int, int]) -> dict[str, Tensor]:
    """`strength` of a pair (chosen, rejected), (), for the labels bt and preference; nothing for hard."""
    chosen, rejected = pair
    if label == "bt":
        return {"strength": torch.sigmoid(score[chosen] - score[rejected])}
    return {"strength": preferences_of(group)[chosen, rejected]} if label == "preference" else {}


def consistency_of(group: Group) -> float:
    """The verdict's probability that its ranking is right, C; ValueError where it gave none."""
    if group.verdict.consistency is None:
        raise ValueError(
            f"group {group.key}: label 'consistency' needs the verdict's consistency, which is absent"
        )
    return group.verdict.consistency


def _visited(group: Group, chosen: int, rejected: int) -> float:
    """Label-flip probability min(1 - 1 / (1 + N_l / max(1, N_w)), 1/2)."""
    if group.verdict.visits is None:
        raise ValueError(f"group {group.key}: label 'visits' needs the verdict's visits, which are absent")
    better, worse = (float(group.verdict.visits[i]) for i in (chosen, rejected))
    return min(1 - 1 / (1 + worse / max(1.0, better)), 0.5)


def _sample_of_reference(group: Group) -> int:
    if "reference" not in group.origin:
        raise ValueError(
            f"group {group.key} has no candidate of origin 'reference' to calibrate by; "
            f"it has {', '.join(sorted(set(group.origin)))}"
        )
    return group.origin.index("reference")
