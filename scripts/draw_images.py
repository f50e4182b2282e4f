"""Draw pictures of the same prompts from several models, for scorers to compare.

    python scripts/draw_images.py --prompts prompts.txt --output_dir data/drawn \
        --models '{small: {name_or_path: "asset:openmoji_sdxl"}, own: {name_or_path: models/own}}'

The folder holds PNG files and metadata.jsonl, a line {prompt, images, models, seeds} a prompt; its grades
come from scripts/label_images.py. Run the same command again after an interruption and it goes on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from triptych.modalities.diffusion.model import ModelConfig, load_pipeline, locate
from triptych.modalities.diffusion.prompts import read_prompts
from triptych.modalities.diffusion.records import MAX_CANDIDATES
from triptych.modalities.diffusion.rollout import Sampling, generate
from triptych.scripts.common import (
    StopSignal,
    errors_in_one_line,
    parse,
    progress,
    quiet_diffusers,
    save_config,
)
from triptych.training.atomic import sha256_of, write_json, write_synced
from triptych.training.manifest import is_plain_name
from triptych.training.order import key

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class PainterConfig:
    """One model and how it draws; see `ModelConfig` and `Sampling`."""

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_per_prompt: int = 1
    num_steps: int = 30
    guidance: float = 5.0
    batch_size: int = 8
    height: int | None = None
    width: int | None = None
    scheduler: Literal["default", "ddim"] = "default"

    def __post_init__(self) -> None:
        self.sampling(0)

    def model(self) -> ModelConfig:
        """What is loaded."""
        names = ("name_or_path", "revision", "variant", "dtype")
        return ModelConfig(**{name: getattr(self, name) for name in names})

    def sampling(self, seed: int) -> Sampling:
        """How the pictures are drawn."""
        names = [name for name in Sampling.__slots__ if name != "seed"]
        return Sampling(seed=seed, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """What is drawn. models: a name of your own -> model; they are loaded one after the other.

    prompts: a text file, one prompt a line, or JSON lines with a field `prompt`. max_prompts: at most so many
    of them, evenly spread over the file. The noise of a prompt's k-th picture is the same for every model.
    """

    prompts: str
    models: dict[str, PainterConfig]
    output_dir: str
    max_prompts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.models:
            if not is_plain_name(name):
                raise ValueError(f"models: '{name}' is no name of letters, digits, '_', '-' and '.'")
        size = sum(painter.num_per_prompt for painter in self.models.values())
        if not 2 <= size <= MAX_CANDIDATES:
            raise ValueError(
                f"models draw {size} pictures of each prompt (num_per_prompt, summed); 2 to {MAX_CANDIDATES} "
                "can be compared"
            )
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts} must be at least 1")

    def texts(self) -> list[str]:
        """The prompts that are drawn."""
        every = read_prompts(Path(self.prompts))
        number = min(len(every), self.max_prompts or len(every))
        return [every[i * len(every) // number] for i in range(number)]


def run(config: DrawConfig) -> int:
    """Draw what is missing, then list everything; returns the exit code."""
    stop, folder = StopSignal(), Path(config.output_dir)
    prompts = config.texts()
    for name, facts in identity(config).items():
        _claim(folder / "images" / name, facts)
    for name, painter in config.models.items():
        if not _draw(name, painter, prompts, config.seed, folder, stop):
            print("stopped; the same command draws the pictures that are missing", file=sys.stderr)
            return 128 + stop.number
    rows = [_row(i, prompt, config) for i, prompt in enumerate(prompts)]
    write_lines(folder / "metadata.jsonl", rows)
    save_config(config, folder)
    number = sum(len(row["images"]) for row in rows)
    print(f"{folder}: {number:,} pictures of {len(rows):,} prompts by {', '.join(config.models)}")
    return 0


def identity(config: DrawConfig) -> dict[str, dict[str, Any]]:
    """What decides each model's pictures: its settings and weights, the prompts and the seed."""
    prompts = hashlib.sha256("\n".join(config.texts()).encode()).hexdigest()
    found: dict[str, dict[str, Any]] = {}
    contents: dict[str, str] = {}
    for name, painter in config.models.items():
        source = locate(painter.model(), root=ROOT)
        if source not in contents:
            contents[source] = content_of(source)
        settings = {f: v for f, v in asdict(painter).items() if f != "batch_size"}
        if contents[source]:
            settings["name_or_path"] = None  # wherever it lies
        found[name] = settings | {"weights": contents[source], "prompts": prompts, "seed": config.seed}
    return found


def content_of(source: str) -> str:
    """Hash of what a path holds, names included; '' for what is no path, such as the name of a hub model."""
    path = Path(source).expanduser()
    if path.is_file():
        return sha256_of(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    parts = [f"{p.relative_to(path).as_posix()} {sha256_of(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside = path.with_name(f".tmp-{path.name}")
    write_synced(aside, lambda at: at.write_text(text, "utf-8"))
    aside.replace(path)


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Make a model's folder; ValueError when it holds pictures that were drawn otherwise."""
    path = folder / "model.json"
    if path.is_file():
        had = json.loads(path.read_text("utf-8"))
        if other := sorted(k for k in facts.keys() | had.keys() if facts.get(k) != had.get(k)):
            raise ValueError(
                f"{folder} holds pictures of another drawing ({', '.join(other)} differ); give the model "
                "another name, give another output_dir, or remove it"
            )
    else:
        write_json(path, facts)


def _draw(
    name: str, painter: PainterConfig, prompts: Sequence[str], seed: int, folder: Path, stop: StopSignal
) -> bool:
    """The model's missing pictures, as many prompts at a time as fill a batch; False if it was stopped.

    Chunks begin at the same prompts wherever an earlier start ended, so that the files are the same, too.
    """
    k = painter.num_per_prompt
    size = max(1, painter.batch_size // k)
    place = folder / "images" / name
    there = {path.name for path in place.glob("*.png")}
    chunks = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    missing = [c for c in chunks if any(_file(i, j) not in there for i in c for j in range(k))]
    done = len(prompts) - sum(map(len, missing))
    if not missing:
        print(f"{name}: all {len(prompts) * k:,} pictures are there", file=sys.stderr)
        return True
    pipeline = load_pipeline(locate(painter.model(), root=ROOT), painter.model())
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    with progress(f"draw {name}", enabled=True)(len(prompts) * k, done * k) as bar:
        for chunk in missing:
            if stop():
                return False
            texts = [prompts[i] for i in chunk]
            images = generate(pipeline, texts, painter.sampling(seed), first=chunk.start)
            for n, image in enumerate(images):
                file = _file(chunk[n // k], n % k)
                if file not in there:
                    _save(image, place / file)
            done += len(chunk)
            bar.update(done * k)
    del pipeline
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def _row(index: int, prompt: str, config: DrawConfig) -> dict[str, Any]:
    """One line of metadata.jsonl. seeds: of the torch.Generator on the CPU that made each picture's noise."""
    drawn = [(name, j) for name, painter in config.models.items() for j in range(painter.num_per_prompt)]
    return {
        "prompt": prompt,
        "images": [f"images/{name}/{_file(index, j)}" for name, j in drawn],
        "models": [name for name, _ in drawn],
        "seeds": [key("picture", config.seed, index, j) for _, j in drawn],
    }


def _file(index: int, repeat: int) -> str:
    return f"{index:06d}-{repeat:02d}.png"


def _save(image: Image.Image, path: Path) -> None:
    aside = path.with_name(f".tmp-{path.name}")
    write_synced(aside, lambda at: image.save(at, "PNG"))
    os.replace(aside, path)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(DrawConfig, args, prog="draw_images", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
