"""Rows of different lengths laid end to end, so that no layer works on padding.

T values in all, B rows, M the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Jagged:
    """values: [T, ...], row after row. offsets: [B + 1] int64, row b is values[offsets[b]:offsets[b + 1]].

    longest: M, known on the host, so that no layer has to wait for the device. owners: number of the user
    that each row is of, -1 = unknown, [B], or None where nobody asks.
    """

    values: Tensor
    offsets: Tensor
    longest: int
    owners: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Tensor], owners: Tensor | None = None) -> Jagged:
        """Rows laid end to end; ValueError when there is none."""
        if not rows:
            raise ValueError("a jagged tensor needs at least one row")
        lengths = torch.tensor([len(row) for row in rows])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return cls(torch.cat(list(rows)), offsets, int(lengths.max()), owners)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Values of each row, [B]."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """Row of each value, [T]."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.values))

    @property
    def places(self) -> Tensor:
        """Place of each value in its row, [T]."""
        steps = torch.arange(len(self.values), device=self.values.device)
        return steps - self.offsets[:-1][self.rows]

    def to(self, device: torch.device) -> Jagged:
        """The same on a device."""
        values = self.values.to(device, non_blocking=True)
        owners = None if self.owners is None else self.owners.to(device, non_blocking=True)
        return Jagged(values, self.offsets.to(device, non_blocking=True), self.longest, owners)

    def with_values(self, values: Tensor) -> Jagged:
        """The same rows of other values, one for each."""
        return Jagged(values, self.offsets, self.longest, self.owners)


def padded(values_T: Tensor, slots_T: Tensor, *, num_rows: int, longest: int) -> Tensor:
    """values [T, ...] as [B, M, ...], zeros where a row is shorter; slots: row * M + place."""
    flat = values_T.new_zeros(num_rows * longest, *values_T.shape[1:])
    return flat.index_copy(0, slots_T, values_T).view(num_rows, longest, *values_T.shape[1:])
