"""Texts with ratings of several attributes, for regression rewards: from rows to checked records.

A row has a prompt, a completion (or response) and ratings, either {ratings: {name: number or null}} or one
column an attribute as HelpSteer has them; or it is UltraFeedback's, an instruction with completions whose
annotations are rated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.modalities.llm.files import MAX_ROW_BYTES, Rows
from triptych.modalities.llm.readers import confined, open_source
from triptych.modalities.llm.records import Record, parse_row
from triptych.modalities.llm.rendering import Chat
from triptych.modalities.llm.tokenization import Limits
from triptych.training.feature_data import number_of, ratings_of, tensor_rows
from triptych.training.quarantine import DataError, Quarantine


@dataclass(frozen=True, kw_only=True)
class RatingsConfig:
    """Rated completions.

    source: a file, a folder or a hub name. attributes: names of the ratings, in the order of the scores.
    eval_source names held-out data; without it the share eval_fraction of prompts is held out.
    """

    source: str
    attributes: list[str]
    split: str = "train"
    eval_source: str | None = None
    eval_fraction: float = 0.05
    revision: str | None = None
    data_root: str | None = None
    max_examples: int | None = None
    chat: Chat = "auto"
    system_prompt: str | None = None
    limits: Limits = field(default_factory=Limits)
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"ratings.attributes={self.attributes} must be one name or more, all different")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"ratings.eval_fraction={self.eval_fraction} must be in [0, 1)")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"ratings.max_examples={self.max_examples} must be at least 1, or null for all")


@dataclass(frozen=True, slots=True)
class Rated:
    """One completion with its ratings, in the order of the attributes."""

    record: Record
    ratings: tuple[float | None, ...]


def open_rows(
    source: str, *, split: str = "train", data_root: str | None, revision: str | None = None
) -> Rows:
    """Rows of a file, a folder or a hub name, each with its place; tensors of a .safetensors file as rows."""
    if source.lower().endswith(".safetensors"):
        path = Path(confined(source, data_root))
        if not path.is_file():
            raise DataError("does not exist", source=str(path))
        return tensor_rows(path)
    where = {"data_root": data_root, "revision": revision}
    return open_source(source, split=split, max_bytes=MAX_ROW_BYTES, **where)[1]


def read_ratings(
    rows: Iterable[tuple[str, object]], config: RatingsConfig, *, quarantine: Quarantine
) -> list[Rated]:
    """The usable rated completions among rows; the others go to `quarantine`. DataError when none is left."""
    found: list[Rated] = []
    for place, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError("is not an object", source=place, preview=row)
            found += _rated(row, place, config)
        except DataError as error:
            quarantine.add(error, strict=config.strict)
        if config.max_examples is not None and len(found) >= config.max_examples:
            return found[: config.max_examples]
    if not found:
        raise DataError("holds no usable record", source=config.source, remedy=quarantine.summary())
    return found


def _rated(row: Mapping, place: str, config: RatingsConfig) -> Iterator[Rated]:
    if isinstance(row.get("completions"), (list, tuple)) and "instruction" in row:
        for k, answer in enumerate(row["completions"]):
            if not isinstance(answer, Mapping):
                raise DataError("is not an object", source=place, field=f"completions[{k}]", preview=answer)
            parts = {"prompt": row["instruction"], "completion": answer.get("response")}
            notes = answer.get("annotations")
            ratings = {n: _annotated(notes, n, place) for n in config.attributes}
            yield _one(parts, ratings, f"{place}#{k}", config)
        return
    parts = {"prompt": row.get("prompt"), "completion": row.get("completion", row.get("response"))}
    given = row.get("ratings")
    yield _one(parts, given if isinstance(given, Mapping) else {n: row.get(n) for n in config.attributes},
               place, config)  # fmt: skip


def _one(parts: Mapping, ratings: Mapping, place: str, config: RatingsConfig) -> Rated:
    suffix = "" if isinstance(parts["prompt"], str) else "_conversational"
    record = parse_row(parts, f"prompt_completion{suffix}", place)
    return Rated(record, ratings_of(ratings, config.attributes, place))


def _annotated(notes: Any, name: str, place: str) -> float | None:
    """UltraFeedback's {aspect: {Rating: "4"}}; "N/A" and absent ones are no rating."""
    note = notes.get(name) if isinstance(notes, Mapping) else None
    value = note.get("Rating") if isinstance(note, Mapping) else None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return None if value is None else number_of(value, f"annotations.{name}", place)


def ratings_fingerprint(parts: Iterable[Rated | str]) -> str:
    """A hash of rated records in order."""
    digest = hashlib.sha256()
    for part in parts:
        text = (
            part
            if isinstance(part, str)
            else f"{part.record.prompt}\x1f{part.record.candidates}\x1f{part.ratings}"
        )
        digest.update(text.encode("utf-8", errors="surrogatepass") + b"\n")
    return digest.hexdigest()
