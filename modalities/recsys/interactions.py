"""Users' events in time order, and what is held out of them.

Shapes: U users, I items, E events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from triptych.modalities.recsys.features import Feature, Sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """Events sorted by user and time; events of one time keep their order in the file.

    users, items: names, whose place is the number. offsets: [U + 1] int64, events of user u are
    offsets[u]:offsets[u + 1]. item_E: int64. time_E: float64, seconds, or the place where the source has no
    time. rating_E: float32. signals: further columns, [E] float32. titles: [I], shown to people; texts: [I],
    what is known of an item in words. item_features, user_features: by name, such as genre. fingerprint:
    SHA-256 of what was read.
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    offsets: Tensor
    item_E: Tensor
    time_E: Tensor
    rating_E: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    item_features: Mapping[str, Feature] = field(default_factory=dict)
    user_features: Mapping[str, Feature] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        num = len(self.item_E)
        if self.offsets.shape != (len(self.users) + 1,) or int(self.offsets[-1]) != num:
            raise ValueError(f"offsets should be [{len(self.users) + 1}] and end with {num} events")
        for name, column in {"time_E": self.time_E, "rating_E": self.rating_E, **self.signals}.items():
            if column is not None and column.shape != (num,):
                raise ValueError(f"{name} has shape {tuple(column.shape)}; expected ({num},)")
        if num and (int(self.item_E.min()) < 0 or int(self.item_E.max()) >= len(self.items)):
            raise ValueError(f"item numbers must be from 0 to {len(self.items) - 1}")
        for of, num in ((self.item_features, len(self.items)), (self.user_features, len(self.users))):
            for name, feature in of.items():
                if len(feature.ids_NP) != num:
                    raise ValueError(f"feature {name} has {len(feature.ids_NP)} rows; expected {num}")
        for name in ("titles", "texts"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.items)
            elif len(getattr(self, name)) != len(self.items):
                raise ValueError(f"{name} should be {len(self.items)}, one an item")

    def of(self, user: int) -> Tensor:
        """Items of a user in time order."""
        return self.item_E[self.offsets[user] : self.offsets[user + 1]]

    @property
    def sides(self) -> Sides:
        """What a model may look up besides the events."""
        return Sides(
            num_items=len(self.items),
            num_users=len(self.users),
            item_features=self.item_features,
            user_features=self.user_features,
        )

    @property
    def lengths(self) -> Tensor:
        """Events of each user, [U]."""
        return self.offsets.diff()

    @property
    def user_E(self) -> Tensor:
        """User of each event, [E]."""
        return torch.repeat_interleave(self.lengths)

    def kept(self, mask_E: Tensor) -> Interactions:
        """The same users and items with these events alone."""
        counts = torch.bincount(self.user_E[mask_E], minlength=len(self.users))
        return replace(
            self,
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            item_E=self.item_E[mask_E],
            time_E=self.time_E[mask_E],
            rating_E=None if self.rating_E is None else self.rating_E[mask_E],
            signals={name: column[mask_E] for name, column in self.signals.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """train: what may be learnt from. valid_U, test_U: the item held out of each user, -1 for none."""

    train: Interactions
    valid_U: Tensor
    test_U: Tensor
    whole: Interactions

    def with_validation(self) -> Interactions:
        """Everything but the test items: what a recommender knows when it is tested."""
        return self.whole.kept(_from_end(self.whole) > (self.test_U >= 0).long()[self.whole.user_E])


def leave_one_out(events: Interactions) -> Split:
    """Each user's last event is for testing, the one before for validation, the others for training.

    A user with two events has no validation item, with one neither: what is left to train on is never empty.
    """
    enough = events.lengths
    place_E = _from_end(events)
    test = torch.where(enough >= 2, _at(events, 1), -1)
    valid = torch.where(enough >= 3, _at(events, 2), -1)
    held_out = (test >= 0).long() + (valid >= 0).long()
    train = events.kept(place_E > held_out[events.user_E])
    return Split(train=train, valid_U=valid, test_U=test, whole=events)


def _from_end(events: Interactions) -> Tensor:
    """1 for a user's last event, 2 for the one before, and so on, [E]."""
    return events.offsets[1:][events.user_E] - torch.arange(len(events.item_E))


def _at(events: Interactions, from_end: int) -> Tensor:
    """Item that many events from the end of each user; any where there is none."""
    if not len(events.item_E):
        return torch.full((len(events.users),), -1)
    return events.item_E[(events.offsets[1:] - from_end).clamp(min=0)]
