"""A recommender as a folder that needs nothing else: weights, configuration, items and their semantic ids.

model.safetensors holds the weights, config.json the model's configuration and the window of history,
items.json names and titles in the order of item numbers, index.json the semantic ids, features.json what a
model looks up besides: features of items, names and features of users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.modalities.recsys.features import Feature, Sides
from triptych.modalities.recsys.model import ModelConfig, SessionPolicy
from triptych.modalities.recsys.sasrec import SasRec
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.setup import make_policy
from triptych.training.atomic import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommender:
    """A model with its catalogue. ids: of a session model. window: items of history that it looks at.

    users: names of those that the model knows, where it looks users up. sides: see `make_policy`.
    """

    policy: SessionPolicy | SasRec
    config: ModelConfig
    ids: SemanticIds | None
    items: tuple[str, ...]
    titles: tuple[str, ...]
    window: int
    users: tuple[str, ...] = ()
    sides: Sides | None = None

    def owners(self, names: Sequence[str]) -> Tensor:
        """Number of each user, -1 for one that the model does not know."""
        known = {name: number for number, name in enumerate(self.users)}
        return torch.tensor([known.get(name, -1) for name in names])

    def numbers(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """Numbers of the items that are known, in order, and the names that are not."""
        known = {name: number for number, name in enumerate(self.items)}
        found = [known[n] for n in names if n in known]
        return found, [n for n in names if n not in known]


def export(folder: Path, made: Recommender, *, state: dict[str, Tensor]) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # Tied and sliced weights are saved as tensors of their own.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"model": asdict(made.config), "window": made.window})
    write_json(folder / "items.json", {"items": list(made.items), "titles": list(made.titles)})
    if made.ids is not None:
        made.ids.write(folder / "index.json")
    if made.config.looks_up:
        assert made.sides is not None
        reads_users = bool(made.config.user_vectors or made.config.user_features)
        write_json(
            folder / "features.json",
            {
                "users": list(made.users) if reads_users else [],
                "item_features": _rows(made.sides.item_features, made.config.item_features),
                "user_features": _rows(made.sides.user_features, made.config.user_features),
            },
        )


def load(folder: Path) -> Recommender:
    """Read the folder; ValueError naming the file for one that is absent or does not fit the others."""
    facts, named = _json(folder / "config.json"), _json(folder / "items.json")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, "model")
    try:
        config = parser.instantiate(parser.parse_object({"model": facts["model"]})).model
        items, titles, window = tuple(named["items"]), tuple(named["titles"]), int(facts["window"])
    except Exception as error:
        raise ValueError(
            f"{folder}: config.json and items.json do not describe a recommender: {error}"
        ) from None
    made = config if isinstance(config, ModelConfig) else ModelConfig(**vars(config))
    ids = SemanticIds.read(folder / "index.json", items) if made.kind == "session" else None
    users, sides = _sides(folder, made, len(items))
    policy = make_policy(made, ids, sides)
    path = folder / "model.safetensors"
    try:
        policy.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: these weights do not fit config.json and index.json: {reason}") from None
    return Recommender(
        policy=policy.eval(),
        config=made,
        ids=ids,
        items=items,
        titles=titles,
        window=window,
        users=users,
        sides=sides,
    )


def _rows(features: Mapping[str, Feature], names: Sequence[str]) -> dict[str, Any]:
    return {name: {"values": features[name].values, "rows": features[name].ids_NP.tolist()} for name in names}


def _sides(folder: Path, config: ModelConfig, num_items: int) -> tuple[tuple[str, ...], Sides]:
    """Names of users, and what the model looks up."""
    if not config.looks_up:
        return (), Sides(num_items=num_items)
    found = _json(folder / "features.json")
    try:
        made = {
            what: {
                name: Feature(tuple(one["values"]), torch.tensor(one["rows"], dtype=torch.int64))
                for name, one in found[what].items()
            }
            for what in ("item_features", "user_features")
        }
        users = tuple(found["users"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'features.json'}: does not describe features: {error}") from None
    return users, Sides(num_items=num_items, num_users=len(users), **made)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; give the folder that a run exported") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no object; give the folder that a run exported")
    return found
