"""From a file, a folder or a data set's name on the hub to checked preference records.

records = read_records("hh.jsonl.gz", quarantine=Quarantine("runs/hh/quarantine.jsonl"))
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from triptych.modalities.llm.duplicates import remove_repeats
from triptych.modalities.llm.files import MAX_ROW_BYTES, Rows, read_rows
from triptych.modalities.llm.records import COLUMNS, FORMATS, Record, Text, detect_format, parse_row
from triptych.training.quarantine import DataError, Quarantine

_log = logging.getLogger(__name__)
_ENDINGS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
_ACCEPTED = f"{', '.join(_ENDINGS)}, a folder of these or one written by save_to_disk, or org/name on the hub"
_HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")
_SPLIT_WORDS = ("train", "test", "valid", "validation", "eval", "dev")
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tar")
_NUM_ROWS_LOOKED_AT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What was read: the records in order, their layout, how many rows there were, a hash of the content."""

    records: tuple[Record, ...]
    format: str
    num_rows: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def read_records(
    source: str | os.PathLike[str],
    *,
    format: str = "auto",
    split: str = "train",
    quarantine: Quarantine,
    strict: bool = False,
    limit: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    contradictions: Literal["drop", "keep"] = "drop",
) -> Records:
    """Read, check and clean preference data; what cannot be used goes to `quarantine` (or raises, if strict).

    `format="auto"` takes the layout of most of the first rows and logs it; `limit` stops after that many
    records, before repeats are removed. With `data_root` the path must lie inside it. `org/name` or
    `org/name:config` is loaded with `datasets`, at `revision` if given, and runs no code from the hub.
    DataError if nothing usable is left, naming the columns found and needed when all rows fail alike.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; it is one of auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it is at least 1, or null for all")
    name, rows = open_source(
        os.fspath(source), split=split, data_root=data_root, revision=revision, max_bytes=max_row_bytes
    )
    first = list(itertools.islice(rows, _NUM_ROWS_LOOKED_AT))
    layout = _most_common_format(first, name) if format == "auto" else format
    parsed, errors, num_rows = [], [], 0
    for place, row in itertools.chain(first, rows):
        num_rows += 1
        result = _parse(row, layout, place, mixed=format != "auto")
        if isinstance(result, DataError):
            errors.append(result)
            quarantine.add(result, strict=strict)
        else:
            parsed.append(result)
            if len(parsed) == limit:
                break
    if not parsed:
        raise _nothing_left(name, layout, errors[:_NUM_ROWS_LOOKED_AT], [row for _, row in first])
    records = remove_repeats(parsed, quarantine=quarantine, strict=strict, contradictions=contradictions)
    if not records:
        raise DataError("holds no usable record", source=name, remedy=quarantine.summary())
    how = "detected" if format == "auto" else "given"
    _log.info("%s: format %s (%s), %d of %d records kept", name, layout, how, len(records), num_rows)
    return Records(records=tuple(records), format=layout, num_rows=num_rows, fingerprint=fingerprint(records))


def fingerprint(records: Sequence[Record]) -> str:
    """sha256 over the records' content in order; where they were read from does not count."""
    digest = hashlib.sha256()
    for record in records:
        texts = [_plain(record.prompt), [_plain(text) for text in record.candidates]]
        rest = [record.relevance, record.strength, record.margin, dict(record.tags)]
        digest.update(json.dumps([*texts, *rest], sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _plain(text: Text) -> object:
    return text if isinstance(text, str) else [[message.role, message.content] for message in text]


def _parse(row: object, layout: str, place: str, *, mixed: bool) -> Record | DataError:
    """One record, or why not. Unless `mixed` is allowed, a row of another layout is not read as this one."""
    if isinstance(row, DataError):
        return row
    result = _attempt(row, layout, place)
    if mixed or (isinstance(result, DataError) and result.reason == "is missing"):
        return result
    try:
        own = detect_format(row)
    except DataError:
        return result
    if _columns(own) == _columns(layout):
        return result
    if isinstance(result, DataError) and isinstance(_attempt(row, own, place), DataError):
        return result
    remedy = f"it looks like {own}, the file like {layout}: name the format or split the file"
    return DataError("is in another format than the rest", source=place, remedy=remedy, preview=str(row))


def _attempt(row: object, layout: str, place: str) -> Record | DataError:
    try:
        return parse_row(row, layout, place)
    except DataError as error:
        return error


def _columns(layout: str) -> str:
    return COLUMNS[layout.removesuffix("_conversational")]


def _most_common_format(rows: list[tuple[str, object]], name: str) -> str:
    votes: Counter[str] = Counter()
    errors = []
    for place, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            votes[detect_format(row)] += 1
        except DataError as error:
            errors.append(DataError(error.reason, source=place, field=error.field, remedy=error.remedy))
    if not votes:
        raise _nothing_left(name, "", errors, [])
    return votes.most_common(1)[0][0]


def _nothing_left(name: str, layout: str, errors: list[DataError], rows: list[object]) -> DataError:
    """One error for a source without a usable record; when all rows fail alike it says how, once."""
    if not errors:
        return DataError("holds no record", source=name, remedy="the file or split is empty")
    kinds = Counter((error.field, error.reason) for error in errors)
    if len(kinds) > 1:
        counts = ", ".join(f"{number} {reason}" for (_, reason), number in kinds.most_common())
        return DataError("holds no usable record", source=name, remedy=f"{counts}; first: {errors[0]}")
    columns = next((", ".join(map(str, row)) for row in rows if isinstance(row, Mapping)), "")
    needs = f"; columns found: {columns}; {layout} needs: {_columns(layout)}" if columns and layout else ""
    remedy = f"all {len(errors)} looked at fail alike: {errors[0]}{needs}"
    return DataError("holds no usable record", source=name, remedy=remedy)


def open_source(
    source: str, *, split: str, data_root, revision: str | None, max_bytes: int
) -> tuple[str, Rows]:
    """A short name for the source, and its rows."""
    path = confined(source, data_root)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return path.name, _saved_rows(path, split)
        return path.name, _folder_rows(path, split, max_bytes)
    if path.is_file():
        if not path.name.lower().endswith(_ENDINGS):
            raise _wrong_file(path)
        return path.name, read_rows(path, name=path.name, max_bytes=max_bytes)
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.lower().endswith(_ENDINGS):
        raise DataError("does not exist", source=str(path), remedy=f"give {_ACCEPTED}")
    return source, _hub_rows(match["path"], match["config"], split, revision)


def confined(source: str, data_root: str | os.PathLike[str] | None) -> Path:
    """The path that a source names, within data_root where there is one; DataError for a URL or an escape."""
    if "://" in source:
        raise DataError("is a URL", source=source, remedy=f"download it first; then give {_ACCEPTED}")
    if "\0" in source or not source.strip():
        raise DataError("is no path", source=source, remedy=f"give {_ACCEPTED}")
    if data_root is None:
        return Path(source).expanduser()
    root = Path(data_root).resolve()
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise DataError("lies outside the data root", source=source, remedy=f"put it below {root}")
    return path


def _wrong_file(path: Path) -> DataError:
    ending = path.suffix.lower()
    why = "is not a file type of preference data"
    if ending in (".pkl", ".pickle", ".pt", ".bin", ".pth", ".npy"):
        why = "is a pickle or tensor file, which is never loaded"
    elif ending in _IMAGE_ENDINGS:
        why = "holds images, which belong to the diffusion reader"
    return DataError(why, source=path.name, remedy=f"give {_ACCEPTED}")


def _folder_rows(folder: Path, split: str, max_bytes: int) -> Rows:
    """All files of a folder; if any is named for a split, those whose names start with this one."""
    root = folder.resolve()
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(_ENDINGS))
    outside = [p for p in paths if not p.resolve().is_relative_to(root)]
    if outside:
        raise DataError(
            "links out of its folder", source=str(outside[0]), remedy="copy the file into the folder"
        )
    if not paths:
        raise DataError("holds no data file", source=str(folder), remedy=f"give {_ACCEPTED}")
    named = [p for p in paths if re.match(rf"({'|'.join(_SPLIT_WORDS)})(?![a-z])", p.name.lower())]
    if named:
        chosen = [p for p in paths if re.match(rf"{re.escape(split.lower())}(?![a-z])", p.name.lower())]
        if not chosen:
            found = ", ".join(p.name for p in paths[:20])
            raise DataError(
                f"has no file for split {split!r}", source=str(folder), remedy=f"it holds {found}"
            )
        paths = chosen
    return itertools.chain.from_iterable(
        read_rows(p, name=str(p.relative_to(folder)), max_bytes=max_bytes) for p in paths
    )


def _saved_rows(folder: Path, split: str) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError("cannot be loaded", source=str(folder), remedy=_one_line(error)) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"has no split {split!r}", source=str(folder), remedy=f"it has {', '.join(map(str, loaded))}"
            )
        loaded = loaded[split]
    return _numbered(loaded, f"{folder.name}[{split}]")


def _hub_rows(path: str, config: str | None, split: str, revision: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(path, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = f"it is no file here, and the hub says: {_one_line(error)}"
        raise DataError("cannot be loaded", source=path, remedy=remedy) from error
    return _numbered(loaded, f"{path}[{split}]")


def _numbered(rows, name: str) -> Iterator[tuple[str, object]]:
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
