"""Requests for a session, and the sessions that answer them: the records of a recommender's rounds.

Shapes: n items of a history, m items of a session.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.logged import SPLITS, LoggedSessions, SplitName, split_of
from triptych.training.order import key


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A user at one time. key: names it in the run's randomness. user: name.

    history: all items of the user before it, oldest first, [n]. followed: items that the user really had
    next, [m], -1 after the last; [0] where it is not known. owner: number of a user whom the model looks up,
    -1 = unknown.
    """

    key: str
    user: str
    history: Tensor
    followed: Tensor
    owner: int = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """A session. items: [m], -1 after the last."""

    items: Tensor


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """Which users learn, which validate and which judge: split by a hash of name and seed alone.

    shares: of train, validation, judge; the same numbers as in the logs that judge. parts: of users whose
    events may be used at all.
    """

    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    seed: int = 0
    parts: list[SplitName] = field(default_factory=lambda: ["train", "validation"])

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"users.shares={self.shares} must be shares of users that sum to 1")
        if not self.parts or set(self.parts) - set(SPLITS):
            raise ValueError(f"users.parts={list(self.parts)} must be some of {', '.join(SPLITS)}")


@dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """Requests made of users' events. items: m. per_user: most requests of a user, spread over the events.

    min_history: events before a request. parts: whose events, see `UsersConfig`.
    """

    items: int = 5
    per_user: int = 8
    min_history: int = 5
    parts: list[SplitName] = field(default_factory=lambda: ["train"])

    def __post_init__(self) -> None:
        for name in ("items", "per_user", "min_history"):
            if getattr(self, name) < 1:
                raise ValueError(f"requests.{name}={getattr(self, name)} must be at least 1")


def users_of(events: Interactions, config: UsersConfig, parts: Collection[str]) -> list[int]:
    """Numbers of the users in some parts."""
    places = {SPLITS.index(part) for part in parts}  # type: ignore[arg-type]
    sides = [split_of(name, seed=config.seed, shares=config.shares) for name in events.users]
    return [number for number, side in enumerate(sides) if side in places]


def with_users(events: Interactions, config: UsersConfig) -> Interactions:
    """The events of config.parts alone; the catalogue and the users' numbers stay."""
    keep = torch.zeros(len(events.users), dtype=torch.bool)
    keep[users_of(events, config, config.parts)] = True
    return events.kept(keep[events.user_E])


def requests_of(
    events: Interactions, users: Sequence[int], config: RequestConfig, owners_U: Tensor
) -> list[Request]:
    """Requests at places spread evenly over each user's events, each with an item after it at least.

    owners_U: by what number the model knows each user, -1 = not at all. ValueError when no user has enough
    events.
    """
    found: list[Request] = []
    for user in users:
        items, name = events.of(user), events.users[user]
        places = range(config.min_history, len(items))
        spread = torch.linspace(0, len(places) - 1, min(config.per_user, len(places))).long().unique()
        for at in (places[i] for i in spread.tolist()):
            after = items[at : at + config.items]
            followed = functional.pad(after, (0, config.items - len(after)), value=-1)
            found.append(
                Request(
                    key=f"{name}:{at}",
                    user=name,
                    history=items[:at],
                    followed=followed,
                    owner=int(owners_U[user]),
                )
            )
    if not found:
        raise ValueError(
            f"requests.min_history={config.min_history}: none of {len(users)} users has more events than that"
        )
    return found


def logged_requests(
    logs: LoggedSessions, users: Sequence[str], owners_U: Tensor, *, most: int
) -> tuple[list[int], list[Request]]:
    """Requests of logs without what was shown, at most so many (0: all), spread evenly, after their rows."""
    num = len(logs.user_N)
    rows = torch.linspace(0, num - 1, min(most or num, num)).long().unique().tolist()
    offsets = logs.history.offsets.tolist()
    return rows, [
        Request(
            key=f"{users[int(logs.user_N[row])]}:{offsets[row + 1] - offsets[row]}",
            user=users[int(logs.user_N[row])],
            history=logs.history.values[offsets[row] : offsets[row + 1]],
            followed=torch.zeros(0, dtype=torch.int64),
            owner=int(owners_U[int(logs.user_N[row])]),
        )
        for row in rows
    ]


def seeds_of(requests: Sequence[Request], *parts: int | str) -> Tensor:
    """A seed of each request for searches that draw, [U]; the same whichever others it is drawn with."""
    return torch.tensor([key(*parts, r.key) for r in requests], dtype=torch.int64)


def pack(record: Request | Shown) -> dict[str, Any]:
    """A record as tensors and JSON values."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def unpack(kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Request | Shown:
    """The record that `pack` packed."""
    return Request(**packed) if kind == "context" else Shown(**packed)
