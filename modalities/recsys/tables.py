"""Tables of embeddings that models look items, users and their features up in.

`TorchTables` is the definition; `sharded_tables.TorchrecTables` gives the same, and its rows may be spread
over ranks. Both keep a table's rows in `embeddings.<name>.weight` of the state dict.

Shapes: T values looked up in all, B rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged

INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table. name: of the feature whose values are looked up in it, as 'item'. num_rows: values it has."""

    name: str
    num_rows: int

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ValueError(f"the table name {self.name!r} must be a word without dots")
        if self.num_rows < 1:
            raise ValueError(f"table {self.name}: num_rows={self.num_rows} must be at least 1")


class Tables(Protocol):
    """What a model uses of its tables."""

    width: int

    def __call__(self, ids: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """Feature name -> vectors of its values, [T_f, D], in the order of values."""
        ...


class TorchTables(nn.Module):
    """One `nn.Embedding` a table, all of one width. ValueError for a name given twice."""

    def __init__(self, specs: Sequence[TableSpec], width: int):
        super().__init__()
        check_specs(specs)
        self.width = width
        self.embeddings = nn.ModuleDict()
        for spec in specs:
            table = nn.Embedding(spec.num_rows, width)
            nn.init.normal_(table.weight, std=INITIAL_STD)
            self.embeddings[spec.name] = table

    def forward(self, ids: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """Feature name -> [T_f, D]; ValueError for a feature without a table."""
        check_features(ids, self.embeddings.keys())
        return {name: self.embeddings[name](jagged.values) for name, jagged in ids.items()}


class ItemTable(nn.Module):
    """Tables as a model's `item_table`: item ids [T] -> [T, D]."""

    def __init__(self, tables: Callable[[Mapping[str, Jagged]], dict[str, Tensor]], feature: str = "item"):
        super().__init__()
        self.tables, self.feature = tables, feature

    def forward(self, items_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        return self.tables({self.feature: one_row(items_T)})[self.feature]


def summed(vectors_TD: Tensor, jagged: Jagged) -> Tensor:
    """Sum over the values of each row, [B, D], zeros for a row without any: features of several values."""
    out = vectors_TD.new_zeros(jagged.num_rows, *vectors_TD.shape[1:])
    return out.index_add(0, jagged.rows, vectors_TD)


def one_row(values_T: Tensor) -> Jagged:
    """All values as a single row."""
    offsets = torch.zeros(2, dtype=torch.int64, device=values_T.device)
    offsets[1] = len(values_T)
    return Jagged(values_T, offsets, len(values_T))


def check_specs(specs: Sequence[TableSpec]) -> None:
    """Raise ValueError unless there is a table and every name is given once."""
    names = [s.name for s in specs]
    if not names:
        raise ValueError("there must be at least one table")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"table {', '.join(twice)} is given twice")


def check_features(ids: Mapping[str, Jagged], names: Iterable[str]) -> None:
    """Raise ValueError for a feature without a table."""
    valid = list(names)
    if odd := [name for name in ids if name not in valid]:
        raise ValueError(f"there is no table for the feature {', '.join(odd)}; there are {', '.join(valid)}")
