"""Language models as the rounds see them: prompts and completions in, log-probs of tokens out.

Shapes: C candidates of a batch, U tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.llm.prompts import Completion, Prompt, pack, unpack_completion, unpack_prompt
from triptych.modalities.llm.rows import RowCost, Rows, Sharing, candidate_key, make_rows


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Rows of tokens; candidates in the order of their prompts."""

    rows: Rows
    ids: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Content hash of each candidate, [C]."""
        return self.rows.keys

    @property
    def counts(self) -> Tensor:
        """Number of tokens of each candidate, [C]."""
        return self.rows.count

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on a device."""
        return replace(self, rows=self.rows.to(device))


@dataclass(frozen=True, slots=True)
class _Context:
    prompt_ids: np.ndarray
    candidate_ids: Sequence[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPort:
    """Satisfies `training.stages.Port`. Completions of a prompt share its work in one row where that pays."""

    tokenizer: Any
    cost: RowCost
    sharing: Sharing = "auto"
    bound: bool = False

    def key(self, context: Prompt, candidate: Completion) -> str:
        """Content hash of the completion after its prompt."""
        return candidate_key(context.ids, candidate.ids)

    def length(self, context: Prompt, candidates: Sequence[Completion]) -> int:
        """Tokens of the prompt and of all completions."""
        return len(context.ids) + sum(len(c.ids) for c in candidates)

    def collate(
        self, items: Sequence[tuple[Prompt, Sequence[Completion]]], seeds: Sequence[int] = ()
    ) -> PromptBatch:
        """Rows of tokens; text has no randomness, so seeds are not drawn from."""
        contexts = [_Context(p.ids, [c.ids for c in cs]) for p, cs in items]
        rows = make_rows(contexts, sharing=self.sharing, cost=self.cost, pad_id=self.tokenizer.pad_token_id)
        return PromptBatch(rows, tuple(p.key for p, _ in items))

    def terms(self, policy: Any, batch: PromptBatch, generator: torch.Generator | None = None) -> Tensor:
        """Log-prob of every token of every completion, [C, U] float32."""
        return policy(batch.rows)

    def readouts(self, policy: Any, batch: PromptBatch, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` and the named ones of 'value', 'entropy', 'kl' per token, [C, U] each."""
        return policy(batch.rows, tuple(sorted(names)))

    def pack(self, record: Prompt | Completion) -> Mapping[str, Any]:
        """See `prompts.pack`."""
        return pack(record)

    def unpack(self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Prompt | Completion:
        """The record that was packed."""
        return unpack_prompt(packed) if kind == "context" else unpack_completion(packed)
