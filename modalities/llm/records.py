"""Preference records as they stand in files, in one type: a context and its graded candidates.

`detect_format` says which published layout a row has, `parse_row` makes it a `Record` or raises `DataError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from triptych.modalities.llm.layouts import COLUMNS, PARSERS
from triptych.modalities.llm.turns import Message, Text, is_transcript
from triptych.training.quarantine import DataError

__all__ = [
    "COLUMNS",
    "FORMATS",
    "Format",
    "Message",
    "Record",
    "Text",
    "detect_format",
    "parse_row",
    "unknown_columns",
]

Format = Literal[
    "trl_explicit",
    "trl_explicit_conversational",
    "trl_implicit",
    "trl_implicit_conversational",
    "trl_unpaired",
    "trl_unpaired_conversational",
    "prompt_completion",
    "prompt_completion_conversational",
    "prompt_only",
    "prompt_only_conversational",
    "hh_rlhf",
    "hh_rlhf_text",
    "ultrafeedback_binarized",
    "ultrafeedback",
    "sharegpt_ranking",
    "alpaca_ranking",
    "ranked_list",
]
FORMATS: tuple[str, ...] = get_args(Format)
_TAGS = (
    "id", "prompt_id", "user", "user_id", "item", "item_id", "category", "group",
    "answer", "solution", "direction",
)  # fmt: skip
_IMAGES = {"jpg_0", "jpg_1", "image_path", "path1", "path2", "images", "image", "generations"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One context and its candidates, before tokenisation; the best candidate first.

    `relevance` grades the candidates: (1, 0) for a pair, (1,) or (0,) for an unpaired completion, () for a
    prompt alone. `strength` is P(chosen preferred), `margin` the gap between the two scores. `source` is
    `hh.jsonl:17` or `dataset[train][16]`; `tags` are what else is known, such as an item id or a user.
    """

    prompt: Text
    candidates: tuple[Text, ...]
    relevance: tuple[float, ...]
    strength: float | None = None
    margin: float | None = None
    source: str
    tags: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.candidates) != len(self.relevance):
            raise ValueError(
                f"{len(self.candidates)} candidates need as many grades, not {len(self.relevance)}"
            )

    @property
    def kind(self) -> Literal["pair", "list", "labelled", "prompt"]:
        """What the record holds, which says what input it can become."""
        if len(self.candidates) < 2:
            return "labelled" if self.candidates else "prompt"
        return "pair" if self.relevance == (1.0, 0.0) else "list"


def detect_format(row: object) -> str:
    """The layout of one row, from its columns and, where these are shared, the form of their values."""
    if not isinstance(row, Mapping):
        raise DataError("is not an object", remedy="write each record as {...}", preview=row)
    pair = "chosen" in row and "rejected" in row
    has_messages = any(
        isinstance(row.get(name), (list, tuple, Mapping))
        for name in ("prompt", "chosen", "rejected", "completion")
    )
    suffix = "_conversational" if has_messages else ""
    if any(row.get(name) is not None for name in _IMAGES & row.keys()):
        found = ", ".join(sorted(_IMAGES & row.keys()))
        raise DataError(
            "is about images", remedy=f"found {found}: use the diffusion reader for image preferences"
        )
    if pair and "conversations" in row:
        return "sharegpt_ranking"
    if "instruction" in row and (pair or isinstance(row.get("output"), (list, tuple))):
        return "alpaca_ranking"
    if "instruction" in row and "completions" in row:
        return "ultrafeedback"
    if "prompt" in row and "candidates" in row:
        return "ranked_list"
    if "prompt" in row and pair:
        return "ultrafeedback_binarized" if _repeats_prompt(row) else "trl_explicit" + suffix
    if pair and is_transcript(row["chosen"]) and is_transcript(row["rejected"]):
        return "hh_rlhf"
    if pair:
        return "trl_implicit" + suffix
    if "prompt" in row and "completion" in row:
        return ("trl_unpaired" if "label" in row else "prompt_completion") + suffix
    if "prompt" in row and not row.keys() & {"chosen", "rejected", "label"}:
        return "prompt_only" + suffix
    raise unknown_columns(row)


def unknown_columns(row: Mapping) -> DataError:
    """The error for a row in no known layout, with what was found and what each layout needs."""
    found = ", ".join(map(str, row))[:300] or "none"
    known = "; ".join(f"{name}: {columns}" for name, columns in COLUMNS.items())
    return DataError("has columns of no known format", remedy=f"found {found}; known are {known}")


def _repeats_prompt(row: Mapping) -> bool:
    """UltraFeedback-binarized: `prompt` is a text and both message lists start with that very turn."""
    first = [
        side[0].get("content")
        if isinstance(side, (list, tuple)) and side and isinstance(side[0], Mapping)
        else None
        for side in (row["chosen"], row["rejected"])
    ]
    return isinstance(row["prompt"], str) and first == [row["prompt"]] * 2


def parse_row(row: object, format: str, source: str) -> Record:
    """One row as a `Record`; `DataError` naming place, field, reason and remedy for anything else."""
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; it is one of auto, {', '.join(FORMATS)}")
    base = format.removesuffix("_conversational")
    try:
        if not isinstance(row, Mapping):
            raise DataError("is not an object", remedy="write each record as {...}", preview=row)
        parts = PARSERS[base](row)
        tags = {name: row[name] for name in _TAGS if isinstance(row.get(name), (str, int, float, list))}
        return Record(source=source, tags=tags, **parts)
    except DataError as error:
        raise DataError(
            error.reason, source=source, field=error.field, remedy=error.remedy, preview=error.preview
        ) from None
