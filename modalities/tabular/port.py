"""What tabular policies bring to the rounds: records, batches, likelihoods, checkpoints.

C candidates, U units, X contexts, S nodes, A actions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.tabular.policy import PADDING, as_actions, node_of, nodes_before
from triptych.objectives.kl import exact_kl
from triptych.training.references import unwrapped


@dataclass(frozen=True, slots=True)
class Arm:
    """A candidate: the actions that follow the context's prefix."""

    actions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is to be completed. key: its name in the run's randomness. index: its row of the table.

    prefix: actions that are there already: the path to a step in a tree, an answer to improve. candidates,
    relevance: of data.
    """

    key: str
    index: int = 0
    prefix: tuple[int, ...] = ()
    candidates: tuple[Arm, ...] = ()
    relevance: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TabularBatch:
    """Candidates of some contexts. actions: [C, U]; contexts: row of the table, starts: first node, [C]."""

    keys: tuple[str, ...]
    ids: tuple[str, ...]
    counts: Tensor
    actions: Tensor
    contexts: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> TabularBatch:
        """The batch on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("keys", "ids")
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class TabularPort:
    """The port of `TabularPolicy`, of A actions. reference: log-probs that 'kl' is measured to, [X, S, A]."""

    num_actions: int
    reference: Tensor | None = None

    @property
    def bound(self) -> bool:
        """False: these are exact log-probs."""
        return False

    def key(self, context: Context, candidate: Arm) -> str:
        """SHA-256 of the context's row and prefix and of the actions."""
        text = f"{context.index}\x1f{context.prefix}\x1f{candidate.actions}"
        return hashlib.sha256(text.encode()).hexdigest()

    def length(self, context: Context, candidates: Sequence[Arm]) -> int:
        """Actions in all."""
        return sum(len(c.actions) for c in candidates)

    def collate(self, items: Sequence[tuple[Context, Sequence[Arm]]], seeds: Sequence[int]) -> TabularBatch:
        """Contexts with their candidates, [C] in all; nothing is random. ValueError for unknown actions."""
        flat = [(context, arm) for context, arms in items for arm in arms]
        for context, arm in flat:
            if not arm.actions or any(a not in range(self.num_actions) for a in arm.actions):
                raise ValueError(
                    f"context {context.key}: candidate {arm.actions} should be of actions "
                    f"from 0 to {self.num_actions - 1}"
                )
        return TabularBatch(
            keys=tuple(self.key(context, arm) for context, arm in flat),
            ids=tuple(context.key for context, _ in items),
            counts=torch.tensor([len(arm.actions) for _, arm in flat], dtype=torch.float32),
            actions=as_actions([arm.actions for _, arm in flat]),
            contexts=torch.tensor([context.index for context, _ in flat]),
            starts=torch.tensor([node_of(context.prefix, self.num_actions) for context, _ in flat]),
        )

    def terms(self, policy: Any, batch: TabularBatch, generator: torch.Generator | None = None) -> Tensor:
        """Log-prob of each action, [C, U], zero-padded."""
        return policy(batch.actions, batch.contexts, batch.starts)

    def readouts(self, policy: Any, batch: TabularBatch, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` and the named values at each action, [C, U]: 'value', 'entropy', 'kl', all exact.

        ValueError for one that this policy, or 'kl' that this port, does not have.
        """
        asked = tuple(sorted({"entropy"} | names - {"kl"}))
        values = policy(batch.actions, batch.contexts, batch.starts, asked)
        found = dict(zip(("logp", *asked), values, strict=True))
        if "kl" in names:
            found["kl"] = self._kl(unwrapped(policy), batch)
        return {name: found[name] for name in ("logp", *sorted(names))}

    def _kl(self, policy: Any, batch: TabularBatch) -> Tensor:
        if self.reference is None:
            raise ValueError("this port has no reference to measure 'kl' to; give it one (reference: ...)")
        nodes = nodes_before(batch.actions, batch.starts, self.num_actions)
        kl_XS = exact_kl(policy.conditionals(), self.reference.to(policy.logits))
        return torch.where(batch.actions != PADDING, kl_XS[batch.contexts.unsqueeze(-1), nodes], 0.0)

    def pack(self, record: Context | Arm) -> Mapping[str, Any]:
        """A record as JSON values."""
        if isinstance(record, Arm):
            return {"actions": list(record.actions)}
        packed: dict[str, Any] = {"key": record.key, "index": record.index, "prefix": list(record.prefix)}
        packed["candidates"] = [list(arm.actions) for arm in record.candidates]
        return packed | {"relevance": list(record.relevance)}

    def unpack(self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Context | Arm:
        """The record that was packed."""
        if kind == "candidate":
            return Arm(tuple(packed["actions"]))
        return Context(
            key=packed["key"],
            index=packed["index"],
            prefix=tuple(packed["prefix"]),
            candidates=tuple(Arm(tuple(actions)) for actions in packed["candidates"]),
            relevance=tuple(packed["relevance"]),
        )
