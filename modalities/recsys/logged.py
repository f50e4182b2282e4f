"""Logged sessions: what a simple recommender showed, and how the oracle's users responded.

Every request has one session and no second one to compare it with, as in a real log. Users are split three
ways by their names, so that who judges has never been trained on.

Shapes: N requests, m places, I items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.modalities.recsys.classical import Scorer, item_knn, most_popular
from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.oracle import SIGNALS, Oracle, digest_of
from triptych.training.atomic import write_json, write_synced
from triptych.training.order import key
from triptych.training.quarantine import DataError

SplitName = Literal["train", "validation", "judge"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "judge")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Who is shown what.

    items: m. requests: of each user, after different lengths of the user's events; fewer for a user who has
    too few. min_history: events before the first request. popular, knn, noise: shares of the three parts of
    the logging policy; popular_power: how much more often the popular is shown, 1 = as often as it has
    events. neighbours: of the item-kNN. shares: of users for train (generator and reward model), validation
    and judge. seed: of the split.
    """

    items: int = 5
    requests: int = 4
    min_history: int = 5
    popular: float = 0.4
    knn: float = 0.4
    noise: float = 0.2
    popular_power: float = 1.0
    neighbours: int = 50
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("items", "requests", "min_history", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"logging.{name}={getattr(self, name)} must be at least 1")
        for name in ("popular", "knn", "popular_power"):
            if getattr(self, name) < 0:
                raise ValueError(f"logging.{name}={getattr(self, name)} must be at least 0")
        if self.noise <= 0:
            raise ValueError(f"logging.noise={self.noise} must be above 0, or some items are never shown")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"logging.shares={self.shares} must be shares of users that sum to 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoggedSessions:
    """user_N: numbers as in the events. history: the user's items before the request, oldest first.

    items_Nm: the session that was shown. signals: vtr, ltr, wtr of 0 and 1, [N, m]; swt in [0, 1], [N].
    split_N: place in SPLITS. about: fingerprints of the events and the oracle, and the settings.
    fingerprint: SHA-256 of all of it.
    """

    user_N: Tensor
    history: Jagged
    items_Nm: Tensor
    signals: Mapping[str, Tensor]
    split_N: Tensor
    about: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        num = len(self.user_N)
        columns = {"items_Nm": self.items_Nm, "split_N": self.split_N, **self.signals}
        if odd := [name for name, column in columns.items() if len(column) != num]:
            raise ValueError(f"{odd[0]} has {len(columns[odd[0]])} rows; expected {num}, one a request")
        if self.history.num_rows != num:
            raise ValueError(f"history has {self.history.num_rows} rows; expected {num}, one a request")
        found = digest_of(self.tensors(), json.dumps(dict(self.about), sort_keys=True))
        if self.fingerprint not in ("", found):
            raise ValueError(f"fingerprint is {self.fingerprint}; the logs have {found}")
        object.__setattr__(self, "fingerprint", found)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as it is written."""
        return {
            "user": self.user_N,
            "history": self.history.values,
            "history_offsets": self.history.offsets,
            "items": self.items_Nm,
            "split": self.split_N,
            **{f"signals.{name}": column for name, column in self.signals.items()},
        }

    def of(self, split: SplitName) -> LoggedSessions:
        """Requests of one part of the users; ValueError when there are none."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
        rows = (self.split_N == SPLITS.index(split)).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(f"no request is of the split {split!r}: give logging.shares it a larger share")
        lengths, offsets = self.history.lengths, self.history.offsets
        return replace(
            self,
            user_N=self.user_N[rows],
            history=Jagged.of([self.history.values[offsets[r] : offsets[r] + lengths[r]] for r in rows]),
            items_Nm=self.items_Nm[rows],
            signals={name: column[rows] for name, column in self.signals.items()},
            split_N=self.split_N[rows],
            about={**self.about, "split": split},
            fingerprint="",
        )

    def write(self, path: Path) -> None:
        """One file of tensors, and beside it a .json of where they are from and their fingerprint."""
        _suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        tensors = {name: value.contiguous() for name, value in self.tensors().items()}
        write_synced(temporary, lambda to: save_file(tensors, to))
        temporary.replace(path)
        write_json(path.with_suffix(".json"), {"fingerprint": self.fingerprint, "about": dict(self.about)})

    @classmethod
    def read(cls, path: Path) -> LoggedSessions:
        """What `write` wrote. DataError for a file that is absent, damaged, or not what its .json says."""
        _suffix(path)
        try:
            said = json.loads(path.with_suffix(".json").read_text("utf-8"))
            tensors, about, fingerprint = load_file(path), said["about"], said["fingerprint"]
            offsets = tensors["history_offsets"]
            found = cls(
                user_N=tensors["user"],
                history=Jagged(tensors["history"], offsets, int(offsets.diff().max())),
                items_Nm=tensors["items"],
                signals={name: tensors[f"signals.{name}"] for name in SIGNALS},
                split_N=tensors["split"],
                about=about,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError("holds no logged sessions", source=str(path), remedy=reason) from None
        if found.fingerprint != fingerprint:
            remedy = f"its .json says {fingerprint}, its content is {found.fingerprint}; write the logs again"
            raise DataError("is not what was written", source=str(path), remedy=remedy)
        return found


def split_of(user: str, *, seed: int, shares: Sequence[float]) -> int:
    """Place in SPLITS of a user, by a hash of name and seed alone: other users do not change it."""
    at, passed = key("split", seed, user) / 2**63, 0.0
    for place, share in enumerate(shares[:-1]):
        passed += share
        if at < passed:
            return place
    return len(shares) - 1


def make_logs(
    events: Interactions, oracle: Oracle, config: LoggingConfig, generator: torch.Generator
) -> LoggedSessions:
    """One session for each request of each user, shown by the logging policy and answered by the oracle.

    A user with T events makes requests after round(T (r + 1) / requests) of them, at least min_history; the
    policy knows all `events`. Items of the history are not shown, nor an item twice in a session.

    ValueError when nobody has enough events, or the catalogue is too small for a session.
    """
    if len(events.users) != len(oracle.user_U) or len(events.items) != len(oracle.item_I):
        raise ValueError(
            f"events have {len(events.users)} users and {len(events.items)} items, the oracle "
            f"{len(oracle.user_U)} and {len(oracle.item_I)}: fit it on the same"
        )
    users, histories = _requests(events, config)
    policy = logging_policy(events, config)
    shown = []
    for start in range(0, len(users), 256):
        chance_NI = policy(histories[start : start + 256])
        shown.append(_drawn(chance_NI, config.items, generator))
    items_Nm, user_N = torch.cat(shown), torch.tensor(users)
    side = torch.tensor([split_of(name, seed=config.seed, shares=config.shares) for name in events.users])
    about = {"events": events.fingerprint, "oracle": oracle.fingerprint, "config": str(config)}
    return LoggedSessions(
        user_N=user_N,
        history=Jagged.of(histories),
        items_Nm=items_Nm,
        signals=oracle.respond(user_N, items_Nm, generator),
        split_N=side[user_N],
        about=about,
    )


def logging_policy(events: Interactions, config: LoggingConfig) -> Scorer:
    """Histories -> the chance of every item, [N, I] float64, rows that sum to 1; 0 for items of the history.

    A mixture of three, each over the items that are not in the history: events of the item to the power
    popular_power, its item-kNN score, and the same for all. A part that is 0 for all of these adds nothing.
    """
    popular, knn = most_popular(events), item_knn(events, neighbours=config.neighbours)

    def chance(histories: Sequence[Tensor]) -> Tensor:
        popular_NI = popular(histories).double() ** config.popular_power
        rows = torch.repeat_interleave(torch.tensor([len(h) for h in histories]))
        new_NI = torch.ones_like(popular_NI)
        new_NI[rows, torch.cat(list(histories))] = 0.0
        return _shares(
            config.noise * _shares(new_NI)
            + config.popular * _shares(popular_NI * new_NI)
            + config.knn * _shares(knn(histories).double() * new_NI)
        )

    return chance


def _suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"logs are written as *.safetensors with a .json beside; {path.name} is not")


def _shares(score_NI: Tensor) -> Tensor:
    return score_NI / score_NI.sum(1, keepdim=True).clamp(min=1e-300)


def _drawn(chance_NI: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Items drawn one after the other without putting back, in that order, [N, num]: Gumbel top-k."""
    if int((chance_NI > 0).sum(1).min()) < num:
        raise ValueError(f"logging.items={num} is more than the items that some user has not had")
    uniform = torch.rand(chance_NI.shape, generator=generator, dtype=torch.float64)
    noise = -(-uniform.clamp(min=1e-300).log()).log()
    return (chance_NI.log() + noise).topk(num, dim=1).indices


def _requests(events: Interactions, config: LoggingConfig) -> tuple[list[int], list[Tensor]]:
    users, histories = [], []
    for user in range(len(events.users)):
        items = events.of(user)
        cuts = {round(len(items) * (r + 1) / config.requests) for r in range(config.requests)}
        for cut in sorted(c for c in cuts if c >= config.min_history):
            users.append(user)
            histories.append(items[:cut])
    if not users:
        raise ValueError(f"logging.min_history={config.min_history}: no user has so many events")
    return users, histories
