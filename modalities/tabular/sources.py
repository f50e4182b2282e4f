"""Where the candidates of tabular rounds come from. Every distribution is enumerated: nothing is approximate.

N candidates that a context has, K drawn, U units, S nodes, A actions. Groups hold the policy's own log-probs
wherever the candidates may be its samples; `proposal` says what really drew them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from triptych.modalities.tabular.policy import PADDING, TabularPolicy, nodes_before
from triptych.modalities.tabular.port import Arm, Context, TabularBatch
from triptych.training.groups import Group, Unit, Verdict
from triptych.training.plugs import Registry
from triptych.training.references import unwrapped
from triptych.training.stages import Live, Source

SOURCES: Registry[Source] = Registry("source")


@dataclass(frozen=True, slots=True)
class Listing:
    """Every candidate of a context with its log-prob per unit under the policy, [N, U], on the CPU."""

    context: Context
    arms: tuple[Arm, ...]
    batch: TabularBatch
    terms: Tensor

    @property
    def logp(self) -> Tensor:
        """Log-prob of each candidate, [N]."""
        return self.terms.sum(-1)

    def reference(self, live: Live, slot: str) -> Tensor:
        """Log-prob of each candidate under a reference, [N]."""
        return along(conditionals(live, slot), self).sum(-1)

    def group(self, chosen: Sequence[int], *, unit: Unit = "token", drawn: bool = True, **rest: Any) -> Group:
        """The chosen candidates as a group; drawn: whether they have log-probs of drawing."""
        index = torch.as_tensor(chosen)
        width = int(self.batch.counts[index].max())
        mask = (self.batch.actions != PADDING)[index, :width]
        turn = torch.arange(mask.shape[1]).expand(mask.shape) if unit == "turn" else None
        return Group(
            key=self.context.key,
            context=self.context,
            candidates=tuple(self.arms[i] for i in index.tolist()),
            mask=mask,
            unit=unit,
            logp=self.terms[index, :width].float() if drawn else None,
            turn=turn,
            depth=len(self.context.prefix),
            **rest,
        )


@torch.no_grad()
def listing(context: Context, live: Live) -> Listing:
    """Everything that the policy may answer in a context."""
    policy = _tabular(live.policy)
    arms = tuple(Arm(actions) for actions in policy.all_candidates(context.prefix))
    batch: TabularBatch = live.port.collate([(context, arms)], [0])
    terms = live.port.terms(policy, batch.to(live.device)).cpu()
    return Listing(context, arms, batch, terms)


def draw(logp: Tensor, num: int, generator: torch.Generator) -> list[int]:
    """Indices of `num` independent draws from log-probs [N]."""
    if num == 0:
        return []
    return torch.multinomial(logp.double().exp(), num, replacement=True, generator=generator).tolist()


@torch.no_grad()
def conditionals(live: Live, slot: str | None = None) -> Tensor:
    """Log-prob of every action at every node, [X, S, A], of the policy or of the reference in a slot.

    ValueError for a slot that the round does not have.
    """
    if slot is None:
        return _tabular(live.policy).conditionals().cpu()
    if slot not in live.references:
        raise ValueError(f"no reference '{slot}'; this round has {', '.join(live.references) or 'none'}")
    with live.references[slot].active(live.policy) as module:
        return _tabular(module).conditionals().cpu()


def along(table: Tensor, listed: Listing) -> Tensor:
    """Values of a table [X, S, A] at the actions of every candidate, [N, U], 0 at padding."""
    actions = listed.batch.actions
    nodes = nodes_before(actions, listed.batch.starts, table.shape[-1])
    values = table[listed.batch.contexts.unsqueeze(-1), nodes, actions.clamp(min=0)]
    return torch.where(actions != PADDING, values, 0.0)


def blended(listed: Listing, live: Live, *, slot: str, coefficient: float, level: str) -> Tensor:
    """Log-probs of policy^(1 - c) ref^c, normalised over whole candidates or at each unit, [N]."""
    table = torch.lerp(conditionals(live), conditionals(live, slot), coefficient)
    if level == "unit":
        return along(table.log_softmax(-1), listed).sum(-1)
    return along(table, listed).sum(-1).log_softmax(0)


def _tabular(policy: nn.Module) -> TabularPolicy:
    found = unwrapped(policy)
    assert isinstance(found, TabularPolicy)
    return found


@SOURCES.register("on")
@dataclass(frozen=True, slots=True, kw_only=True)
class On:
    """num_candidates samples of the policy as it is, then `calibration` ones of the reference in `slot`."""

    num_candidates: int = 2
    calibration: int = 0
    slot: str = "frozen"
    unit: Unit = "token"
    groups_per_context: ClassVar[int] = 1

    @property
    def fresh(self) -> bool:
        """Only without samples of the reference."""
        return self.calibration == 0

    @property
    def own_fresh(self) -> bool:
        """The candidates of origin 'policy' are."""
        return True

    @property
    def provides(self) -> frozenset[str]:
        """Log-probs; with samples of the reference, 'calibration' and the proposals."""
        return frozenset({"logp"} | ({"calibration", "proposal"} if self.calibration else set()))

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context, the policy's own samples first."""
        return [self._one(listing(context, live), live) for context in contexts]

    def _one(self, listed: Listing, live: Live) -> Group:
        name = listed.context.key
        own = draw(listed.logp, self.num_candidates, live.generator(name, "on"))
        if not self.calibration:
            return listed.group(own, unit=self.unit)
        ref = listed.reference(live, self.slot)
        other = draw(ref, self.calibration, live.generator(name, "calibration"))
        return listed.group(
            own + other,
            unit=self.unit,
            proposal=torch.cat([listed.logp[own], ref[other]]).float(),
            origin=("policy",) * len(own) + ("reference",) * len(other),
        )


