"""Where the candidates of text rounds come from: the policy, a reference, both, or the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from triptych.modalities.llm.prompts import Prompt
from triptych.modalities.llm.sampling import Blend
from triptych.modalities.llm.sampling_groups import (
    complete,
    completion_group,
    draw_for,
    drawing_of,
    drawn_group,
    end_ids,
    is_fresh,
    own_policy,
    policy_of,
    reference_of,
    seeds_of,
)
from triptych.modalities.llm.sampling_turns import Turns
from triptych.training.groups import Group, Verdict, pad_units
from triptych.training.order import key
from triptych.training.plugs import PlugConfig, Registry
from triptych.training.stages import Live, Source

__all__ = [
    "SOURCES",
    "FromBlend",
    "FromData",
    "FromPolicy",
    "FromReference",
    "Mixed",
    "Turns",
    "complete",
    "end_ids",
    "own_temperatures",
]

SOURCES: Registry[Source] = Registry("source")
SOURCES.register("turns")(Turns)


@SOURCES.register("policy")
@dataclass(frozen=True, slots=True, kw_only=True)
class FromPolicy:
    """Samples of the policy as it is; with top_p or top_k, or greedy, of another distribution."""

    num_candidates: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 32
    groups_per_context: ClassVar[int] = 1

    def __post_init__(self) -> None:
        drawing_of(self)

    @property
    def fresh(self) -> bool:
        """See `Source`."""
        return is_fresh(drawing_of(self))

    @property
    def provides(self) -> frozenset[str]:
        """Log-probs; proposals where another distribution than the policy's drew."""
        return frozenset({"logp"} if self.fresh else {"logp", "proposal"})

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context."""
        drawing = drawing_of(self)
        drawn = draw_for(
            [c.ids for c in contexts],
            own_policy(live, drawing),
            live,
            drawing=drawing,
            num_candidates=self.num_candidates,
            seeds=seeds_of(contexts, live, "policy"),
        )
        keep = {"origin": "policy", "with_logp": True, "with_proposal": not self.fresh}
        return [drawn_group(c, d, live.port.tokenizer, **keep) for c, d in zip(contexts, drawn, strict=True)]


@SOURCES.register("reference")
@dataclass(frozen=True, slots=True, kw_only=True)
class FromReference:
    """Samples of the reference in `slot`, with its log-probs as proposals and none of the policy's."""

    num_candidates: int
    max_new_tokens: int
    slot: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 32
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"proposal", "calibration"})

    def __post_init__(self) -> None:
        drawing_of(self)

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context."""
        with reference_of(live, self.slot).active(live.policy) as reference:
            drawn = draw_for(
                [c.ids for c in contexts],
                reference,
                live,
                drawing=drawing_of(self),
                num_candidates=self.num_candidates,
                seeds=seeds_of(contexts, live, "reference", self.slot),
            )
        keep = {"origin": "reference", "with_logp": False, "with_proposal": True}
        return [drawn_group(c, d, live.port.tokenizer, **keep) for c, d in zip(contexts, drawn, strict=True)]


@SOURCES.register("blend")
@dataclass(frozen=True, slots=True, kw_only=True)
class FromBlend:
    """Samples of policy^(1 - weight) ref^weight, normalised at each token (IPO-MD, Nash-MD); see `Blend`.

    Their log-probs are the policy's, their proposals the blend's.
    """

    num_candidates: int
    max_new_tokens: int
    weight: float
    slot: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 32
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp", "proposal"})

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be in (0, 1]; the policy alone is source 'policy'")
        drawing_of(self)

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context."""
        drawing = drawing_of(self)
        reference = reference_of(live, self.slot)
        drawn = draw_for(
            [c.ids for c in contexts],
            policy_of(live),
            live,
            drawing=drawing,
            num_candidates=self.num_candidates,
            seeds=seeds_of(contexts, live, "blend", self.slot),
            mix=Blend(weight=self.weight, reference=partial(reference.active, live.policy)),
        )
        keep = {"origin": "blend", "with_logp": True, "with_proposal": True}
        return [drawn_group(c, d, live.port.tokenizer, **keep) for c, d in zip(contexts, drawn, strict=True)]


