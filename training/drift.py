"""Users whose values drift: a seedable simulator of non-stationary preferences, for judges.

It says nothing about real people. With it one can see whether an online learner tracks what a frozen one
loses. Shapes: N users, M aspects, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triptych.training.groups import Group, Verdict
from triptych.training.judging import checked, nested_needs
from triptych.training.mixing import JUDGES
from triptych.training.plug_points import Judge, Live


def drift(values: Tensor, friends: Tensor, *, bound: float, rate: float) -> Tensor:
    """v_n + rate * mean over friends j with |v_j - v_n| <= bound of (v_j - v_n), aspect by aspect, [N, M].

    values [N, M]; friends [N, N] bool. A value without a friend within the bound stays. Bounded confidence
    (Hegselmann and Krause 2002) as used by Mukta et al. 2021, arXiv 2109.08021.
    """
    gap = values.unsqueeze(0) - values.unsqueeze(1)
    # A friend exactly at the bound counts, whatever the subtraction's rounding.
    near = friends.unsqueeze(-1) & (gap.abs() <= bound * (1 + 1e-6))
    count = near.sum(1).clamp(min=1)
    return values + rate * torch.where(near, gap, 0.0).sum(1) / count


@JUDGES.register("drifting")
@dataclass(frozen=True, slots=True, kw_only=True)
class Drifting:
    """score = mean over users of values_n . aspects, where users' values drift between rounds.

    of: a judge that gives `users` [K, M], read as aspects (an ensemble, a combination, a reward model of
    several objectives). values: [N][M] at the start. friends: pairs of users (i, j), who influence each
    other. bound, rate: of `drift`, one step a round. The verdict's `users` is [K, N].
    """

    of: Judge
    values: Sequence[Sequence[float]]
    friends: Sequence[tuple[int, int]]
    bound: float
    rate: float
    name: str = "drifting"

    gives = frozenset({"score", "users"})
    needs = property(nested_needs)
    remembers = True

    def __post_init__(self) -> None:
        checked(self.of, "of", "users")
        num = len(self.values)
        if not num or len({len(v) for v in self.values}) != 1:
            raise ValueError("values needs one row a user, all of the same number of aspects")
        if odd := [pair for pair in self.friends if not all(0 <= i < num for i in pair)]:
            raise ValueError(f"friends={odd[0]} names a user that is not among the {num}")
        if not self.bound >= 0 or not 0 <= self.rate <= 1:
            raise ValueError(f"bound={self.bound} must be at least 0 and rate={self.rate} in [0, 1]")

    def now(self, live: Live) -> Tensor:
        """The users' values in this round, [N, M], kept in the memory; they drift once a round."""
        memory, at = f"judge/{self.name}", f"judge/{self.name}/round"
        clock = float(live.stage * 1_000_000 + live.round)
        if memory not in live.memory:
            live.memory[memory] = torch.tensor(self.values, dtype=torch.float32)
            live.memory[at] = torch.tensor([clock], dtype=torch.float64)
        elif float(live.memory[at]) != clock:
            friends = torch.zeros(len(self.values), len(self.values), dtype=torch.bool)
            for i, j in self.friends:
                friends[i, j] = friends[j, i] = True
            live.memory[memory] = drift(live.memory[memory], friends, bound=self.bound, rate=self.rate)
            live.memory[at] = torch.tensor([clock], dtype=torch.float64)
        return live.memory[memory]

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """What the users say now."""
        values = self.now(live)
        found: list[Verdict] = []
        for verdict in self.of(groups, live):
            assert verdict.users is not None
            if verdict.users.shape[-1] != values.shape[-1]:
                raise ValueError(
                    f"values has {values.shape[-1]} aspects a user, the judge gives {verdict.users.shape[-1]}"
                )
            users = verdict.users @ values.T
            found.append(replace(verdict, score=users.mean(-1), users=users, preference=None))
        return found
