"""Judges for control runs: what a method gains with them is not owed to what its judge knows.

Shapes: K candidates of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triptych.training.groups import Group, Verdict, scores_of
from triptych.training.judges import JUDGES
from triptych.training.judging import checked, judged, nested_memory, nested_needs
from triptych.training.plug_points import Judge, Live


@JUDGES.register("random")
@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Scores from U(0, 1), by the run's seed, the round and the group's key."""

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One score a candidate."""
        return [
            Verdict(score=torch.rand(g.size, generator=live.generator(g.key, g.depth, "random judge")))
            for g in groups
        ]


@JUDGES.register("shuffled")
@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled:
    """The scores of `of`, dealt out anew among the candidates of each group: same scores, no knowledge."""

    of: Judge

    gives = frozenset({"score"})
    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score", "preference")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Permuted scores."""
        found = []
        for g in judged(self.of, groups, live):
            order = torch.randperm(g.size, generator=live.generator(g.key, g.depth, "shuffled"))
            found.append(Verdict(score=scores_of(g)[order]))
        return found