@SOURCES.register("data")
@dataclass(frozen=True, slots=True, kw_only=True)
class FromData:
    """The prompts' own candidates, with their relevance as scores. num_candidates: the most that one has."""

    num_candidates: int
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"verdict"})

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 1")

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context; ValueError for a prompt without graded candidates, or with too many."""
        groups: list[Group] = []
        for context in contexts:
            size = len(context.candidates)
            if not 1 <= size <= self.num_candidates or len(context.relevance) != size:
                raise ValueError(
                    f"prompt {context.source or context.key} has {size} candidates and "
                    f"{len(context.relevance)} grades; num_candidates={self.num_candidates} allows 1 to "
                    f"{self.num_candidates} of each"
                )
            verdict = Verdict(score=torch.tensor(context.relevance, dtype=torch.float32))
            groups.append(completion_group(context, context.candidates, origin="data", verdict=verdict))
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTeacher:
    """The `num_candidates` best of the prompts' own candidates, for judges to grade among others'."""

    num_candidates: int = 1
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_teachers={self.num_candidates} must be at least 1")

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context; ValueError for a prompt with too few candidates."""
        groups: list[Group] = []
        for context in contexts:
            if len(context.candidates) < self.num_candidates:
                raise ValueError(
                    f"prompt {context.source or context.key} has {len(context.candidates)} answers in the "
                    f"data, and num_teachers={self.num_candidates}"
                )
            grades = context.relevance or (0.0,) * len(context.candidates)
            best = sorted(range(len(grades)), key=lambda i: -grades[i])[: self.num_candidates]
            groups.append(completion_group(context, [context.candidates[i] for i in best], origin="teacher"))
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Candidates of several sources in one group a context, in the order of the sources.

    Log-probs are given where a source gives the policy's, and are 0 elsewhere; proposals for all, where one
    source has them. Where some candidates were not drawn at all, as a teacher's, neither is there.
    """

    parts: tuple[Source, ...]
    groups_per_context: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a mixture needs at least two sources, not {len(self.parts)}")
        for part in self.parts:
            if part.groups_per_context != 1:
                raise ValueError(
                    f"source {type(part).__name__} makes several groups of a context and cannot be mixed"
                )

    @property
    def fresh(self) -> bool:
        """Only if all are."""
        return all(part.fresh for part in self.parts)

    @property
    def own_fresh(self) -> bool:
        """Whether the candidates of origin 'policy' are fresh."""
        return any(part.fresh for part in self.parts)

    @property
    def num_candidates(self) -> int:
        """See `Source`."""
        return sum(part.num_candidates for part in self.parts)

    @property
    def provides(self) -> frozenset[str]:
        """Calibration of one is that of all; log-probs and proposals as the class says."""
        given = [part.provides for part in self.parts]
        found = frozenset[str]().union(*given)
        drawn = all({"logp", "proposal"} & names for names in given)
        return found & frozenset({"calibration", "logp", "proposal"} if drawn else {"calibration"})

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context."""
        found = [
            # A seed of its own, so that two equal sources draw different candidates.
            part(contexts, replace(live, seed=key("part", live.seed, i)))
            for i, part in enumerate(self.parts)
        ]
        return [joined(groups) for groups in zip(*found, strict=True)]


def joined(groups: Sequence[Group]) -> Group:
    """Groups of one context as one, with the fields that `Mixed` promises; verdicts are left to the judge."""
    drawn = all(g.logp is not None or g.proposal is not None for g in groups)
    proposed = drawn and any(g.proposal is not None for g in groups)
    mask = _table(groups, "mask")
    assert mask is not None
    return Group(
        key=groups[0].key,
        context=groups[0].context,
        candidates=tuple(c for g in groups for c in g.candidates),
        mask=mask,
        logp=_table(groups, "logp") if drawn else None,
        proposal=torch.cat([g.drawn_logp() for g in groups]) if proposed else None,
        origin=tuple(o for g in groups for o in g.origin),
        turn=_table(groups, "turn"),
    )


def _table(groups: Sequence[Group], name: str) -> torch.Tensor | None:
    """A field [K, U] of all the groups, zeros for those without; None where all are without."""
    tables: list[torch.Tensor | None] = [getattr(g, name) for g in groups]
    known = [t for t in tables if t is not None]
    if not known:
        return None
    filled = [
        torch.zeros(g.mask.shape, dtype=known[0].dtype) if t is None else t
        for g, t in zip(groups, tables, strict=True)
    ]
    return pad_units([row for table in filled for row in table], max(t.shape[1] for t in filled))


def _part(config: PlugConfig | Mapping[str, Any]) -> Source:
    """A source from {name, options}."""
    if isinstance(config, PlugConfig):
        return SOURCES.build(config.name, config.options)
    if not isinstance(config, Mapping) or "name" not in config or not set(config) <= {"name", "options"}:
        raise ValueError(f"{config!r} is no source: it takes name and options")
    return SOURCES.build(config["name"], config.get("options"))


@SOURCES.register("mixed")
def mixed(*, sources: Sequence[PlugConfig | Mapping[str, Any]]) -> Mixed:
    """Candidates of several sources in one group; see `Mixed`."""
    return Mixed(parts=tuple(_part(config) for config in sources))


@SOURCES.register("with_teacher")
def with_teacher(*, source: PlugConfig | Mapping[str, Any], num_teachers: int = 1) -> Mixed:
    """Candidates of a source and the best `num_teachers` of the data's own, of origin 'teacher' (DNO)."""
    teacher: Any = FromTeacher(num_candidates=num_teachers)
    return Mixed(parts=(_part(source), teacher))


def own_temperatures(source: Source) -> frozenset[float]:
    """Temperatures at which it draws the policy's own samples: the policy must have the same."""
    if isinstance(source, Mixed):
        return frozenset[float]().union(*map(own_temperatures, source.parts))
    if isinstance(source, FromPolicy | Turns) and source.fresh:
        return frozenset({source.temperature})
    return frozenset()
