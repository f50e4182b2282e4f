"""Session likelihoods: what the objective layer sees of a generative recommender.

Shapes: B users (samples), K candidates a sample, N = C = all sessions of a batch, m items, U = m L codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import Sessions
from triptych.objectives import Input, LabelledLogLik, ListLogLik, LogLik, PairLogLik
from triptych.training.order import Draw, key

Kind = Literal["next", "pair", "list", "labelled"]
INPUT_OF: dict[str, type[Input]] = {
    "next": LogLik,
    "pair": PairLogLik,
    "list": ListLogLik,
    "labelled": LabelledLogLik,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A user's history and sessions that may follow it.

    history: item ids in time order, [n]. sessions: [K, m], -1 after a session's last item. seen: items of the
    history that each session may look at, [K]; less than n for sessions that were part of it ('next').
    relevance: of each; a pair's chosen session comes first. user: number, -1 = unknown.
    """

    id: str
    source: str
    kind: Kind
    history: Tensor
    sessions: Tensor
    seen: Tensor
    relevance: tuple[float, ...] = ()
    strength: float | None = None
    margin: float | None = None
    user: int = -1

    def __post_init__(self) -> None:
        num, length = len(self.sessions), len(self.history)
        if self.seen.shape != (num,) or bool((self.seen > length).any()):
            raise ValueError(f"{self.source}: seen should hold {num} counts of at most {length} items")
        if not num or bool((self.sessions[:, 0] < 0).any()):
            raise ValueError(f"{self.source}: every session needs an item")
        if self.kind == "pair" and num != 2:
            raise ValueError(f"{self.source}: a pair has 2 sessions, not {num}")

    @property
    def cost(self) -> int:
        """Tokens of history and sessions, for batches of similar length."""
        return len(self.history) + self.sessions.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBatch:
    """Histories and sessions. slots, mask: [B, K] index of each sample's sessions among N; see `TextBatch`.

    share: [N] weight of each session in its sample's loss, for samples of many sessions ('next').
    """

    kind: Kind
    history: Jagged
    sessions: Sessions
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    counts: Tensor
    slots: Tensor
    mask: Tensor
    relevance: Tensor
    share: Tensor
    strength: Tensor | None
    margin: Tensor | None

    def to(self, device: torch.device) -> SessionBatch:
        """The batch on a device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, history=self.history.to(device), sessions=self.sessions.to(device), **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Examples of one kind -> SessionBatch.

    levels: codes of an item, 1 for SASRec. per_sample: for 'next', what the number of a sample's sessions is
    divided by, the mean over the data: then every position weighs the same, whichever user it is of. crop:
    largest share of a history's oldest items that a draw leaves out, see `cropped`.
    """

    levels: int
    per_sample: float = 1.0
    crop: float = 0.0

    def __call__(self, examples: Sequence[Example], draws: Sequence[Draw] = ()) -> SessionBatch:
        """One batch; ValueError when the examples are not all of one kind."""
        if self.crop:
            examples = [
                cropped(e, self.crop, torch.Generator().manual_seed(key("crop", draw.seed)))
                for e, draw in zip(examples, draws, strict=True)
            ]
        kind = examples[0].kind
        if any(e.kind != kind for e in examples):
            kinds = sorted({e.kind for e in examples})
            raise ValueError(f"a batch needs examples of one kind, not {kinds}")
        numbers = [len(e.sessions) for e in examples]
        longest = max(e.sessions.shape[1] for e in examples)
        items = torch.cat([_widened(e.sessions, longest) for e in examples])
        user = torch.repeat_interleave(torch.tensor(numbers))
        slots, mask = _slots(numbers)
        relevance = torch.zeros(slots.shape)
        for i, e in enumerate(examples):
            relevance[i, : len(e.relevance)] = torch.tensor(e.relevance)
        return SessionBatch(
            kind=kind,
            history=Jagged.of([e.history for e in examples], torch.tensor([e.user for e in examples])),
            sessions=Sessions(
                items=items, user=user, seen=torch.cat([e.seen for e in examples]), most=max(numbers)
            ),
            keys=tuple(k for e in examples for k in _keys(e)),
            ids=tuple(e.id for e in examples),
            counts=(items >= 0).sum(-1).float() * self.levels,
            slots=slots,
            mask=mask,
            relevance=relevance,
            share=torch.full((len(items),), 1 / self.per_sample),
            strength=_column([e.strength for e in examples]),
            margin=_column([e.margin for e in examples]),
        )


