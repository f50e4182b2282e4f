"""Prompts of online rounds, from the same data section as preference data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triptych.modalities.llm.data import DataConfig, read_split, tokenise_records
from triptych.modalities.llm.instructions import instruction_records
from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.records import Record
from triptych.modalities.llm.reviews import clothing_review_pairs
from triptych.modalities.llm.tokenization import Example, Examples
from triptych.modalities.llm.turns import Text
from triptych.training.quarantine import Quarantine

INSTRUCTIONS, REVIEWS = "instructions", "clothing-reviews"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptData:
    """Prompts to draw for and held-out ones; clusters[i]: what held-out prompt i shares with others."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    clusters: tuple[str, ...]
    fingerprint: str


def load_prompts(
    config: DataConfig, tokenizer: Any, quarantine: Quarantine, *, seed: int, report: Callable[[str], None]
) -> PromptData:
    """Read, split and tokenise; records with candidates keep them. Errors as `load_data`'s."""
    train, held_out, layout = _records(config, quarantine, seed, report)
    made = [
        _prompts(tokenise_records(part, config, tokenizer, quarantine), part, tokenizer) if part else ()
        for part in (train, held_out)
    ]
    report(f"prompts: {config.source} ({layout}), {len(made[0])} to draw for, {len(made[1])} held out")
    if quarantine.counts:
        report(f"left out: {quarantine.summary()}")
    parts = [f"{p.key} {p.answer}" for part in made for p in part]
    digest = hashlib.sha256("\n".join(parts).encode())
    return PromptData(
        train=made[0],
        held_out=made[1],
        clusters=tuple(str(p.fields.get("category", p.text)) for p in made[1]),
        fingerprint=digest.hexdigest(),
    )


def _records(
    config: DataConfig, quarantine: Quarantine, seed: int, report: Callable[[str], None]
) -> tuple[Sequence[Record], Sequence[Record], str]:
    if config.source == INSTRUCTIONS:
        return *instruction_records(config.instructions), "built in"
    if config.source == REVIEWS:
        s = config.reviews
        found = clothing_review_pairs(
            seed=seed, num_train=s.num_train, num_eval=s.num_eval, max_words=s.max_words, min_gap=s.min_gap
        )
        return found.train, found.eval, REVIEWS
    return read_split(config, quarantine, seed, report)


def _prompts(examples: Examples, records: Sequence[Record], tokenizer: Any) -> tuple[Prompt, ...]:
    by_source = {r.source: r for r in records}
    found: dict[str, Prompt] = {}
    for example in examples:
        prompt = _prompt(example, by_source[example.source], tokenizer)
        found.setdefault(prompt.key, prompt)
    return tuple(found.values())


def _prompt(example: Example, record: Record, tokenizer: Any) -> Prompt:
    eos = tokenizer.eos_token_id
    candidates = tuple(
        Completion(
            ids=ids,
            text=tokenizer.decode(ids, skip_special_tokens=True),
            finished=bool(len(ids)) and int(ids[-1]) == eos,
        )
        for ids in example.candidate_ids
    )
    fields = {k: v for k, v in record.tags.items() if isinstance(v, (str, int, float, bool, list, dict))}
    answer = fields.get("answer", fields.get("solution"))
    return Prompt(
        key=hashlib.sha256(np.ascontiguousarray(example.prompt_ids, dtype="<i4").tobytes()).hexdigest()[:24]
        + ("" if not candidates else example.id[:8]),
        ids=example.prompt_ids,
        text=last_user_text(record.prompt),
        answer=None if answer is None else str(answer),
        fields=fields,
        candidates=candidates,
        relevance=example.relevance,
        source=example.source,
    )


def last_user_text(prompt: Text) -> str:
    """What the user asked last; a plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    asked = [m.content for m in prompt if m.role == "user"]
    return asked[-1] if asked else prompt[-1].content
