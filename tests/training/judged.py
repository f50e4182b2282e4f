"""Judged groups for the tests of shapes and credits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from triptych.training.groups import Group, Verdict

# What padding may hold, and nobody may read.
JUNK = float("nan")


def group(verdict: Mapping[str, Any] | list[float], lengths: Sequence[int] = (), **given: Any) -> Group:
    """A group from lists: its verdict (scores, or fields by name), its rows' lengths (1), other fields."""
    said = {"score": verdict} if isinstance(verdict, list) else dict(verdict)
    tensors: dict[str, Any] = {
        k: torch.tensor(v) if isinstance(v, list) else v for k, v in {**said, **given}.items()
    }
    size = len(lengths) or next(len(v) for v in tensors.values() if isinstance(v, torch.Tensor))
    lengths = list(lengths) or [1] * size
    return Group(
        candidates=tuple(range(size)),
        mask=torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1),
        verdict=Verdict(**{k: tensors[k] for k in said}),
        **{"key": "g", "context": "x", **{k: tensors[k] for k in given}},
    )
