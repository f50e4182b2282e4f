"""How a scorer's outputs become an objective's input, or a judge's verdict: the same for every modality.

A scorer maps what it reads (rows of tokens, feature vectors) to scores [C, N] of C candidates under N
objectives. B samples, K candidates of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.objectives import Input, ListLogLik, LogLik, PairLogLik, UnitLogLik
from triptych.training.groups import Verdict

ScoreKind = Literal["pair", "list", "units"]
INPUT_OF: dict[str, type[Input]] = {"pair": PairLogLik, "list": ListLogLik, "units": UnitLogLik}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """What a scorer reads for C candidates, and what is known of them.

    slots: [B, K] places of a sample's candidates among C, mask: [B, K] where there is one, relevance: [B, K]
    their grades. margin, strength: [B] or None. target: [B, N] ratings of the only candidate, rated: [B, N]
    where there is a rating. keys: a content hash of each candidate.
    """

    kind: ScoreKind
    inputs: Any
    slots: Tensor
    mask: Tensor
    relevance: Tensor
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    margin: Tensor | None = None
    strength: Tensor | None = None
    target: Tensor | None = None
    rated: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """One term a candidate, [C]."""
        return torch.ones(len(self.keys), device=self.slots.device)

    def to(self, device: torch.device) -> ScoreBatch:
        """The batch on a device."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, inputs=self.inputs.to(device), **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSample:
    """What is known of one sample. grades: of its candidates, the best first; () where ratings are given."""

    id: str
    grades: tuple[float, ...] = ()
    margin: float | None = None
    strength: float | None = None
    ratings: tuple[float | None, ...] = ()

    @property
    def kind(self) -> ScoreKind:
        """What it becomes."""
        return "units" if self.ratings else "pair" if self.grades == (1.0, 0.0) else "list"


def score_batch(samples: Sequence[ScoreSample], inputs: Any, keys: Sequence[str]) -> ScoreBatch:
    """The batch of samples whose candidates are, in order, what `inputs` holds.

    ValueError for samples of several kinds, or a margin that only some of them have.
    """
    kinds: set[ScoreKind] = {s.kind for s in samples}
    if len(kinds) != 1:
        raise ValueError(f"a batch needs samples of one kind, not {', '.join(sorted(kinds)) or 'none'}")
    sizes = [len(s.grades) or 1 for s in samples]
    if sum(sizes) != len(keys):
        raise ValueError(f"{len(samples)} samples have {sum(sizes)} candidates, but there are {len(keys)}")
    slots = torch.zeros(len(samples), max(sizes), dtype=torch.long)
    mask, relevance = torch.zeros(slots.shape, dtype=torch.bool), torch.zeros(slots.shape)
    start = 0
    for i, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        slots[i, :size], mask[i, :size] = torch.arange(start, start + size), True
        relevance[i, : len(sample.grades)] = torch.tensor(sample.grades)
        start += size
    rated = [[r is not None for r in s.ratings] for s in samples]
    return ScoreBatch(
        kind=kinds.pop(),
        inputs=inputs,
        slots=slots,
        mask=mask,
        relevance=relevance,
        keys=tuple(keys),
        ids=tuple(s.id for s in samples),
        margin=_column("margin", [s.margin for s in samples]),
        strength=_column("strength", [s.strength for s in samples]),
        target=torch.tensor([[r or 0.0 for r in s.ratings] for s in samples]) if rated[0] else None,
        rated=torch.tensor(rated) if rated[0] else None,
    )


def _column(name: str, values: Sequence[float | None]) -> Tensor | None:
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        raise ValueError(f"{name} must be given for every sample of a batch or for none")
    return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class ScoreLikelihood:
    """A candidate's score in the place of its log-likelihood, with a count of 1.

    Pairs and lists need a scorer with one objective; ratings are units, one an attribute.
    """

    def __call__(
        self, policy: Callable[[Any], Tensor], batch: ScoreBatch, generator: torch.Generator | None = None
    ) -> Input:
        """PairLogLik, ListLogLik or UnitLogLik of the batch."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(
        self, policy: Callable[[Any], Tensor], batch: ScoreBatch, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scores of every candidate, [C, N]."""
        return policy(batch.inputs)

    def assemble(self, terms: Tensor, batch: ScoreBatch) -> Input:
        """The objective's input from scores [C, N], in float32 (float64 stays)."""
        scores = terms if terms.dtype == torch.float64 else terms.float()
        if batch.kind == "units":
            assert batch.rated is not None
            return UnitLogLik(scores[batch.slots[:, 0]], batch.rated, target=batch.target)
        if scores.shape[1] != 1:
            raise ValueError(f"{batch.kind}s compare one score, and the scorer gives {scores.shape[1]}")
        score = scores[batch.slots, 0]
        loglik = LogLik(score, torch.ones_like(score))
        if batch.kind == "list":
            return ListLogLik(loglik, batch.relevance, batch.mask)
        sides = (loglik.mapped(lambda t, k=k: t[:, k]) for k in (0, 1))
        return PairLogLik(*sides, strength=batch.strength, margin=batch.margin)


def verdict_of(scores: Tensor, names: Sequence[str], weights: Mapping[str, float] | None = None) -> Verdict:
    """Scores [K, N] as a verdict: one objective is `score`, several are `users` under their weighted sum.

    weights: of the objectives by name, a direction of preference (DPA, 2402.18571: v . r); without them
    several objectives give no score.
    """
    scores = scores.detach().float().cpu()
    if len(names) == 1:
        return Verdict(score=scores[:, 0])
    if weights is None:
        return Verdict(users=scores)
    direction = torch.tensor([float(weights.get(name, 0.0)) for name in names])
    return Verdict(score=scores @ direction, users=scores)
