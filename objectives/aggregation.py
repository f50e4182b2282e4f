"""From losses per unit [B, U] to losses per row [B] whose mean over rows is the method's loss.

B rows, U units (tokens, turns, denoising steps, slots). Every function takes the loss and the mask, ignores
whatever padding holds, and gives 0 for a row without units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.objectives.inputs import UnitLogLik


def clean(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 in place of padding, [*]: a `where`, for padding may hold NaN or infinity."""
    return torch.where(mask, x, 0.0)


def unit_field(units: UnitLogLik, name: str) -> Tensor:
    """The named field of `units`, [B, U], with 0 in place of padding; ValueError when it is absent."""
    value: Tensor | None = getattr(units, name)
    if value is None:
        raise ValueError(f"this objective needs UnitLogLik.{name}, which is None")
    return clean(value, units.mask)


def row_sum(loss: Tensor, mask: Tensor) -> Tensor:
    """sum_u loss_u, [B]: every unit weighs the same, and long rows weigh more."""
    return clean(loss, mask).sum(-1)


def row_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """sum_u loss_u / |row|, [B]: every row weighs the same (GRPO), so units of long rows weigh less."""
    return row_sum(loss, mask) / mask.sum(-1).clamp(min=1)


def batch_mean(loss: Tensor, mask: Tensor, num_units: Tensor | None = None) -> Tensor:
    """B sum_u loss_u / (units in the batch), [B]: the mean over rows is the mean over all units (DAPO, PPO).

    num_units: units per row of the whole batch, [B]; each row is its sum divided by it. Without it couples
    the batch: cut into micro-batches, each part would be divided by its own number of units.
    """
    per_row = mask.sum() / mask.shape[0] if num_units is None else num_units
    return row_sum(loss, mask) / per_row.clamp(min=1e-6)