def cropped(example: Example, share: float, generator: torch.Generator) -> Example:
    """The example without the oldest items of its history: a uniformly random number up to `share` of them.

    Sessions that would see nothing are left out; where they all would, the example stays as it is.
    """
    drop = int(torch.rand((), generator=generator) * share * len(example.history))
    kept = example.seen > drop
    if not drop or not bool(kept.any()):
        return example
    return replace(
        example,
        history=example.history[drop:],
        sessions=example.sessions[kept],
        seen=example.seen[kept] - drop,
        relevance=tuple(r for r, keep in zip(example.relevance, kept.tolist(), strict=False) if keep),
    )


@dataclass(frozen=True, slots=True)
class SessionLikelihood:
    """Sum over a session's items and levels of log p(code | history, earlier codes); count = its codes.

    Log-probs are over each level's whole codebook: the probability of a semantic id, not of one among legal
    ones, so a policy and its reference share their normalisation, and beam scores are such log-probs.
    """

    def __call__(
        self,
        policy: Callable[[Jagged, Sessions], Tensor],
        batch: SessionBatch,
        generator: torch.Generator | None = None,
    ) -> Input:
        """LogLik, PairLogLik, ListLogLik or LabelledLogLik of the batch, without a reference."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(
        self,
        policy: Callable[[Jagged, Sessions], Tensor],
        batch: SessionBatch,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-prob of every code of every session, [N, U]."""
        return policy(batch.history, batch.sessions)

    def assemble(self, terms: Tensor, batch: SessionBatch) -> Input:
        """The objective's input from per-code log-probs [N, U], summed in float32 (float64 stays)."""
        dtype = terms.dtype if terms.dtype == torch.float64 else torch.float32
        logp_N = terms.sum(-1, dtype=dtype)
        if batch.kind == "next":
            return LogLik(logp_N, batch.counts)
        logp, count = logp_N[batch.slots], batch.counts[batch.slots]
        if batch.kind == "pair":
            pair = (LogLik(logp[:, i], count[:, i]) for i in (0, 1))
            return PairLogLik(*pair, strength=batch.strength, margin=batch.margin)
        if batch.kind == "list":
            return ListLogLik(LogLik(logp, count), batch.relevance, batch.mask)
        return LabelledLogLik(LogLik(logp[:, 0], count[:, 0]), batch.relevance[:, 0] > 0)


def per_sample(rows: Tensor, batch: SessionBatch) -> Tensor:
    """Rows of the objective -> samples: sessions [N] of 'next' data summed by user with their share, [B]."""
    if batch.kind != "next":
        return rows
    out = rows.new_zeros(len(batch.ids))
    return out.index_add(0, batch.sessions.user, rows * batch.share.to(rows.dtype))


def _widened(sessions: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(sessions, (0, length - sessions.shape[1]), value=-1)


def candidate_key(user: int, history: Tensor, session: Tensor) -> str:
    """SHA-256 of what is scored: the user, the history that is seen, and the session's items."""
    items = [i for i in session.tolist() if i >= 0]
    return hashlib.sha256(f"{user}\x1f{history.tolist()}\x1f{items}".encode()).hexdigest()


def _keys(example: Example) -> list[str]:
    rows = zip(example.sessions, example.seen.tolist(), strict=True)
    return [candidate_key(example.user, example.history[:seen], session) for session, seen in rows]


def _slots(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor(numbers)
    steps = torch.arange(int(counts.max()))
    mask = steps < counts.unsqueeze(-1)
    return torch.where(mask, (counts.cumsum(0) - counts).unsqueeze(-1) + steps, 0), mask


def _column(values: Sequence[float | None]) -> Tensor | None:
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        raise ValueError("strength and margin must be given for every example of a batch or for none")
    return torch.tensor(values, dtype=torch.float32)
