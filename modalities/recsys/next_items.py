"""Examples for next-session prediction from users' events.

A user's events are cut into windows. A model that predicts after every item of a history gets a window as one
example with a session for each place; another gets one example a place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.likelihood import Example


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a session must have to be learnt: of a signal of its items the sum, mean or most.

    least: what that must be at least. signal: 'rating' or a further column of the events. OneRec's conditions
    (2502.18965, 3.2): five items really watched is {signal: long_view, statistic: sum, least: 5}; a long time
    of watching, play_time_ms; interactions, {signal: is_like, statistic: most, least: 1}.
    """

    signal: str
    least: float
    statistic: Literal["sum", "mean", "most"] = "sum"


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """items: m, items of a session to be predicted; window: items of history that are looked at.

    hold_out: each user's last event is kept for testing, and the one before for validation unless 'test':
    then that is learnt from, too, as the classical bars do, and there is no validation during training.
    crop: every epoch up to this share of a history's oldest items is left out, so that what is learnt does
    not hang on how far back a history goes. quality: of sessions that are learnt, the others are history
    alone; the paper leaves open whether all of its conditions must hold or any: quality_rule.
    """

    items: int = 1
    window: int = 100
    hold_out: Literal["validation_and_test", "test"] = "validation_and_test"
    crop: float = 0.0
    quality: list[Quality] = field(default_factory=list)
    quality_rule: Literal["all", "any"] = "all"

    def __post_init__(self) -> None:
        for name, least in {"items": 1, "window": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"session.{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.crop < 1:
            raise ValueError(f"session.crop={self.crop} must be in [0, 1)")


def next_examples(events: Interactions, config: SessionConfig, *, every_position: bool) -> list[Example]:
    """Every event that another precedes is the first item of one session; what follows it, its others.

    Sessions at the end of a user's events are shorter. Users with one event give no example. ValueError for a
    quality of a signal that the events lack.
    """
    good_E = _good(events, config)
    found: list[Example] = []
    for u, name in enumerate(events.users):
        items = events.of(u)
        if len(items) < 2:
            continue
        good = good_E[events.offsets[u] : events.offsets[u + 1]]
        if every_position:
            for start, first, end in _windows(len(items), config.window):
                seen = torch.arange(first, end)[good[first:end]]
                if len(seen):
                    found.append(
                        _example(name, items[start:], seen - start, config.items, f"{name}:{end}", u)
                    )
        else:
            for place in range(1, len(items)):
                if good[place]:
                    start = max(0, place - config.window)
                    seen = torch.tensor([place - start])
                    found.append(_example(name, items[start:], seen, config.items, f"{name}:{place}", u))
    return found


def _good(events: Interactions, config: SessionConfig) -> Tensor:
    """Whether the session that begins with an event may be learnt, [E]."""
    num, size = len(events.item_E), config.items
    if not config.quality:
        return torch.ones(num, dtype=torch.bool)
    user_E = functional.pad(events.user_E, (0, size - 1), value=-1).unfold(0, size, 1)
    inside_Em = user_E == user_E[:, :1]
    flags = []
    for wanted in config.quality:
        values = events.rating_E if wanted.signal == "rating" else events.signals.get(wanted.signal)
        if values is None:
            have = (
                ", ".join([*(["rating"] if events.rating_E is not None else []), *events.signals]) or "none"
            )
            raise ValueError(
                f"session.quality: the events have no signal '{wanted.signal}'; they have {have}"
            )
        values_Em = functional.pad(values, (0, size - 1)).unfold(0, size, 1)
        total = torch.where(inside_Em, values_Em, 0.0).sum(1)
        statistic = {
            "sum": total,
            "mean": total / inside_Em.sum(1),
            "most": torch.where(inside_Em, values_Em, -torch.inf).amax(1),
        }[wanted.statistic]
        flags.append(statistic >= wanted.least)
    stacked = torch.stack(flags)
    return stacked.all(0) if config.quality_rule == "all" else stacked.any(0)


def _windows(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start of the history, first place predicted, end): every place from 1 on once, from the end backwards.

    A window holds at most `size` items of history; the places of an earlier window than the first are in its
    second half, so that none is predicted from a few items only because a window began.
    """
    found, end = [], length
    while end > 1:
        start = max(0, end - size - 1)
        first = max(1, start + (size // 2 if start else 1))
        found.append((start, first, end))
        end = first
    return found


def _example(name: str, items: Tensor, seen: Tensor, num: int, key: str, user: int) -> Example:
    """Sessions of up to `num` items after each of the `seen` first ones."""
    wide = functional.pad(items, (0, num), value=-1)
    sessions = wide[seen.unsqueeze(-1) + torch.arange(num)]
    history = items[: int(seen.max())]
    return Example(
        id=key,
        source=f"user {name}",
        kind="next",
        history=history,
        sessions=sessions,
        seen=seen,
        user=user,
    )
