"""Semantic ids: a few codes for every item, coarse to fine, and what to do where two items share them.

Shapes: I items, L levels, K_l codes of level l.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from triptych.training.atomic import write_json
from triptych.training.quarantine import DataError

Collisions = Literal["keep", "suffix", "reassign"]
_TOKEN = re.compile(r"<([a-z])_(\d{1,9})>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticIds:
    """codes_IL: int64, codes of level l from 0 to sizes[l] - 1. items: names, in the order of numbers."""

    codes_IL: Tensor
    sizes: tuple[int, ...]
    items: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.codes_IL.shape != (len(self.items), len(self.sizes)) or not self.sizes:
            raise ValueError(
                f"codes_IL is {list(self.codes_IL.shape)}; expected [{len(self.items)}, {len(self.sizes)}]"
            )
        if len(self.sizes) > len(_LETTERS):
            raise ValueError(f"{len(self.sizes)} levels are more than the {len(_LETTERS)} that have a letter")
        sizes = torch.tensor(self.sizes)
        if len(self.items) and bool(((self.codes_IL < 0) | (self.codes_IL >= sizes)).any()):
            raise ValueError(f"codes must be from 0 to below the sizes {self.sizes}")

    def groups(self) -> tuple[Tensor, Tensor]:
        """Number of the id of every item, [I], and how many items each id has, [number of ids]."""
        _, group_I, count = self.codes_IL.unique(dim=0, return_inverse=True, return_counts=True)
        return group_I, count

    @property
    def num_colliding(self) -> int:
        """Items that share their id with another."""
        group_I, count = self.groups()
        return int((count[group_I] > 1).sum())

    def without_collisions(self, policy: Collisions, *, order: Tensor | None = None) -> SemanticIds:
        """Ids of which none is shared, but for 'keep'.

        'suffix': one more level, counting the items of an id (TIGER, 2305.05065, 3.1). 'reassign': items
        after the first of an id take a free code of the last level, the next one up; ValueError when a
        prefix has more items than codes. order: which item comes first, such as by popularity.
        """
        if policy == "keep" or not self.num_colliding:
            return self
        order = torch.arange(len(self.items)) if order is None else order
        if policy == "suffix":
            group_I, _ = self.groups()
            place_I = _places(group_I, order)
            codes = torch.cat([self.codes_IL, place_I.unsqueeze(1)], 1)
            return SemanticIds(codes_IL=codes, sizes=(*self.sizes, int(place_I.max()) + 1), items=self.items)
        return self._reassigned(order)

    def _reassigned(self, order: Tensor) -> SemanticIds:
        size, codes = self.sizes[-1], self.codes_IL.clone()
        taken: dict[tuple[int, ...], set[int]] = {}
        for item in order.tolist():
            *prefix, last = codes[item].tolist()
            used = taken.setdefault(tuple(prefix), set())
            free = next(((last + i) % size for i in range(size) if (last + i) % size not in used), None)
            if free is None:
                raise ValueError(
                    f"{size + 1} items share the first codes {prefix} and the last level has {size}: take "
                    "more codes or levels, or collisions=suffix"
                )
            used.add(free)
            codes[item, -1] = free
        return SemanticIds(codes_IL=codes, sizes=self.sizes, items=self.items)

    def write(self, path: Path) -> None:
        """{item: ["<a_1>", "<b_7>", ...]}: the layout of LC-Rec, LETTER and others."""
        rows = zip(self.items, self.codes_IL.tolist(), strict=True)
        found = {
            name: [f"<{letter}_{code}>" for letter, code in zip(_LETTERS, row, strict=False)]
            for name, row in rows
        }
        write_json(path, found)

    @classmethod
    def read(cls, path: Path, items: Sequence[str] | None = None) -> SemanticIds:
        """Ids of all `items`, or of all in the file. DataError names file and item."""
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError("cannot be read", source=str(path), remedy=str(error)) from None
        if not isinstance(found, dict) or not found:
            raise DataError("is not {item: [code, ...]}", source=str(path), remedy="see the LETTER layout")
        names = tuple(found) if items is None else tuple(items)
        if missing := [name for name in names if name not in found]:
            remedy = f"{len(missing)} items have none, such as {missing[0]}; leave them out of the events"
            raise DataError("lacks ids", source=str(path), remedy=remedy)
        rows = [_codes(found[name], f"{path}[{name}]") for name in names]
        if odd := next((n for n, row in zip(names, rows, strict=True) if len(row) != len(rows[0])), None):
            raise DataError(f"has ids of {len(rows[0])} levels and others", source=f"{path}[{odd}]")
        codes = torch.tensor(rows, dtype=torch.int64)
        every = torch.tensor([_codes(row, str(path)) for row in found.values() if len(row) == codes.shape[1]])
        sizes = tuple((every.amax(0) + 1).tolist())
        return cls(codes_IL=codes, sizes=sizes, items=names)


def _codes(row: object, source: str) -> list[int]:
    """Numbers of one id; its letters must be those of the levels, in order."""
    parts = (
        [_TOKEN.fullmatch(t) if isinstance(t, str) else None for t in row]
        if isinstance(row, list)
        else [None]
    )
    good = [p for p in parts if p is not None]
    letters = "".join(p[1] for p in good)
    if not good or len(good) != len(parts) or not _LETTERS.startswith(letters):
        remedy = 'write ["<a_1>", "<b_7>", ...], a letter a level'
        raise DataError("is not a semantic id", source=source, remedy=remedy, preview=row)
    return [int(p[2]) for p in good]


def _places(group_I: Tensor, order: Tensor) -> Tensor:
    """How many items of the same group come before each item in this order, [I]."""
    grouped = group_I[order]
    by_group = grouped.argsort(stable=True)
    sorted_groups = grouped[by_group]
    starts = torch.searchsorted(sorted_groups, sorted_groups)
    place = torch.empty_like(group_I)
    place[order[by_group]] = torch.arange(len(group_I)) - starts
    return place
