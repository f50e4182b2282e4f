"""Stages of rounds, made of plug points: what may be combined is checked here.

A round is draw -> judge -> shape -> step -> keep. Source, judge and shape are small callables with a few
declared facts; the objective and its anchors are `Terms` of the registry; `Keep` says what becomes of the
weights. A `Stage` is checked when it is made, so that a combination that cannot mean what it says is refused
before any work, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triptych.objectives import Terms
from triptych.training.plug_points import Judge, Live, Port, Shape, Source

__all__ = ["Judge", "Keep", "Live", "Part", "Port", "Shape", "Source", "Stage", "check_part"]


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
    if on_policy and keep.buffer != "none":
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
