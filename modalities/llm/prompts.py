"""The records of text rounds: prompts to complete, and completions as they were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """Tokens after a prompt. ids: int32, the end-of-sequence token included where one was drawn.

    text: decoded without special tokens. own: bool a token, False for those that others put in between (the
    prompt of a second turn); None: all own. turns, steps: index of the turn or reasoning step of each token.
    finished: whether it came to an end by itself.
    """

    ids: np.ndarray
    text: str
    own: np.ndarray | None = None
    turns: np.ndarray | None = None
    steps: np.ndarray | None = None
    finished: bool = True

    def turn_texts(self) -> tuple[str, ...]:
        """The text of each turn; one for a completion of a single turn. Turns are divided by TURN_BREAK."""
        return tuple(self.text.split(TURN_BREAK))


TURN_BREAK = "\x1e"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What is to be completed. ids: int32 token ids, a chat template and any prefix of an answer included.

    key: content hash, names it in the run's randomness. text: the user's words, for judges and people.
    prefix: text of the answer so far, where ids hold one (tree search). answer: what a verifier compares
    with. fields: further fields of the record, JSON values, that judges may read. candidates, relevance: of
    data; proposal: their log-probs under the policy that wrote them, where known. source: file and record.
    """

    key: str
    ids: np.ndarray
    text: str
    prefix: str = ""
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    candidates: tuple[Completion, ...] = ()
    relevance: tuple[float, ...] = ()
    source: str = ""

    @property
    def prompt_ids(self) -> np.ndarray:
        """As `rows.Context` calls it."""
        return self.ids


def pack(record: Prompt | Completion) -> dict[str, Any]:
    """A record as arrays and JSON values."""
    out: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name == "candidates":
            value = [pack(c) for c in value]
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def unpack_completion(packed: Mapping[str, Any]) -> Completion:
    """The completion that `pack` packed."""
    return Completion(**packed)


def unpack_prompt(packed: Mapping[str, Any]) -> Prompt:
    """The prompt that `pack` packed."""
    candidates: Sequence[Mapping[str, Any]] = packed["candidates"]
    rest = {k: v for k, v in packed.items() if k not in ("candidates", "relevance")}
    return Prompt(
        **rest,
        candidates=tuple(unpack_completion(c) for c in candidates),
        relevance=tuple(packed["relevance"]),
    )
