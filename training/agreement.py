"""How far two judges agree on a ranking (CREAM). Shapes: K candidates of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from triptych.training.groups import Group, Verdict, scores_of
from triptych.training.judges import JUDGES
from triptych.training.judging import check_choice, checked, judged, nested_memory, nested_needs
from triptych.training.plug_points import Judge, Live


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two lists of scores, [K] each, in [-1, 1]; 0 where one of them ties everything."""
    x, y = ((s[:, None] - s).sign().double() for s in (a, b))
    return _cosine(x, y)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rho, the correlation of the ranks, with the mean rank for ties; 0 where all are tied."""
    # A rank, up to a constant, is half the sum of signs against all others: ties then share their mean.
    x, y = ((s[:, None] - s).sign().sum(-1).double() for s in (a, b))
    return _cosine(x, y)


def top_order(a: Tensor, b: Tensor) -> float:
    """1 if both lists have the same best and the same worst candidate, else -1 (CREAM's TopOrder).

    Compares which candidates they are; of tied ones the first counts.
    """
    same = (a.argmax() == b.argmax()) & (a.argmin() == b.argmin())
    return 1.0 if same else -1.0


def _cosine(x: Tensor, y: Tensor) -> float:
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else 0.0


RANK_MEASURES = {"kendall": kendall, "spearman": spearman, "top_order": top_order}


@JUDGES.register("agreement")
@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The verdict of `of`, with consistency C = (tau + 1) / 2 of its ranking and that of `other`.

    over: 'group' has a C for each group, 'call' the mean over all groups of the call ('dyn' and 'avg' in the
    released code). Wang et al. 2024, CREAM, arXiv 2410.12735. Their code's TopOrder compares the ranks of the
    first and the last listed answer; here it compares the best and the worst ones.
    """

    of: Judge
    other: Judge
    measure: Literal["kendall", "spearman", "top_order"] = "kendall"
    over: Literal["group", "call"] = "group"

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score", "preference")
        checked(self.other, "other", "score", "preference")
        check_choice("measure", self.measure, RANK_MEASURES)
        check_choice("over", self.over, ("group", "call"))

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return self.of.gives | {"consistency"}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts of `of` with their consistency; one half where a ranking says nothing."""
        ours, theirs = judged(self.of, groups, live), judged(self.other, groups, live)
        tau = RANK_MEASURES[self.measure]
        agreed = [
            (tau(scores_of(a), scores_of(b)) + 1) / 2 if a.size > 1 else 0.5
            for a, b in zip(ours, theirs, strict=True)
        ]
        if self.over == "call" and agreed:
            agreed = [sum(agreed) / len(agreed)] * len(agreed)
        return [replace(g.verdict, consistency=c) for g, c in zip(ours, agreed, strict=True)]
