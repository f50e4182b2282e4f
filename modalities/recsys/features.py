"""What is known of items and users besides events: their own vectors, and those of features such as genre.

Shapes: N items or users, P values of a feature at most, T looked up, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.tables import TableSpec


@dataclass(frozen=True, slots=True)
class Feature:
    """A categorical feature of items or of users, of one value or several.

    values: names, whose place is the number. ids_NP: [N, P] int64, -1 where there are fewer.
    """

    values: tuple[str, ...]
    ids_NP: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[str]]) -> Feature:
        """The values of every item or user; names are numbered in alphabetical order."""
        names = sorted({value for row in rows for value in row})
        number = {name: i for i, name in enumerate(names)}
        most = max([1, *map(len, rows)])
        ids = [[*(number[v] for v in row), *[-1] * (most - len(row))] for row in rows]
        return cls(tuple(names), torch.tensor(ids, dtype=torch.int64).view(len(rows), most))

    @property
    def rows(self) -> list[list[str]]:
        """The names again, row by row."""
        return [[self.values[i] for i in row if i >= 0] for row in self.ids_NP.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What a model may look up: numbers of items and users, and features by name."""

    num_items: int
    num_users: int = 0
    item_features: Mapping[str, Feature] = field(default_factory=dict)
    user_features: Mapping[str, Feature] = field(default_factory=dict)


class EntityVectors(nn.Module):
    """Number of an item or user -> sum of its own vector and of its features' values', [T] -> [T, D].

    Zero for -1, somebody unknown. make: specs and width -> tables, pure torch or torchrec's. own: name of the
    table with a row for each, or None for none.
    """

    def __init__(
        self,
        make: Callable[[Sequence[TableSpec], int], nn.Module],
        width: int,
        *,
        own: str | None,
        num: int,
        features: Mapping[str, Feature],
    ):
        super().__init__()
        specs = [TableSpec(own, num)] if own is not None else []
        specs += [TableSpec(name, max(1, len(feature.values))) for name, feature in features.items()]
        self.own, self.names = own, tuple(features)
        self.tables = make(specs, width)
        for name, feature in features.items():
            self.register_buffer(f"of_{name}", feature.ids_NP, persistent=False)

    def forward(self, numbers_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        known_T1 = (numbers_T >= 0).unsqueeze(-1)
        numbers_T = numbers_T.clamp(min=0)
        found = {}
        if self.own is not None:
            found[self.own] = numbers_T.unsqueeze(-1)
        for name in self.names:
            found[name] = self.get_buffer(f"of_{name}")[numbers_T]
        # Places without a value are looked up as 0 and left out afterwards: shapes do not depend on the data,
        # so no device has to be waited for.
        vectors = self.tables({name: _flat(ids_TP) for name, ids_TP in found.items()})
        total = None
        for name, ids_TP in found.items():
            there_TP1 = ((ids_TP >= 0) & known_T1).unsqueeze(-1)
            vectors_TPD = vectors[name].view(*ids_TP.shape, -1)
            part = torch.where(there_TP1, vectors_TPD, 0.0).sum(1)
            total = part if total is None else total + part
        assert total is not None
        return total


def _flat(ids_TP: Tensor) -> Jagged:
    rows, width = ids_TP.shape
    offsets = torch.arange(rows + 1, device=ids_TP.device) * width
    return Jagged(ids_TP.clamp(min=0).flatten(), offsets, width)


def picked(features: Mapping[str, Feature], names: Sequence[str], key: str) -> dict[str, Feature]:
    """The features of these names; ValueError naming the setting for one that the data lack."""
    if odd := [name for name in names if name not in features]:
        have = ", ".join(features) or "none"
        raise ValueError(f"{key}: the data have no feature '{odd[0]}'; they have {have}")
    return {name: features[name] for name in names}
