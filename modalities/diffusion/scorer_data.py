"""What image scorers learn from: pairs of pictures in files, or of encoded latents, with their prompts.

Shapes: N pictures, R pixels of CLIP's square, n pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor

from triptych.modalities.diffusion.cutting import ahead
from triptych.modalities.diffusion.data import DiffusionData, View
from triptych.modalities.diffusion.images import ImageLimits, open_image
from triptych.modalities.diffusion.likelihood import Example
from triptych.modalities.diffusion.records import ImageRecord, ImageSource
from triptych.modalities.diffusion.scorer_config import PictureConfig
from triptych.modalities.diffusion.sources import RecordSource
from triptych.training.logs import Progress
from triptych.training.order import key
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.scoring import ScoreSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePair:
    """Two pictures of one prompt, the chosen one first. names: theirs in a `PictureStore`."""

    sample: ScoreSample
    prompt: str
    names: tuple[str, str]
    source: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPair:
    """Two latents of one prompt, the chosen one first."""

    example: Example
    prompt: str
    weight: float = 1.0

    @property
    def sample(self) -> ScoreSample:
        """What is known of it."""
        e = self.example
        return ScoreSample(id=e.id, grades=(1.0, 0.0), margin=e.margin, strength=e.strength)


def prompt_weights(prompts: Sequence[Any]) -> np.ndarray:
    """1 / (pairs of its prompt) of each pair, times a constant that makes their mean 1, [n] float64.

    So every prompt counts the same, however often people voted on it. PickScore's code divides by the sum of
    a batch's weights; here one constant for all data keeps a pair's weight the same in every batch.
    """
    counts = Counter(prompts)
    return np.asarray([len(prompts) / (len(counts) * counts[p]) for p in prompts], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class PictureStore:
    """Pictures as CLIP's image processor cuts them, each once, as lossless files named by their content.

    folder: where they are kept from run to run; processor: with the PIL backend.
    """

    folder: Path
    processor: Any

    @classmethod
    def of(cls, cache_dir: Path, processor: Any) -> PictureStore:
        """The store of a processor's cut."""
        cut = f"{processor.size} {processor.crop_size} {processor.resample} {processor.do_center_crop}"
        folder = cache_dir / "pictures" / hashlib.sha256(cut.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, processor)

    def add(self, source: ImageSource, limits: ImageLimits) -> str:
        """The name of a picture, which is opened and cut unless it is here; DataError for a bad one."""
        name = source.content_hash()
        path = self._path(name)
        if not path.is_file():
            cut = self._pixels([open_image(source, limits=limits)], do_rescale=False, do_normalize=False)
            path.parent.mkdir(exist_ok=True)
            # Other processes may be writing the same picture.
            aside = path.with_suffix(f".{key(str(id(source)), source.name)}.tmp")
            Image.fromarray(cut[0].permute(1, 2, 0).numpy()).save(aside, "PNG")
            aside.replace(path)
        return name

    def pixels(self, names: Sequence[str]) -> Tensor:
        """Pictures as CLIP reads them, [N, 3, R, R] float32: what the processor makes of the originals."""
        images = []
        for name in names:
            with Image.open(self._path(name), formats=["PNG"]) as image:
                images.append(image.convert("RGB"))
        return self._pixels(images, do_resize=False, do_center_crop=False)

    def _pixels(self, images: list[Image.Image], **options: bool) -> Tensor:
        return self.processor(images=images, return_tensors="pt", **options)["pixel_values"]

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureData:
    """Pairs to learn from and to evaluate on. fingerprint: hash of all of them."""

    train: tuple[PicturePair, ...]
    held_out: tuple[PicturePair, ...]
    fingerprint: str


