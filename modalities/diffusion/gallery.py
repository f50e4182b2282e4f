"""Pictures of a run on held-out prompts: before, during and after training, always from the same noise.

Every set of pictures is a folder under `samples/`: PNG files and samples.json, which says what they are of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from triptych.modalities.diffusion.grids import grid
from triptych.modalities.diffusion.image_scoring import ImageScorer, build_scorer, scores_of_images
from triptych.modalities.diffusion.measures import diversity, measure_of
from triptych.modalities.diffusion.model import load_pipeline
from triptych.modalities.diffusion.rollout import Embedded, embed, generate
from triptych.modalities.diffusion.scene import Scene
from triptych.training.atomic import clean_temporary, make_temporary, publish, write_json
from triptych.training.evaluation import estimate
from triptych.training.logs import Progress
from triptych.training.references import trained, unwrapped
from triptych.training.sharding import outside_root, whole

Bar = Callable[[str, int], Progress]
_MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class Pictures:
    """P prompts, K pictures of each, and measure -> P K numbers in the pictures' order."""

    prompts: tuple[str, ...]
    num_per_prompt: int
    images: tuple[Image.Image, ...]
    scores: dict[str, list[float]]

    def groups(self) -> list[tuple[Image.Image, ...]]:
        """The pictures of each prompt, [P][K]."""
        k = self.num_per_prompt
        return [self.images[i : i + k] for i in range(0, len(self.images), k)]

    def clusters(self) -> list[str]:
        """The prompt of each picture, [P K]: the pictures of one do not vary independently."""
        return [prompt for prompt in self.prompts for _ in range(self.num_per_prompt)]


