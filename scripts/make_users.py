"""Vectors of persons from a few of their own preferences, for training and drawing with persons (PPD).

    python scripts/make_users.py --data.source data/pickapic_v2 --output data/pickapic_users.safetensors

Every person with enough pairs gets what a frozen CLIP sees in their preferred pictures less what it sees in
the others, scaled alike for all; a new person costs the same few pairs and no training. Whoever has fewer is
left out and counted. The file is what `model.persons.users` of a recipe reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from triptych.modalities.diffusion.image_scorers import Towers, TransformersTowers
from triptych.modalities.diffusion.images import ImageLimits, open_image
from triptych.modalities.diffusion.persons import pair_vectors, user_embeddings
from triptych.modalities.diffusion.sources import RecordSource, SourceConfig
from triptych.scripts.common import errors_in_one_line, parse, progress, quiet_diffusers
from triptych.training.quarantine import DataError, Quarantine

Pair = tuple[Image.Image, Image.Image]


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """Whose preferences are read, and what is seen in them.

    num_pairs: of each person, the first in the data (the paper: 4). vectors: 'mean' is one a person, 'pairs'
    one a pair, which a picture can attend to or not. clip: a hub name or folder of a transformers CLIPModel;
    processor: of its image processor and tokenizer, if elsewhere. max_users: the first ones.
    """

    data: SourceConfig
    output: str
    num_pairs: int = 4
    vectors: Literal["mean", "pairs"] = "mean"
    clip: str = "openai/clip-vit-large-patch14"
    processor: str | None = None
    batch_size: int = 64
    max_users: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output={self.output} must end in .safetensors")


def run(config: UsersConfig) -> int:
    """Read, look and write; returns the exit code."""
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(output.with_suffix(".quarantine.jsonl"))
    pairs, few, nobody = read_pairs(config, quarantine)
    if quarantine.counts:
        _report(quarantine.summary())
    if not pairs:
        raise ValueError(
            f"{config.data.source}: nobody has {config.num_pairs} pairs ({few} persons have fewer, {nobody} "
            "pairs name nobody); lower num_pairs"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = TransformersTowers.load(
        config.clip, processor=config.processor, revision=None, device=device, dtype="float32"
    )
    made = {"mean": user_embeddings, "pairs": pair_vectors}[config.vectors]
    users = made(seen(towers, pairs, config.batch_size))
    users.save(output)
    _report(
        f"{output}: {len(users)} persons with {config.num_pairs} pairs each; {few} persons with fewer and "
        f"{nobody} pairs of nobody left out"
    )
    return 0


def read_pairs(config: UsersConfig, quarantine: Quarantine) -> tuple[dict[str, list[Pair]], int, int]:
    """The first pairs of everybody who has enough, how many have fewer, and how many pairs name nobody."""
    data = config.data
    limits = ImageLimits(max_pixels=data.max_pixels, min_side=data.min_side, max_aspect=data.max_aspect)
    source = RecordSource(data, quarantine, _report)
    found: dict[str, list[Pair]] = {}
    nobody = 0
    while (record := source.take()) is not None:
        if record.kind != "pair" or record.is_tie:
            continue
        if record.group is None:
            nobody += 1
            continue
        own = found.setdefault(record.group, [])
        if len(own) < config.num_pairs:
            try:
                first, second = (open_image(image, limits=limits) for image in record.images)
            except DataError as error:
                quarantine.add(error)
                continue
            own.append((first, second))
    enough = {name: own for name, own in found.items() if len(own) == config.num_pairs}
    kept = dict(list(enough.items())[: config.max_users])
    return kept, len(found) - len(enough), nobody


def seen(towers: Towers, pairs: dict[str, list[Pair]], batch_size: int) -> dict[str, Tensor]:
    """Features of everybody's pairs, [n, 2, D] each, the preferred picture first."""
    images = [image for own in pairs.values() for pair in own for image in pair]
    parts: list[Tensor] = []
    with progress("pictures", enabled=True)(len(images), 0) as bar:
        for start in range(0, len(images), batch_size):
            parts.append(towers.images(images[start : start + batch_size]).cpu())
            bar.update(min(start + batch_size, len(images)))
    size = 2 * len(next(iter(pairs.values())))
    tables = torch.cat(parts).split(size)
    return {name: table.unflatten(0, (-1, 2)) for name, table in zip(pairs, tables, strict=True)}


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(UsersConfig, args, prog="make_users", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
