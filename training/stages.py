"""The plug points of a round and the stages that are made of them: what may be combined is checked here.

A round is draw -> judge -> shape -> step -> keep. Source, judge and shape are small callables with a few
declared facts; the objective and its anchors are `Terms` of the registry; `Keep` says what becomes of the
weights. A `Stage` is checked when it is made, so that a combination that cannot mean what it says is refused
before any work, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from triptych.objectives import Input, Terms, UnitLogLik
from triptych.training.groups import Group, Sample, Verdict
from triptych.training.order import key
from triptych.training.references import Batch, Reference


class Port(Protocol):
    """What a modality brings to the rounds besides sources and judges: likelihoods of drawn candidates.

    bound: whether `terms` is a bound (an ELBO) rather than the log-prob of a sample.
    """

    @property
    def bound(self) -> bool:
        """See the class."""
        ...

    def key(self, context: Any, candidate: Any) -> str:
        """Content hash of a candidate in its context, as the batch's `keys` have it."""
        ...

    def length(self, context: Any, candidates: Sequence[Any]) -> int:
        """Cost of computing these candidates, for batches of similar cost."""
        ...

    def collate(self, items: Sequence[tuple[Any, Sequence[Any]]], seeds: Sequence[int]) -> Batch:
        """One batch of contexts with their candidates, [C] in all, in order; a seed for each context."""
        ...

    def terms(self, policy: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Log-likelihood per unit of each candidate, [C, U], zero-padded."""
        ...

    def readouts(self, policy: Any, batch: Any, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` and the named values per unit, [C, U] each: 'value' (critic), 'entropy', 'kl' (exact).

        ValueError for one that this policy does not have.
        """
        ...

    def pack(self, record: Any) -> Mapping[str, Any]:
        """A context or candidate as tensors and JSON values, for checkpoints."""
        ...

    def unpack(self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Any:
        """The record that was packed."""
        ...


@dataclass(slots=True, kw_only=True)
class Live:
    """What a round may use: the policy as it is now, its references, and the round's own randomness.

    memory: what judges keep from round to round (weights of experts, drifting values), by name; saved in
    checkpoints. metrics: what sources and judges report of this round.
    """

    policy: nn.Module
    port: Any
    references: Mapping[str, Reference]
    device: torch.device
    seed: int
    stage: int = 0
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def generator(self, *parts: int | str) -> torch.Generator:
        """A CPU generator of this round and the given parts (a context's key, a purpose)."""
        return torch.Generator().manual_seed(key("round", self.seed, self.stage, self.round, *parts))


class Source(Protocol):
    """Contexts -> groups.

    fresh: every candidate is a sample of the policy as it is, with its log-prob. Where only those of origin
    'policy' are, an attribute `own_fresh` says so. num_candidates: K, at most.
    groups_per_context: groups a context makes, at most. provides: what its groups have besides candidates:
    'logp', 'proposal', 'verdict', 'calibration' (a candidate of origin 'reference').
    """

    @property
    def fresh(self) -> bool:
        """See the class."""
        ...

    @property
    def num_candidates(self) -> int:
        """See the class."""
        ...

    @property
    def groups_per_context(self) -> int:
        """See the class."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """See the class."""
        ...

    def __call__(self, contexts: Sequence[Any], live: Live) -> list[Group]:
        """Draw; groups of one context follow each other, contexts stay in order."""
        ...


class Judge(Protocol):
    """Groups -> verdicts. gives: fields of `Verdict` that it fills. needs: 'ref' or 'value' of the groups."""

    @property
    def gives(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """See the class."""
        ...

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group, in order."""
        ...


class Shape(Protocol):
    """Judged groups -> training samples; pure, with randomness from the seed alone.

    makes: the objective's input type. needs: fields of the verdict or the group that must be there; a name
    'a|b' asks for either. provides: optional fields of the input that the samples fill. per_unit: whether
    advantages differ between the units of a row. readout: 'sum' of a candidate's units, or 'steps'.
    """

    @property
    def makes(self) -> type[Input]:
        """See the class."""
        ...

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

    def most(self, num_candidates: int) -> int:
        """Samples that a group of K candidates makes, at most."""
        ...

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Samples in the order of the groups."""
        ...


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What becomes of the weights after a round.

    stage: when the reference of slot 'stage' becomes the policy: 'fixed' at the start of the stage only,
    'each_round' at the start of every `every`-th round. ema: decay of the slot 'ema', per optimizer step.
    buffer: earlier rounds whose groups are trained on again: 'none', 'all_past', or the 'last' buffer_rounds.
    average: keep the mean of the policies at the end of every round, exported beside the last one.
    """

    stage: Literal["fixed", "each_round"] = "fixed"
    every: int = 1
    ema: float | None = None
    buffer: Literal["none", "all_past", "last"] = "none"
    buffer_rounds: int = 0
    average: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"keep.every={self.every} must be at least 1")
        if self.every > 1 and self.stage == "fixed":
            raise ValueError(f"keep.every={self.every} needs keep.stage=each_round")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"keep.ema={self.ema} must be in [0, 1)")
        if (self.buffer == "last") != (self.buffer_rounds > 0):
            raise ValueError(f"keep.buffer_rounds={self.buffer_rounds} belongs to keep.buffer=last")

    def past_rounds(self, round_index: int) -> range:
        """Earlier rounds of the stage whose groups are used again in this one."""
        first = {"none": round_index, "all_past": 0, "last": max(0, round_index - self.buffer_rounds)}
        return range(first[self.buffer], round_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Source, judge, shape and objective whose weighted loss is added at every step of a stage.

    The first part of a stage is the main one; others are anchors on samples of their own (HyPO's KL on fresh
    samples beside offline pairs, next-token prediction on data). batch_size: samples a step of this part.
    share: share of a round's contexts that it uses.
    """

    source: Source
    judge: Judge | None
    shape: Shape
    terms: Terms
    weight: float = 1.0
    batch_size: int | None = None
    share: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of the contexts must be in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Rounds of one kind. Refused with a ValueError, when made, is what could not mean what it says.

    num_contexts: contexts of a round. num_epochs: passes over a round's samples. has_critic: whether the
    policy has a critic.
    """

    name: str
    parts: tuple[Part, ...]
    keep: Keep
    num_rounds: int
    num_contexts: int
    num_epochs: float = 1.0
    has_critic: bool = False
    bound: bool = False
    modality: str | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"stage {self.name} has no part")
        for what in ("num_rounds", "num_contexts"):
            if getattr(self, what) < 1:
                raise ValueError(f"stage {self.name}: {what}={getattr(self, what)} must be at least 1")
        if not self.num_epochs > 0:
            raise ValueError(f"stage {self.name}: num_epochs={self.num_epochs} must be positive")
        for part in self.parts:
            try:
                check_part(
                    part, self.keep, has_critic=self.has_critic, bound=self.bound, modality=self.modality
                )
            except ValueError as error:
                raise ValueError(f"stage {self.name}: {error}") from error

    @property
    def main(self) -> Part:
        """The first part."""
        return self.parts[0]


