"""Groups as tensors and JSON values, for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.training.groups import Group, Verdict
from triptych.training.stages import Port

_TENSOR, _ARRAY = "\x00tensor", "\x00array"


def pack_groups(groups: Sequence[Group], port: Port, prefix: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by name, all beginning with `prefix`, and JSON values that name them."""
    tensors: dict[str, Tensor] = {}

    def put(value: Any, name: str) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            tensors[name] = torch.as_tensor(
                np.array(value) if isinstance(value, np.ndarray) else value
            ).contiguous()
            return {_ARRAY if isinstance(value, np.ndarray) else _TENSOR: name}
        if isinstance(value, Mapping):
            return {str(k): put(v, f"{name}.{k}") for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [put(v, f"{name}.{i}") for i, v in enumerate(value)]
        return value

    packed: list[Any] = []
    for i, group in enumerate(groups):
        entry = {f.name: getattr(group, f.name) for f in fields(group)}
        entry["context"] = port.pack(group.context)
        entry["candidates"] = [port.pack(c) for c in group.candidates]
        entry["verdict"] = {f.name: getattr(group.verdict, f.name) for f in fields(group.verdict)}
        packed.append(put(entry, f"{prefix}{i}"))
    return tensors, packed


def unpack_groups(tensors: Mapping[str, Tensor], packed: Sequence[Any], port: Port) -> list[Group]:
    """The groups that `pack_groups` packed."""

    def get(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            if _ARRAY in value:
                return tensors[value[_ARRAY]].numpy()
            return {k: get(v) for k, v in value.items()}
        return [get(v) for v in value] if isinstance(value, list) else value

    groups: list[Group] = []
    for entry in map(get, packed):
        entry["context"] = port.unpack("context", entry["context"])
        entry["candidates"] = tuple(port.unpack("candidate", c) for c in entry["candidates"])
        entry["verdict"] = Verdict(**entry["verdict"])
        entry["origin"] = tuple(entry["origin"])
        groups.append(Group(**entry))
    return groups
