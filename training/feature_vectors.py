"""Feature vectors as scorers read them: their batch, their standardisation, and small networks over them.

Shapes: C candidates, D features, F features of a prompt, M rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Vectors:
    """Feature vectors [C, D]; users: index of each one's user, [C]; prompts: features of its prompt."""

    values: Tensor
    users: Tensor | None = None
    prompts: Tensor | None = None

    def to(self, device: torch.device) -> Vectors:
        """On a device."""
        moved = (None if t is None else t.to(device) for t in (self.users, self.prompts))
        return Vectors(self.values.to(device), *moved)


class Standardise(nn.Module):
    """(x - mean) / scale of each column, fixed from data; a constant column becomes 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    @classmethod
    def of(cls, x: Tensor, known: Tensor | None = None) -> Standardise:
        """From the rows of x, [M, D], counting only those that are `known`."""
        known = torch.ones_like(x, dtype=torch.bool) if known is None else known
        count = known.sum(0).clamp(min=1)
        x = torch.where(known, x, 0.0).double()
        mean = x.sum(0) / count
        spread = (torch.where(known, (x - mean).square(), 0.0).sum(0) / count).sqrt()
        return cls(mean, torch.where(spread > 1e-12 * (1 + mean.abs()), spread, 1.0))

    @classmethod
    def identity(cls, size: int) -> Standardise:
        """That changes nothing."""
        return cls(torch.zeros(size), torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised, [*, D]."""
        return (x - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Back in the data's own units, [*, D]."""
        return x * self.scale + self.mean


def mlp(sizes: Sequence[int], generator: torch.Generator, *, last: float, bias: bool) -> nn.Sequential:
    """Linear layers with GELU between them; the last one's weights are `last` times the usual size."""
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        final = i == len(sizes) - 2
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias or not final)  # type: ignore[assignment]
        with torch.no_grad():
            layer.weight.normal_(0, 1 / math.sqrt(d_in), generator=generator)
            layer.weight.mul_(last if final else 1.0)
            if bias or not final:
                layer.bias.zero_()
        layers += [layer] if final else [layer, nn.GELU()]
    return nn.Sequential(*layers)