def check_part(part: Part, keep: Keep, *, has_critic: bool, bound: bool, modality: str | None = None) -> None:
    """Refuse a part whose pieces do not fit; ValueError with the reason."""
    source, shape, terms = part.source, part.shape, part.terms
    names = ", ".join(t.objective.spec.name for t in terms.terms)
    on_policy = any(t.objective.spec.on_policy for t in terms.terms)
    own = getattr(source, "own_fresh", False) and getattr(shape, "train", "all") == "policy"
    if on_policy and not source.fresh and not own and not bound:
        kind = type(source).__name__
        raise ValueError(
            f"{names} needs fresh samples of the policy with their log-probs, and {kind} gives none: "
            "beams and data are no samples of it, and those of another distribution need importance weights"
        )
    if on_policy and keep.buffer != "none" and shape.makes is UnitLogLik:
        raise ValueError(f"{names} needs fresh samples; keep.buffer={keep.buffer} trains on old ones again")
    _check_needs(part, has_critic)
    if "advantage" in shape.provides and shape.per_unit:
        for term in terms.terms:
            if term.objective.spec.row_advantage:
                raise ValueError(
                    f"'{term.objective.spec.name}' has one ratio and one advantage a sample, but the credit "
                    "gives each unit its own; use a credit of whole samples or an objective per unit (ppo)"
                )
    critic = {"value", "target"} & (set() if has_critic else frozenset().union(*_required(terms)))
    if "value" in critic:
        raise ValueError(f"{names} learns from a path of values and needs a critic; add one (critic: ...)")
    provided = shape.provides | {"ref"} | ({"value"} if has_critic else set()) | {"entropy", "kl"}
    used = frozenset[str]().union(*(t.objective.uses for t in terms.terms))
    extra = {"value", "entropy", "kl"} - used
    terms.check(shape.makes, frozenset(provided - extra), bound=bound, modality=modality)


def _required(terms: Terms) -> list[frozenset[str]]:
    return [t.objective.requires for t in terms.terms]


def _check_needs(part: Part, has_critic: bool) -> None:
    """What the shape and the judge ask for must come from somewhere."""
    gives = frozenset() if part.judge is None else part.judge.gives
    available = gives | part.source.provides | {"ref"} | ({"value"} if has_critic else set())
    if "verdict" in part.source.provides:
        available |= {"score"}
    needs = part.shape.needs | (frozenset() if part.judge is None else part.judge.needs)
    for need in sorted(needs):
        if not set(need.split("|")) & available:
            if need == "value":
                raise ValueError("credit 'gae' needs a critic; add one (critic: ...)")
            who = "no judge" if part.judge is None else f"judge {type(part.judge).__name__}"
            raise ValueError(
                f"the shape needs {need.replace('|', ' or ')}, which neither {who} nor "
                f"source {type(part.source).__name__} gives"
            )
