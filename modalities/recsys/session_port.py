"""A recommender as the rounds see it: requests and sessions in, log-probs of codes out.

Shapes: C candidates of a batch, U = m L codes of the longest session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.likelihood import (
    Collator,
    Example,
    SessionBatch,
    SessionLikelihood,
    candidate_key,
)
from triptych.modalities.recsys.requests import Request, Shown, pack, unpack
from triptych.modalities.recsys.trie import Trie


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPort:
    """Satisfies `training.stages.Port`. Candidates of a request share its history, which is encoded once.

    trie: of the catalogue. items: names. window: items of history that the model looks at. num_items: m.
    """

    trie: Trie
    items: tuple[str, ...]
    window: int
    num_items: int
    bound: bool = False

    @property
    def levels(self) -> int:
        """L."""
        return len(self.trie.levels)

    def seen(self, request: Request) -> Tensor:
        """The items of the history that the model looks at."""
        return request.history[-self.window :]

    def histories(self, requests: Sequence[Request]) -> Jagged:
        """The histories as the model reads them."""
        return Jagged.of([self.seen(r) for r in requests], torch.tensor([r.owner for r in requests]))

    def key(self, context: Request, candidate: Shown) -> str:
        """Content hash of a session after its history."""
        return candidate_key(context.owner, self.seen(context), candidate.items)

    def length(self, context: Request, candidates: Sequence[Shown]) -> int:
        """Tokens of the history and of all sessions."""
        return len(self.seen(context)) + sum(len(c.items) for c in candidates) * (self.levels + 1)

    def collate(
        self, items: Sequence[tuple[Request, Sequence[Shown]]], seeds: Sequence[int] = ()
    ) -> SessionBatch:
        """One batch; sessions have no randomness, so seeds are not drawn from."""
        return Collator(levels=self.levels)([self._example(request, shown) for request, shown in items])

    def _example(self, request: Request, shown: Sequence[Shown]) -> Example:
        history = self.seen(request)
        return Example(
            id=request.key,
            source=f"user {request.user}",
            kind="list",
            history=history,
            sessions=torch.stack([s.items for s in shown]),
            seen=torch.full((len(shown),), len(history)),
            user=request.owner,
        )

    def terms(
        self,
        policy: Callable[..., Tensor],
        batch: SessionBatch,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-prob of every code of every session over its whole codebook, [C, U]."""
        return SessionLikelihood().terms(policy, batch, generator)

    def readouts(self, policy: Any, batch: SessionBatch, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` alone; ValueError for anything else."""
        if names:
            raise ValueError(f"a session model gives no {', '.join(sorted(names))} of its codes")
        return {"logp": self.terms(policy, batch)}

    def pack(self, record: Request | Shown) -> Mapping[str, Any]:
        """See `requests.pack`."""
        return pack(record)

    def unpack(self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Request | Shown:
        """The record that was packed."""
        return unpack(kind, packed)
