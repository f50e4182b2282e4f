"""What travels through a round: groups of candidates with their verdicts, and the samples made of them.

Shapes: K candidates of one context, U units of the longest one (tokens, steps, turns, denoising steps,
slots), N users or aspects. Everything lives on the CPU in float32; nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["token", "step", "turn", "denoise", "slot"]
Kind = Literal["pair", "list", "labelled", "units"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said of the K candidates of one group; absent where it says no such thing.

    score: [K], higher is better. units: reward of each unit, [K, U]. preference: P(i preferred to j), [K, K],
    one half on the diagonal. users: score by each user or aspect, [K, N]. visits: how often a search went
    through each candidate, [K]. consistency: probability that the ranking of the group is right, a number.
    """

    score: Tensor | None = None
    units: Tensor | None = None
    preference: Tensor | None = None
    users: Tensor | None = None
    visits: Tensor | None = None
    consistency: float | None = None

    def __post_init__(self) -> None:
        # Rewards of units may hold anything at padding.
        for name in ("score", "preference", "users"):
            value = getattr(self, name)
            if value is not None and bool(value.isnan().any()):
                raise ValueError(f"a verdict's {name} holds NaN: {value.tolist()}")

    def given(self) -> frozenset[str]:
        """Names of what it says."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One context and K candidates as they were drawn.

    context, candidates: the modality's own records. key: names the context in the run's randomness and in
    messages. mask: [K, U] bool, the units that a policy chose; False for padding and for what others put in
    between (the prompt of a second turn). logp: log-prob of each unit under the policy that drew it, or found
    it by a search (origin 'beam', no sample of it), [K, U], 0 where the mask is False; None for data.
    proposal: log-prob of each candidate under the distribution that really drew it, [K], where that is not
    the policy itself (a reference, a blend). origin: [K] names of where candidates come from. depth: place in
    a tree or a sequence of steps; groups of one context share their key. turn: [K, U] number of the turn a
    unit belongs to, from 0.
    ref, value: per unit, [K, U], filled by the loop for judges and shapes that ask for them.
    """

    key: str
    context: Any
    candidates: tuple[Any, ...]
    mask: Tensor
    unit: Unit = "token"
    logp: Tensor | None = None
    proposal: Tensor | None = None
    origin: tuple[str, ...] = ()
    depth: int = 0
    turn: Tensor | None = None
    ref: Tensor | None = None
    value: Tensor | None = None
    verdict: Verdict = field(default_factory=Verdict)

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(f"group {self.key} has no candidate")
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool or len(self.mask) != self.size:
            raise ValueError(
                f"group {self.key}: mask is {self.mask.dtype} {tuple(self.mask.shape)}; expected "
                f"bool [{self.size}, U]"
            )
        for name in ("logp", "ref", "value", "turn"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.mask.shape:
                shapes = f"{tuple(tensor.shape)}; the mask has {tuple(self.mask.shape)}"
                raise ValueError(f"group {self.key}: {name} has shape {shapes}")
        if not self.origin:
            object.__setattr__(self, "origin", ("policy",) * self.size)

    @property
    def size(self) -> int:
        """K."""
        return len(self.candidates)

    @property
    def count(self) -> Tensor:
        """Number of units of each candidate, [K]."""
        return self.mask.sum(-1).float()

    def drawn_logp(self) -> Tensor:
        """Log-prob of each candidate under what drew it, [K]; ValueError where nothing was drawn."""
        if self.proposal is not None:
            return self.proposal
        if self.logp is None or "beam" in self.origin:
            raise ValueError(
                f"group {self.key} has no log-probs of drawing: its candidates are data or beams"
            )
        return self.logp.sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some candidates of one group as one example: a pair, a list, a labelled one, or K rows of units.

    group: index among the round's groups. candidates: indices in the group, by role: (chosen, rejected) of a
    pair. calibration: a further candidate, or None. fields: the optional fields of the objective's input,
    without the batch dimension: () for a pair, [K] for a list, [K, U] for units.
    """

    kind: Kind
    group: int
    candidates: tuple[int, ...]
    calibration: int | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def all_candidates(self) -> tuple[int, ...]:
        """Every candidate that must be computed, the calibration's last."""
        return self.candidates if self.calibration is None else (*self.candidates, self.calibration)


def scores_of(group: Group) -> Tensor:
    """One score a candidate, [K]: the verdict's own, or its mean preference over the others.

    ValueError when the verdict has neither.
    """
    verdict = group.verdict
    if verdict.score is not None:
        return verdict.score
    if verdict.preference is not None:
        k = group.size
        own = verdict.preference.diagonal()
        return (verdict.preference.sum(-1) - own) / max(1, k - 1)
    raise ValueError(f"group {group.key}: the judge gave neither scores nor preferences")


def preferences_of(group: Group) -> Tensor:
    """P(i preferred to j), [K, K]: the verdict's own, or Bradley-Terry of its scores, sigmoid(R_i - R_j).

    ValueError when the verdict has neither.
    """
    verdict = group.verdict
    if verdict.preference is not None:
        return verdict.preference
    if verdict.score is not None:
        return torch.sigmoid(verdict.score.unsqueeze(-1) - verdict.score.unsqueeze(-2))
    raise ValueError(f"group {group.key}: the judge gave neither preferences nor scores")


def pad_units(rows: Sequence[Tensor], width: int | None = None, *, value: float = 0.0) -> Tensor:
    """Rows of different lengths as one table, [K, U]."""
    width = max((len(r) for r in rows), default=0) if width is None else width
    table = torch.full((len(rows), width), value, dtype=rows[0].dtype if rows else torch.float32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
