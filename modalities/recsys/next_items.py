"""Examples for next-session prediction from users' events.

A user's events are cut into windows. A model that predicts after every item of a history gets a window as one
example with a session for each place; another gets one example a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.likelihood import Example


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """items: m, items of a session to be predicted; window: items of history that are looked at."""

    items: int = 1
    window: int = 100

    def __post_init__(self) -> None:
        for name, least in {"items": 1, "window": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"session.{name}={getattr(self, name)} must be at least {least}")


def next_examples(events: Interactions, config: SessionConfig, *, every_position: bool) -> list[Example]:
    """Every event that another precedes is the first item of one session; what follows it, its others.

    Sessions at the end of a user's events are shorter. Users with one event give no example.
    """
    found: list[Example] = []
    for u, name in enumerate(events.users):
        items = events.of(u)
        if len(items) < 2:
            continue
        if every_position:
            for start, first, end in _windows(len(items), config.window):
                seen = torch.arange(first, end)
                found.append(_example(name, items[start:], seen - start, config.items, f"{name}:{end}"))
        else:
            for place in range(1, len(items)):
                start = max(0, place - config.window)
                seen = torch.tensor([place - start])
                found.append(_example(name, items[start:], seen, config.items, f"{name}:{place}"))
    return found


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


def _example(user: str, items: Tensor, seen: Tensor, num: int, key: str) -> Example:
    """Sessions of up to `num` items after each of the `seen` first ones."""
    wide = torch.nn.functional.pad(items, (0, num), value=-1)
    sessions = wide[seen.unsqueeze(-1) + torch.arange(num)]
    history = items[: int(seen.max())]
    return Example(id=key, source=f"user {user}", kind="next", history=history, sessions=sessions, seen=seen)


def histories(events: Sequence[Tensor], window: int) -> list[Tensor]:
    """The last `window` items of each row."""
    return [row[-window:] for row in events]