class Studio:
    """The run's own model in its pipeline, with the prompts embedded: loaded when first asked for.

    The text encoders are used once and leave memory. made: the pipeline and its prompts, where they are.
    """

    def __init__(self, scene: Scene, made: tuple[Any, Embedded] | None = None):
        self.scene = scene
        self._scorers: dict[str, ImageScorer] = {
            name: build_scorer(plug) for name, plug in scene.sample.scorers.items()
        }
        self._made = made

    def open(self) -> tuple[Any, Embedded]:
        """(pipeline without text encoders, prompts)."""
        if self._made is None:
            policy = self.scene.policy
            pipeline = load_pipeline(self.scene.source, self.scene.model, denoiser=policy.model)
            parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
            device = next(policy.parameters()).device
            for part in parts.values():
                if part is not policy.model:
                    part.to(device)
            embedded = embed(pipeline, self.scene.prompts)
            pipeline.register_modules(**{name: None for name in parts if name.startswith("text_encoder")})
            self._made = pipeline, embedded
        return self._made

    def pictures(self, folder: Path, weights: str, bar: Callable[[int], Progress]) -> Pictures:
        """Pictures of the policy as it is, kept in `folder`; those that are there are taken if they fit.

        weights: hash of what the policy knows. Where the policy is sharded every rank calls this.
        """
        scene, about = self.scene, {"settings": self.scene.fingerprint(), "weights": weights}
        kept = _read(folder, about)
        if kept is None:
            pipeline, prompts = self.open()
            sampling = scene.sampling()
            total = len(prompts) * sampling.num_per_prompt
            with outside_root(scene.policy), self.autocast(), bar(total) as progress:
                kept = generate(pipeline, prompts, sampling, progress=progress.update)
            if PartialState().is_main_process:
                _write(folder, about | {"prompts": scene.prompts}, kept)
        pictures = Pictures(scene.prompts, scene.sample.num_per_prompt, tuple(kept), {})
        return replace(pictures, scores=self.scores(pictures))

    def scores(self, pictures: Pictures) -> dict[str, list[float]]:
        """What is measured of the pictures, and what the scorers say, by name."""
        images, found = pictures.images, {}
        for name in self.scene.sample.measures:
            found[name] = measure_of(name)(images)
        for name, scorer in self._scorers.items():
            found[name] = scores_of_images(scorer, images, pictures.clusters(), name).tolist()
        return found

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of training."""
        device = next(self.scene.policy.parameters()).device
        low = self.scene.precision == "bf16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)

    def along_the_way(self, folder: Path, *, before: int) -> dict[int, Pictures]:
        """Pictures that this run made during training, by step, of steps below `before`; without scores."""
        found: dict[int, Pictures] = {}
        for place in sorted((folder / "samples").glob("step-*")):
            step = int(place.name.removeprefix("step-"))
            images = _read(place, {"settings": self.scene.fingerprint()}) if step < before else None
            if images is not None:
                k = self.scene.sample.num_per_prompt
                found[step] = Pictures(self.scene.prompts, k, tuple(images), {})
        return found


def sample_base(studio: Studio, folder: Path, *, report: Callable[[str], None], bar: Bar) -> Pictures | None:
    """Pictures before training, kept in samples/base across restarts; None if none are wanted."""
    scene = studio.scene
    if not scene.wanted:
        return None
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    clean_temporary(folder / "samples")
    number = len(scene.prompts) * scene.sample.num_per_prompt
    report(f"samples: {number} pictures of {len(scene.prompts)} held-out prompts, before training and after")
    return studio.pictures(folder / "samples" / "base", "base", lambda total: bar("base", total))


class Gallery:
    """What a run looks like on its way: pictures beside the base's, their measures, diversity and drift.

    drift: how far a policy is from where it started, or None where that is not known.
    """

    def __init__(
        self,
        studio: Studio,
        folder: Path,
        base: Pictures | None,
        bar: Bar,
        drift: Callable[[nn.Module], float | None] | None = None,
    ):
        self._studio, self._folder, self._base, self._bar, self._drift = studio, folder, base, bar, drift

    def look(self, policy: nn.Module, step: int) -> dict[str, float]:
        """Numbers for the log at this step, where sample.every asks for them; pictures go to samples/.

        reward/<measure> and diversity, with 95 % intervals over prompts under <name>_low and <name>_high,
        and drift from the reference. Ranks other than the first call it where the policy is sharded.
        """
        scene = self._studio.scene
        every = scene.sample.every
        if not every or step % every or not scene.wanted:
            return {}
        now = unwrapped(policy)
        values: dict[str, float] = {}
        moved = self.drift(now)
        if moved is not None:
            values["drift"] = moved
        if step == 0 and self._base is not None:
            return values | picture_metrics(self._base)
        place = self._folder / "samples" / step_name(step)
        pictures = self._studio.pictures(
            place, weights_hash(now), lambda total: self._bar(f"samples at step {step}", total)
        )
        if self._base is not None and PartialState().is_main_process:
            sheet = side_by_side({"base": self._base, f"step {step}": pictures})
            (place / "grid.png").write_bytes(sheet)
        return values | picture_metrics(pictures)

    def drift(self, policy: nn.Module) -> float | None:
        """What `drift` says of the policy, in the precision of training."""
        if self._drift is None:
            return None
        with self._studio.autocast():
            return self._drift(policy)


def picture_metrics(pictures: Pictures) -> dict[str, float]:
    """Mean of each measure and the diversity, with the ends of their intervals."""
    found = {
        f"reward/{name}": estimate(torch.tensor(values, dtype=torch.float64), clusters=pictures.clusters())
        for name, values in pictures.scores.items()
    }
    if pictures.num_per_prompt > 1:
        found["diversity"] = estimate(torch.tensor(diversity(pictures.groups()), dtype=torch.float64))
    values: dict[str, float] = {}
    for name, e in found.items():
        values |= {name: e.mean, f"{name}_low": e.low, f"{name}_high": e.high}
    return values


def side_by_side(columns: Mapping[str, Pictures]) -> bytes:
    """A sheet of PNG bytes: a row a picture, at most 16 of them, a column a model; one row has one noise."""
    first = next(iter(columns.values()))
    # One picture of as many prompts as there is room for, then the second of each.
    k, num = first.num_per_prompt, len(first.prompts)
    chosen = sorted(sorted(range(num * k), key=lambda i: (i % k, i))[:_MAX_ROWS])
    rows = [[pictures.images[i] for pictures in columns.values()] for i in chosen]
    titles = [first.prompts[i // k] for i in chosen]
    shown = [titles[0]] + ["" if a == b else b for a, b in pairwise(titles)]
    return grid(rows, list(columns), shown)


def step_name(step: int) -> str:
    """Folder of the pictures at a step."""
    return f"step-{step:06d}"


def weights_hash(policy: nn.Module) -> str:
    """SHA-256 of the trained weights; a collective where they are sharded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(trained(policy).items()):
        value = whole(parameter.detach()).cpu().contiguous()
        digest.update(f"{name}\x1f{value.dtype}\x1f{tuple(value.shape)}\x1f".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(folder: Path, about: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    temporary = make_temporary(folder)
    for i, image in enumerate(images):
        image.save(temporary / _name(i), "PNG")
    write_json(temporary / "samples.json", {**about, "num_images": len(images)})
    publish(temporary, folder)


def _read(folder: Path, about: Mapping[str, Any]) -> list[Image.Image] | None:
    """The pictures of a folder, if samples.json says that they are of this."""
    path = folder / "samples.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    if any(found.get(name) != value for name, value in about.items()):
        return None
    places = [folder / _name(i) for i in range(found["num_images"])]
    return [_opened(place) for place in places] if all(p.is_file() for p in places) else None


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _name(index: int) -> str:
    return f"{index:05d}.png"
