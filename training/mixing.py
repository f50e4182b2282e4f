"""Sleeping experts: one prediction of many, good for every user group that overlaps with others.

AdaNormalHedge (Luo and Schapire 2015, arXiv 1502.05934, section 3.1) as used by Acharya et al. 2023, arXiv
2310.04652: an expert for each user group, awake when the user belongs to it, each an ordinary learner. The
regret on every group is then about sqrt(T_g log n) above its own expert's. Shapes: n experts, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triptych.training.agreement import JUDGES
from triptych.training.groups import Group, Verdict, preferences_of, scores_of
from triptych.training.judging import checked, judged, nested_needs
from triptych.training.stages import Judge, Live

ALWAYS = "*"
Memory = MutableMapping[str, Tensor]


def log_weight(regret: Tensor, total: Tensor) -> Tensor:
    """Logarithm of `weight`, which itself overflows after some thousand rounds; -inf where it is 0."""
    regret, total = regret.double(), total.double()
    high = (regret + 1).clamp(min=0).square() / (3 * (total + 1))
    low = (regret - 1).clamp(min=0).square() / (3 * (total + 1))
    return high + torch.log(-torch.expm1(low - high)) + math.log(0.5)


def weight(regret: Tensor, total: Tensor) -> Tensor:
    """w = (F(R + 1, C + 1) - F(R - 1, C + 1)) / 2 with F(R, C) = exp(max(R, 0)^2 / (3 C)), [n] float64.

    regret: R, sum of l_mix - l_i over the rounds in which i was awake. total: C, sum of their sizes.
    """
    return log_weight(regret, total).exp()


def mixture(regret: Tensor, total: Tensor, awake: Tensor) -> Tensor:
    """p_i proportional to w(R_i, C_i) among the awake, [n] float64, 0 for the others.

    Equal shares where every awake weight is 0 (all of them far worse than the mix). ValueError when none is
    awake.
    """
    if not awake.any():
        raise ValueError("no expert is awake; one that always is, is needed")
    log_w = log_weight(regret, total)
    if log_w[awake].isneginf().all():
        return awake.double() / awake.sum()
    return log_w.masked_fill(~awake, -torch.inf).softmax(-1)


def update(
    regret: Tensor, total: Tensor, awake: Tensor, losses: Tensor, mix_loss: Tensor | float
) -> tuple[Tensor, Tensor]:
    """R_i + l_mix - l_i and C_i + |l_mix - l_i| of the awake, both [n] float64; the others stay.

    losses: [n], anything for those asleep. ValueError unless all differences are in [-1, 1]: scale losses to
    [0, 1].
    """
    away = torch.where(awake, torch.as_tensor(mix_loss, dtype=torch.float64) - losses.double(), 0.0)
    # NaN must fail too, hence not (away.abs() > 1).any().
    if not (away.abs() <= 1 + 1e-6).all():
        raise ValueError(f"losses differ by {away.abs().max().item():.3g}; scale them to [0, 1]")
    return regret + away, total + away.abs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleepers:
    """Experts and where their regrets are kept: tensors in a memory, under `name`."""

    experts: tuple[str, ...]
    name: str = "mixed"

    def weights(self, memory: Memory, awake: Tensor) -> Tensor:
        """What each expert counts for now, [n]; see `mixture`."""
        return mixture(*self._state(memory), awake)

    def learn(self, memory: Memory, awake: Tensor, losses: Tensor, mix_loss: Tensor | float) -> None:
        """One round's losses; see `update`."""
        state = update(*self._state(memory), awake, losses, mix_loss)
        memory[f"{self.name}/regret"], memory[f"{self.name}/total"] = state

    def _state(self, memory: Memory) -> tuple[Tensor, Tensor]:
        regret, total = (
            _kept(memory, f"{self.name}/{of}", (len(self.experts),)) for of in ("regret", "total")
        )
        return regret, total


