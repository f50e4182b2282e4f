"""The images of a record, opened and cut to one bucket; what cannot be used is left out with its reason.

Work for threads: nothing here has state, and decoding and resizing let other threads run.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from triptych.modalities.diffusion.crops import (
    Crop,
    Placement,
    Size,
    Window,
    choose_bucket,
    cut,
    place,
    window,
)
from triptych.modalities.diffusion.images import ImageLimits, open_image
from triptych.modalities.diffusion.records import ImageRecord, ImageSource
from triptych.training.quarantine import DataError

PAIR_BROKEN = "lost an image of its pair"
LIST_BROKEN = "has fewer than two images left"
# Whole images of one record are held up to here; the others are decoded twice.
_HELD_PIXELS = 64_000_000
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How images are opened and cut. sizes: the buckets; the rest as in `crops`."""

    sizes: tuple[Size, ...]
    crop: Crop
    flip: float
    max_upscale: float
    seed: int
    limits: ImageLimits


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as it is shown. index: its place in the record.

    content: hash of its bytes, ending in ':mirrored' where it is flipped.
    """

    index: int
    source: ImageSource
    content: str
    part: Window
    image: Image.Image

    @property
    def key(self) -> tuple[str, Window]:
        """What decides every pixel."""
        return self.content, self.part


@dataclass(frozen=True, slots=True)
class CutRecord:
    """A record, its usable images and the reasons against the others. It keeps no encoded bytes."""

    record: ImageRecord
    pictures: tuple[Picture, ...]
    errors: tuple[DataError, ...]


def enough(record: ImageRecord, num_left: int) -> DataError | None:
    """Why a record cannot be used with so many of its images, or None if it can.

    A single image that is left out speaks for itself.
    """
    if record.kind == "single" or num_left == len(record.images):
        return None
    if record.kind == "pair":
        return DataError(PAIR_BROKEN, source=record.source, remedy="see the image's own line")
    if num_left < 2:
        return DataError(LIST_BROKEN, source=record.source, remedy="see the images' own lines")
    return None


def cut_record(record: ImageRecord, cutting: Cutting) -> CutRecord:
    """Open a record's images, choose the bucket of those that can be used, and cut them at one place."""
    errors: list[DataError] = []
    opened: dict[int, tuple[str, Size, Image.Image | None]] = {}
    num_held = 0
    for index, source in enumerate(record.images):
        try:
            content, image = _open(source, cutting.limits)
        except DataError as error:
            errors.append(error)
            continue
        num_held += image.width * image.height
        size = (image.height, image.width)
        opened[index] = content, size, image if num_held <= _HELD_PIXELS else None
    placement = place(cutting.seed, record.id, crop=cutting.crop, flip=cutting.flip)
    parts, refused = _windows({i: size for i, (_, size, _) in opened.items()}, placement, cutting)
    errors += [record.images[i].error(e.reason, e.remedy) for i, e in refused.items()]
    pictures = []
    if enough(record, len(parts)) is None:
        for index, part in parts.items():
            content, _, image = opened.pop(index)
            source = record.images[index]
            image = image or _open(source, cutting.limits)[1]
            shown = f"{content}:mirrored" if part.flipped else content
            pictures.append(Picture(index, _without_data(source), shown, part, cut(image, part)))
    light = replace(record, images=tuple(_without_data(source) for source in record.images))
    return CutRecord(light, tuple(pictures), tuple(errors))


def _windows(
    sizes: dict[int, Size], placement: Placement, cutting: Cutting
) -> tuple[dict[int, Window], dict[int, DataError]]:
    """Each image's window in their bucket; those too small for it are refused and have no say in it."""
    refused: dict[int, DataError] = {}
    while left := {i: size for i, size in sizes.items() if i not in refused}:
        bucket = choose_bucket(list(left.values()), cutting.sizes)
        parts: dict[int, Window] = {}
        for index, size in left.items():
            try:
                parts[index] = window(size, bucket, placement, max_upscale=cutting.max_upscale)
            except DataError as error:
                refused[index] = error
        if len(parts) == len(left):
            return parts, refused
    return {}, refused


def _open(source: ImageSource, limits: ImageLimits) -> tuple[str, Image.Image]:
    data = source.read(limits.max_bytes)
    image = open_image(replace(source, data=data, path=None), limits=limits)
    return hashlib.sha256(data).hexdigest(), image


def _without_data(source: ImageSource) -> ImageSource:
    return source if source.data is None else replace(source, data=None, path=Path(source.name))


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[U]:
    """work(item) of each item in order, at most `depth` of them begun before they are asked for."""
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