def load_pictures(
    config: PictureConfig,
    store: PictureStore,
    *,
    seed: int,
    quarantine: Quarantine,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> PictureData:
    """Read every pair, with its pictures opened and stored; what cannot be used goes to `quarantine`.

    ValueError (DataError among them) when nothing is left to learn from.
    """
    read = partial(_read, config, store, quarantine=quarantine, report=report, bar=bar)
    found = read(config.split)
    if config.eval_split is not None:
        away = read(config.eval_split)
        known = {p.prompt for p in away}
        train = [p for p in found if p.prompt not in known]
    else:
        # As encoded data is split: the same prompts are held out of both with one seed.
        held = {p: key("held out", seed, p) / 2**63 < config.eval_share for p in {p.prompt for p in found}}
        train = [p for p in found if not held[p.prompt]]
        away = [p for p in found if held[p.prompt]]
    clear = [p for p in away if p.sample.strength != 0.5]
    held_out = sorted(clear, key=lambda p: key("subset", seed, p.sample.id))[: config.max_eval]
    if not train:
        raise DataError("has nothing left to learn from", source=config.source, remedy=quarantine.summary())
    report(f"data: {config.source}, {len(train)} pairs to learn from, {len(held_out)} held out")
    if quarantine.counts:
        report(f"left out: {quarantine.summary()}")
    facts = [f"{p.sample} {p.prompt} {p.names}" for p in (*train, *held_out)]
    digest = hashlib.sha256("\n".join([*facts, str(len(train))]).encode(errors="surrogatepass")).hexdigest()
    return PictureData(train=tuple(train), held_out=tuple(held_out), fingerprint=digest)


def _read(
    config: PictureConfig,
    store: PictureStore,
    split: str,
    *,
    quarantine: Quarantine,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> list[PicturePair]:
    """The pairs of a split."""
    own = config.of_split(split)
    source = RecordSource(own, quarantine, report)
    limits = ImageLimits(max_pixels=own.max_pixels, min_side=own.min_side, max_aspect=own.max_aspect)
    store_them = partial(_stored, store=store, limits=limits)
    pairs: list[PicturePair] = []
    with (
        ThreadPoolExecutor(config.num_workers) as pool,
        bar(f"pictures, {split}", source.total or 0) as shown,
    ):
        records = iter(source.take, None)
        for record, names in ahead(pool, store_them, records, 2 * config.num_workers):
            if isinstance(names, DataError):
                quarantine.add(names)
            else:
                pairs += _pairs(record, names, config)
            shown.update(source.num_read)
    return pairs


def _stored(
    record: ImageRecord, store: PictureStore, limits: ImageLimits
) -> tuple[ImageRecord, list[str] | DataError]:
    """A record, and the names of its pictures or what is wrong with them."""
    if record.kind == "single":
        return record, DataError("is a single picture", source=record.source, remedy="give pairs or lists")
    try:
        return record, [store.add(image, limits) for image in record.images]
    except DataError as error:
        return record, error


def _pairs(record: ImageRecord, names: Sequence[str], config: PictureConfig) -> Iterator[PicturePair]:
    """The pairs of a record, the better one first; equals of a list make none."""
    given = {*config.keep} | ({"strength"} if config.ties == "half" else set())
    for i, j in combinations(range(len(names)), 2):
        gap = record.relevance[i] - record.relevance[j]
        if gap == 0:
            continue
        better, worse = (i, j) if gap > 0 else (j, i)
        # What a pair's grades differ by means nothing; its margin does where it has one.
        margin = record.margin if record.kind == "pair" else abs(gap)
        strength = 1.0 if record.strength is None else record.strength
        if margin is not None and margin < config.min_margin and strength != 0.5:
            continue
        if margin is None and "margin" in given:
            raise DataError("has no margin", source=record.source, remedy="leave it out of pictures.keep")
        yield PicturePair(
            sample=ScoreSample(
                id=record.id if record.kind == "pair" else f"{record.id}[{better},{worse}]",
                grades=(1.0, 0.0),
                margin=margin if "margin" in given else None,
                strength=strength if "strength" in given else None,
            ),
            prompt=record.prompt,
            names=(names[better], names[worse]),
            source=record.source,
        )


def weighted(pairs: Sequence[PicturePair]) -> tuple[PicturePair, ...]:
    """The pairs with `prompt_weights`."""
    weights = prompt_weights([p.prompt for p in pairs]).tolist()
    return tuple(replace(p, weight=w) for p, w in zip(pairs, weights, strict=True))


@dataclass(frozen=True, slots=True)
class LatentPairs(Sequence[LatentPair]):
    """Encoded pairs with their prompts, read when asked for. weights: [n], None for all 1."""

    view: View
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.view)

    @overload
    def __getitem__(self, index: int) -> LatentPair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LatentPair]: ...
    def __getitem__(self, index: int | slice) -> LatentPair | Sequence[LatentPair]:
        """One pair, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.view[index]
        prompt = self.view.dataset.record(int(self.view.records[index]))["prompt"]
        weight = 1.0 if self.weights is None else float(self.weights[index])
        return LatentPair(example=example, prompt=prompt, weight=weight)

    @classmethod
    def weighted(cls, view: View) -> LatentPairs:
        """With `prompt_weights`."""
        prompts = view.dataset.column("prompt").combine_chunks().dictionary_encode()
        codes = np.asarray(prompts.indices)[view.records]
        return cls(view, prompt_weights(codes.tolist()))


def without_ties(data: DiffusionData) -> DiffusionData:
    """The same data, of whose held-out pairs those that prefer neither side are left out."""
    view = data.held_out
    if view is None:
        return data
    strengths = [view.dataset.record(int(i))["strength"] for i in view.records]
    clear = np.flatnonzero([s != 0.5 for s in strengths])
    kept = replace(view, records=view.records[clear], picks=view.picks[clear])
    clusters = tuple(data.eval_clusters[i] for i in clear.tolist())
    return replace(data, held_out=kept if len(kept) else None, eval_clusters=clusters)
