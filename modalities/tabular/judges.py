"""Judges of tabular candidates: a reward or a preference that is written down for every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from triptych.modalities.tabular.policy import TabularPolicy
from triptych.training.drift import JUDGES as COMMON
from triptych.training.groups import Group, Verdict
from triptych.training.plugs import Registry
from triptych.training.references import unwrapped
from triptych.training.stages import Judge, Live

JUDGES: Registry[Judge] = Registry("judge", base=COMMON)


def places(group: Group, live: Live) -> list[int]:
    """Index of each candidate, its context's prefix before it, among all candidates of the policy, [K]."""
    policy = unwrapped(live.policy)
    assert isinstance(policy, TabularPolicy)
    known = {actions: i for i, actions in enumerate(policy.all_candidates())}
    return [known[(*group.context.prefix, *arm.actions)] for arm in group.candidates]


@JUDGES.register("table")
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """reward[context][candidate], in the order of `TabularPolicy.all_candidates`."""

    reward: Sequence[Sequence[float]]
    gives: ClassVar[frozenset[str]] = frozenset({"score"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores."""
        return [
            Verdict(score=torch.tensor([self.reward[g.context.index][i] for i in places(g, live)]))
            for g in groups
        ]


@JUDGES.register("game")
@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """preference[i][j] = P(i preferred to j), the same in every context; order as in `Table`."""

    preference: Sequence[Sequence[float]]
    gives: ClassVar[frozenset[str]] = frozenset({"preference"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Preferences, [K, K]."""
        table = torch.tensor([list(row) for row in self.preference])
        found = [torch.tensor(places(g, live)) for g in groups]
        return [Verdict(preference=table[i.unsqueeze(-1), i]) for i in found]
