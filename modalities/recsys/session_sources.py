"""Where the sessions of rounds come from: beams of the policy, draws from it, or what users really had.

Shapes: U requests, K candidates of one, m items, S = m L codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from triptych.modalities.recsys.beams import Beams, Within, beam_search
from triptych.modalities.recsys.decoding import begin
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import SessionPolicy
from triptych.modalities.recsys.requests import Request, Shown, seeds_of
from triptych.modalities.recsys.session_port import SessionPort
from triptych.modalities.recsys.stochastic import diverse, gumbel, sampled
from triptych.training.groups import Group, Verdict
from triptych.training.plugs import Registry
from triptych.training.references import unchanged, unwrapped
from triptych.training.stages import Live, Source

SOURCES: Registry[Source] = Registry("source")
Search = Callable[..., Beams]


def search(
    policy: Any, port: SessionPort, requests: Sequence[Request], how: Search, *, batch_size: int = 64
) -> list[Beams]:
    """Sessions of every request, without the items of its history, batch after batch, on the CPU.

    how: (decoding, trie, requests=, num_items=, within=) -> Beams of a batch.
    """
    model = unwrapped(policy)
    assert isinstance(model, SessionPolicy)
    device = next(model.parameters()).device
    trie = port.trie.to(device)
    found = []
    with unchanged(model), torch.no_grad():
        for start in range(0, len(requests), batch_size):
            block = requests[start : start + batch_size]
            history = port.histories(block).to(device)
            beams = how(
                begin(model, history),
                trie,
                requests=block,
                num_items=port.num_items,
                within=_owned(block, device),
            )
            found.append(beams.mapped(Tensor.cpu))
    return found


def _owned(requests: Sequence[Request], device: torch.device) -> Within:
    """What the users have already: it is not recommended."""
    owned = Jagged.of([r.history for r in requests])
    return owned.offsets.to(device), owned.values.to(device)


def _groups(requests: Sequence[Request], found: Sequence[Beams], origin: str) -> list[Group]:
    """A group for every request, of the sessions that there are. ValueError for one without any."""
    groups: list[Group] = []
    rows = ((b.items_UWm[u], b.logp_UW[u], b.terms_UWS[u]) for b in found for u in range(len(b.logp_UW)))
    for request, (items, logp, terms) in zip(requests, rows, strict=True):
        there = logp.isfinite()
        if not bool(there.any()):
            raise ValueError(f"request {request.key}: the user has every item, or all but too few")
        groups.append(
            Group(
                key=request.key,
                context=request,
                candidates=tuple(Shown(items=session) for session in items[there]),
                mask=torch.ones(terms[there].shape, dtype=torch.bool),
                unit="slot",
                logp=terms[there].float(),
                origin=(origin,) * int(there.sum()),
            )
        )
    return groups


@SOURCES.register("beams")
@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSessions:
    """The sessions that the policy would serve: `num_candidates` of them by beam search, likeliest first.

    OneRec's self-hard candidates (2502.18965, 3.3): N = 128. They are no samples, so objectives that need
    such are refused; their scores are log-probs of the policy that searched, and serve as those of the
    reference that it becomes. how: 'plain'; 'diverse', in `groups` groups kept apart by `strength` (see
    `stochastic.diverse`), as plain beams are near copies; 'gumbel', draws without replacement.
    """

    num_candidates: int = 128
    how: Literal["plain", "diverse", "gumbel"] = "plain"
    groups: int = 4
    strength: float = 1.0
    batch_size: int = 64
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 2: a best and a worst")
        if self.how == "diverse" and self.num_candidates % self.groups:
            raise ValueError(f"groups={self.groups} must divide num_candidates={self.num_candidates}")

    def __call__(self, contexts: Sequence[Request], live: Live) -> list[Group]:
        """One group a request."""

        def how(decoding: Any, trie: Any, *, requests: Sequence[Request], **where: Any) -> Beams:
            if self.how == "gumbel":
                seeds = seeds_of(requests, "beams", live.seed, live.stage, live.round).to(trie.paths.device)
                found = gumbel(decoding, trie, width=self.num_candidates, seeds=seeds, **where)
                return found.beams
            if self.how == "diverse":
                options = {"groups": self.groups, "strength": self.strength}
                return diverse(decoding, trie, width=self.num_candidates, **options, **where)
            return beam_search(decoding, trie, width=self.num_candidates, **where)

        found = search(live.policy, live.port, contexts, how, batch_size=self.batch_size)
        return _groups(contexts, found, "beam")


@SOURCES.register("policy")
@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSessions:
    """`num_candidates` independent draws from the policy, with their log-probs.

    What is drawn from is the policy over legal codes (real items that the user does not have, none twice);
    log-probs are over whole codebooks, as everywhere. Their gap, the log of the legal mass along a session,
    is reported as `legal_mass`: near 1, the two are the same policy.
    """

    num_candidates: int = 16
    batch_size: int = 64
    fresh: ClassVar[bool] = True
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"logp"})

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 1")

    def __call__(self, contexts: Sequence[Request], live: Live) -> list[Group]:
        """One group a request."""
        masses: list[Tensor] = []

        def how(decoding: Any, trie: Any, *, requests: Sequence[Request], **where: Any) -> Beams:
            seeds = seeds_of(requests, "policy", live.seed, live.stage, live.round).to(trie.paths.device)
            drawn = sampled(decoding, trie, num=self.num_candidates, seeds=seeds, **where)
            masses.append((drawn.beams.logp_UW - drawn.legal_UW).exp().nanmean())
            return drawn.beams

        found = search(live.policy, live.port, contexts, how, batch_size=self.batch_size)
        if masses:
            live.metrics["legal_mass"] = float(torch.stack(masses).mean())
        return _groups(contexts, found, "policy")


@SOURCES.register("followed")
@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedSessions:
    """The session that the user really had next, one candidate of score 1: for next-token prediction."""

    num_candidates: ClassVar[int] = 1
    fresh: ClassVar[bool] = False
    groups_per_context: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"verdict"})

    def __call__(self, contexts: Sequence[Request], live: Live) -> list[Group]:
        """One group a request; ValueError for one whose user had nothing after it."""
        found = []
        for request in contexts:
            if not len(request.followed) or int(request.followed[0]) < 0:
                raise ValueError(f"request {request.key} has no session that followed it")
            there = (request.followed >= 0).repeat_interleave(live.port.levels)
            group = Group(
                key=request.key,
                context=request,
                candidates=(Shown(items=request.followed),),
                mask=there.unsqueeze(0),
                unit="slot",
                origin=("data",),
            )
            found.append(replace(group, verdict=Verdict(score=torch.ones(1))))
        return found