def _kept(memory: Memory, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in memory:
        return torch.zeros(shape, dtype=torch.float64)
    if memory[name].shape != shape:
        raise ValueError(
            f"memory '{name}' has shape {tuple(memory[name].shape)}, not {shape}: of other experts"
        )
    return memory[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretMonitor:
    """Cumulative regret of a mix on each user group, against every expert; positive: the expert was better.

    Kept in a memory under `name`: regret [G, n] = sum of l_mix - l_i over rounds of users in the group with
    expert i awake, rounds [G, n] their number, and seen [G].
    """

    groups: tuple[str, ...]
    experts: tuple[str, ...]
    name: str = "monitor"

    def learn(
        self, memory: Memory, belongs: Tensor, awake: Tensor, losses: Tensor, mix_loss: Tensor | float
    ) -> None:
        """One round: belongs [G] bool says which groups the user is of; losses: [n]."""
        regret, rounds, seen = self._state(memory)
        away = torch.where(awake, torch.as_tensor(mix_loss, dtype=torch.float64) - losses.double(), 0.0)
        of_group = belongs.double()
        memory[f"{self.name}/regret"] = regret + of_group[:, None] * away
        memory[f"{self.name}/rounds"] = rounds + of_group[:, None] * awake.double()
        memory[f"{self.name}/seen"] = seen + of_group

    def table(self, memory: Memory) -> list[dict[str, Any]]:
        """A row for each group that was seen: group, rounds, best expert, regret against it, and per round.

        The best is among experts that were awake in every round of the group.
        """
        regret, rounds, seen = self._state(memory)
        rows: list[dict[str, Any]] = []
        for g, group in enumerate(self.groups):
            comparable = rounds[g] == seen[g]
            if seen[g] == 0 or not comparable.any():
                continue
            best = int(regret[g].masked_fill(~comparable, -torch.inf).argmax())
            loss, number = regret[g, best].item(), int(seen[g])
            rows.append(
                {"group": group, "rounds": number, "best": self.experts[best], "regret": loss}
                | {"regret_per_round": loss / number}
            )
        return rows

    def metrics(self, memory: Memory) -> dict[str, float]:
        """`regret/GROUP` against its best expert, and `regret/GROUP/EXPERT` against each that was awake."""
        regret, rounds, _ = self._state(memory)
        found = {f"regret/{row['group']}": float(row["regret"]) for row in self.table(memory)}
        for g, group in enumerate(self.groups):
            for i, expert in enumerate(self.experts):
                if rounds[g, i] > 0:
                    found[f"regret/{group}/{expert}"] = regret[g, i].item()
        return found

    def _state(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        both = (len(self.groups), len(self.experts))
        shapes = {"regret": both, "rounds": both, "seen": both[:1]}
        regret, rounds, seen = (_kept(memory, f"{self.name}/{of}", shape) for of, shape in shapes.items())
        return regret, rounds, seen


class OnlineRidge:
    """Linear least squares one example at a time: w = (l2 I + sum x x^T)^-1 sum y x. An ordinary expert.

    inverse: [D, D], moment: [D], float64; what a checkpoint would keep.
    """

    def __init__(self, dim: int, *, l2: float = 1.0):
        if not l2 > 0:
            raise ValueError(f"l2={l2} must be positive")
        self.inverse = torch.eye(dim, dtype=torch.float64) / l2
        self.moment = torch.zeros(dim, dtype=torch.float64)

    @property
    def coefficients(self) -> Tensor:
        """w, [D]."""
        return self.inverse @ self.moment

    def predict(self, x: Tensor) -> float:
        """w^T x, x [D]; clip it where the outcome is bounded."""
        return (self.coefficients @ x.double()).item()

    def learn(self, x: Tensor, y: float) -> None:
        """See one example (the inverse by Sherman and Morrison's formula)."""
        x = x.double()
        step = self.inverse @ x
        self.inverse = self.inverse - torch.outer(step, step) / (1 + x @ step)
        self.moment = self.moment + y * x


def groups_in_field(field: str) -> Callable[[Any], frozenset[str]]:
    """User groups of a context as its `fields[field]` names them: a name or a list of names; absent: none."""

    def read(context: Any) -> frozenset[str]:
        fields: Mapping[str, Any] = context.fields
        value = fields.get(field)
        if value is None:
            return frozenset()
        names: Sequence[Any] = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"field '{field}' is {value!r}; it names a user group, or is a list of names")
        return frozenset(names)

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Judges of user groups mixed by what feedback showed of them: preference = sum_i p_i P_i.

    experts: judge by user group, each awake for users of its group, and '*', which always is. group_of:
    context -> the user's groups (those without an expert count for nothing). feedback: a judge whose
    preferences are what users really said; after each group the experts' mean squared errors against it move
    the weights, in the order of the groups. Without it `observe` is how the mix learns. Scores are mixed too
    where every expert gives some. State: tensors in `live.memory` under `name`.
    """

    experts: Mapping[str, Judge]
    group_of: Callable[[Any], frozenset[str]]
    feedback: Judge | None = None
    name: str = "mixed"

    needs = property(nested_needs)
    remembers = True

    def __post_init__(self) -> None:
        if ALWAYS not in self.experts:
            raise ValueError(
                f"experts={', '.join(self.experts) or 'none'} must include '{ALWAYS}', awake for all"
            )
        for name, judge in self.experts.items():
            checked(judge, f"experts['{name}']", "score", "preference")
        if self.feedback is not None:
            checked(self.feedback, "feedback", "score", "preference")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        scored = all("score" in j.gives for j in self.experts.values())
        return frozenset({"preference", "score"} if scored else {"preference"})

    @property
    def sleepers(self) -> Sleepers:
        """Where the weights are kept."""
        return Sleepers(experts=tuple(self.experts), name=self.name)

    @property
    def monitor(self) -> RegretMonitor:
        """Where the regret of each user group is kept."""
        names = tuple(self.experts)
        return RegretMonitor(groups=names, experts=names, name=f"{self.name}/monitor")

    def awake(self, context: Any) -> Tensor:
        """Which experts are awake for this context, [n] bool."""
        of_user = self.group_of(context) | {ALWAYS}
        return torch.tensor([name in of_user for name in self.experts])

    def observe(self, live: Live, awake: Tensor, predictions: Tensor, outcome: Tensor) -> None:
        """Learn from one outcome: predictions [n, ...] and outcome [...] in [0, 1], by mean squared error.

        Predictions of experts that are asleep may be anything. The mix is that of the weights as they are.
        """
        n = len(self.experts)
        known = torch.where(awake[:, None], predictions.reshape(n, -1).double(), 0.0)
        target = outcome.reshape(-1).double()
        share = self.sleepers.weights(live.memory, awake)
        losses = (known - target).square().mean(-1)
        mix_loss = (share @ known - target).square().mean()
        self.sleepers.learn(live.memory, awake, losses, mix_loss)
        self.monitor.learn(live.memory, awake, awake, losses, mix_loss)

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Mixed verdicts; with feedback, each group is judged before anything is learned from it."""
        awake = [self.awake(g.context) for g in groups]
        opinions = self._opinions(groups, awake, live)
        truth = None if self.feedback is None else judged(self.feedback, groups, live)
        verdicts: list[Verdict] = []
        for i, group in enumerate(groups):
            share = self.sleepers.weights(live.memory, awake[i])
            heard = [(p, g) for p, g in zip(share.tolist(), opinions[i], strict=True) if g is not None]
            verdict = Verdict(preference=torch.stack([p * preferences_of(g) for p, g in heard]).sum(0))
            if "score" in self.gives:
                verdict = replace(verdict, score=torch.stack([p * scores_of(g) for p, g in heard]).sum(0))
            verdicts.append(verdict)
            if truth is not None and group.size > 1:
                upper = torch.triu_indices(group.size, group.size, 1).unbind()
                rows = [
                    torch.zeros(len(upper[0])) if g is None else preferences_of(g)[upper] for g in opinions[i]
                ]
                self.observe(live, awake[i], torch.stack(rows), preferences_of(truth[i])[upper])
        for row in self.monitor.table(live.memory):
            live.metrics[f"regret/{row['group']}"] = row["regret"]
        return verdicts

    def _opinions(
        self, groups: Sequence[Group], awake: Sequence[Tensor], live: Live
    ) -> list[list[Group | None]]:
        """For each group its verdict by each expert that is awake; no other expert is asked."""
        table: list[list[Group | None]] = [[None] * len(self.experts) for _ in groups]
        for e, judge in enumerate(self.experts.values()):
            places = [i for i in range(len(groups)) if awake[i][e]]
            if places:
                for i, g in zip(places, judged(judge, [groups[i] for i in places], live), strict=True):
                    table[i][e] = g
        return table


@JUDGES.register("mixed")
def mixed(
    *, experts: Mapping[str, Judge], field: str, feedback: Judge | None = None, name: str = "mixed"
) -> Mixed:
    """`Mixed` with the user's groups in a field of the context's record."""
    return Mixed(experts=experts, group_of=groups_in_field(field), feedback=feedback, name=name)