@SOURCES.register("on_reference")
@dataclass(frozen=True, slots=True, kw_only=True)
class OnReference:
    """Samples of the reference in `slot`; their log-probs are the policy's, `proposal` the reference's."""

    num_candidates: int = 2
    slot: str = "frozen"
    unit: Unit = "token"
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp", "proposal", "calibration"})

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context."""
        groups: list[Group] = []
        for listed in (listing(context, live) for context in contexts):
            ref = listed.reference(live, self.slot)
            chosen = draw(ref, self.num_candidates, live.generator(listed.context.key, "reference"))
            origin = ("reference",) * len(chosen)
            groups.append(listed.group(chosen, unit=self.unit, proposal=ref[chosen].float(), origin=origin))
        return groups


@SOURCES.register("blend")
@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Samples of the geometric mixture policy^(1 - coefficient) ref^coefficient (IPO-MD, Nash-MD).

    level: normalised over whole candidates ('sequence', the papers' form) or at each unit ('unit', what can
    be drawn from a language model). own: how many of the candidates, the first ones, are the policy's own.
    """

    coefficient: float
    num_candidates: int = 2
    own: int = 0
    slot: str = "frozen"
    level: Literal["sequence", "unit"] = "sequence"
    unit: Unit = "token"
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp", "proposal"})

    @property
    def own_fresh(self) -> bool:
        """The candidates of origin 'policy' are, where there are any."""
        return self.own > 0

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient <= 1:
            raise ValueError(f"coefficient={self.coefficient} must be in [0, 1]")
        if not 0 <= self.own < self.num_candidates:
            raise ValueError(
                f"own={self.own} must be at least 0 and below num_candidates={self.num_candidates}"
            )
        if self.level not in ("sequence", "unit"):
            raise ValueError(f"level={self.level!r} is not one of sequence, unit")

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context."""
        groups: list[Group] = []
        for listed in (listing(context, live) for context in contexts):
            mixed = blended(listed, live, slot=self.slot, coefficient=self.coefficient, level=self.level)
            name = listed.context.key
            mine = draw(listed.logp, self.own, live.generator(name, "on"))
            other = draw(mixed, self.num_candidates - self.own, live.generator(name, "blend"))
            proposal = torch.cat([listed.logp[mine], mixed[other]]).float()
            origin = ("policy",) * len(mine) + ("blend",) * len(other)
            groups.append(listed.group(mine + other, unit=self.unit, proposal=proposal, origin=origin))
        return groups


@SOURCES.register("data")
@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The context's own candidates, with their relevance as scores."""

    num_candidates: int = 2
    unit: Unit = "token"
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"verdict"})

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context; ValueError for a context without graded candidates, or with too many."""
        groups: list[Group] = []
        for context in contexts:
            size = len(context.candidates)
            if not 0 < size <= self.num_candidates or len(context.relevance) != size:
                raise ValueError(
                    f"context {context.key} has {size} candidates and {len(context.relevance)} relevances; "
                    f"expected 1 to {self.num_candidates} of each"
                )
            listed = listing(context, live)
            places = {arm: i for i, arm in enumerate(listed.arms)}
            if unknown := [arm.actions for arm in context.candidates if arm not in places]:
                raise ValueError(f"context {context.key}: {unknown[0]} is not a candidate of this policy")
            chosen = [places[arm] for arm in context.candidates]
            verdict = Verdict(score=torch.tensor(context.relevance))
            origin = ("data",) * size
            groups.append(listed.group(chosen, unit=self.unit, drawn=False, origin=origin, verdict=verdict))
        return groups


@SOURCES.register("everything")
@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """Every candidate once: sums over the group are exact sums over everything that there is.

    logp: the policy's. The proposal is uniform, so importance weights to it are exact, not estimates.
    num_candidates: the most that a context may have.
    """

    num_candidates: int = 64
    unit: Unit = "token"
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp", "proposal"})

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context; ValueError where there are more than num_candidates."""
        groups: list[Group] = []
        for listed in (listing(context, live) for context in contexts):
            size = len(listed.arms)
            if size > self.num_candidates:
                raise ValueError(
                    f"context {listed.context.key} has {size} candidates, more than {self.num_candidates}"
                )
            uniform = torch.full((size,), -math.log(size))
            groups.append(
                listed.group(range(size), unit=self.unit, proposal=uniform, origin=("everything",) * size)
            )
        return groups


@SOURCES.register("turns")
@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Samples of the policy whose actions are turns: an attempt, then another that has seen it (SCoRe)."""

    num_candidates: int = 2
    fresh: ClassVar[bool] = True
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp"})

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context, unit 'turn'."""
        return On(num_candidates=self.num_candidates, unit="turn")(contexts, live)


@SOURCES.register("beams")
@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """The most likely candidates, likeliest first; equal ones in order. They are no samples."""

    num_candidates: int = 2
    unit: Unit = "token"
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, contexts: Sequence[Context], live: Live) -> list[Group]:
        """One group a context, of all its candidates where it has fewer."""
        groups: list[Group] = []
        for listed in (listing(context, live) for context in contexts):
            best = listed.logp.argsort(descending=True, stable=True)[: self.num_candidates].tolist()
            origin = ("beam",) * len(best)
            groups.append(listed.group(best, unit=self.unit, drawn=False, origin=origin))
        return groups
