"""Aspect buckets, and one crop and one flip for all images of a context.

What people compared were whole images; what is learnt from them must show the same part of each. So a context
has one bucket, one relative crop position and one flip, and each image its own SDXL time ids.

Sizes are (height, width) in pixels throughout, as in the time ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.training.order import key
from triptych.training.quarantine import DataError

Size = tuple[int, int]
Crop = Literal["center", "random"]
TOO_SMALL = "is much smaller than what it would be enlarged to"
_LEAST_AREA = Fraction(9, 10)


def buckets(resolution: int, *, step: int = 64, square: bool = False) -> tuple[Size, ...]:
    """All sizes in multiples of `step` with 90 to 100 % of the area resolution^2, sides half to twice it.

    At 1024 and 64 these are the 40 buckets of SDXL (Podell et al. 2023, appendix I) and 704 x 1344 turned
    round, which is missing there, so that every bucket has its mirror image. square: the one size alone.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"resolution={resolution} must be a multiple of bucket_step={step}")
    if square:
        return ((resolution, resolution),)
    area = resolution**2
    sides = [s for s in range(step, 2 * resolution + 1, step) if 2 * s >= resolution]
    return tuple((h, w) for h in sides for w in sides if _LEAST_AREA * area <= h * w <= area)


def choose_bucket(sizes: Sequence[Size], choices: Sequence[Size]) -> Size:
    """The bucket whose log aspect is nearest to the mean log aspect (width / height) of the images."""
    mean = math.fsum(math.log(w / h) for h, w in sizes) / len(sizes)

    def rank(size: Size) -> tuple[float, int, int]:
        # Rounded, so that mirrored buckets at the same distance are told apart by rule, not by rounding.
        return round(abs(math.log(size[1] / size[0]) - mean), 9), -size[0] * size[1], size[0]

    return min(choices, key=rank)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every crop of a context lies and whether it is mirrored.

    position: (down, right) among the possible ones, in [0, 1]: 0 is the top or left edge, 1/2 the middle.
    """

    position: tuple[float, float] = (0.5, 0.5)
    flipped: bool = False


def place(seed: int, context: str, *, crop: Crop, flip: float) -> Placement:
    """The placement of a context, a function of the seed and its id. flip: probability of a mirror image."""
    generator = np.random.Generator(np.random.Philox(key=key("crop", seed, context)))
    down, right, coin = generator.random(3).tolist()
    if crop == "center":
        down = right = 0.5
    return Placement((down, right), coin < flip)


@dataclass(frozen=True, slots=True)
class Window:
    """What is cut out of one image: mirrored if flipped, resized by `scale`, then cropped.

    top, left: first row and column of the crop in pixels of the mirrored and resized image.
    """

    original: Size
    target: Size
    scale: Fraction
    top: int
    left: int
    flipped: bool

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(original height, original width, top, left, target height, target width), SDXL section 2.2.

        Original sizes are those of the file; top and left count pixels of the resized image, after the flip:
        a crop 16 pixels from the left edge with 48 more to its right has left 16, and left 48 when mirrored.
        That is what diffusers' SDXL scripts do since they flip before they crop.
        """
        return (*self.original, self.top, self.left, *self.target)


def window(size: Size, bucket: Size, placement: Placement, *, max_upscale: float) -> Window:
    """The window of an image of this size: the largest part with the bucket's aspect, never distorted.

    The resized image covers the bucket and is as long as it in one direction. DataError for an image that
    would be enlarged more than max_upscale times.
    """
    scale = max(Fraction(b, s) for b, s in zip(bucket, size, strict=True))
    if scale > max_upscale:
        raise DataError(
            TOO_SMALL,
            remedy=f"it is {size[0]}x{size[1]} (height x width) for {bucket[0]}x{bucket[1]}, beyond "
            f"max_upscale={max_upscale:g}; give a larger image, a lower resolution or a higher max_upscale",
        )
    slack = [math.floor(s * scale) - b for s, b in zip(size, bucket, strict=True)]
    top, left = (math.floor(at * room + 0.5) for at, room in zip(placement.position, slack, strict=True))
    return Window(size, bucket, scale, top, slack[1] - left if placement.flipped else left, placement.flipped)


def cut(image: Image.Image, part: Window) -> Image.Image:
    """The pixels of a window, antialiased: mirroring, resizing (Lanczos) and cropping in one pass."""
    assert (image.height, image.width) == part.original
    height, width = part.target
    if part.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    edges = (part.left, part.top, part.left + width, part.top + height)
    left, top, right, bottom = (float(edge / part.scale) for edge in edges)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as the VAE takes it: [3, H, W] float32 in [-1, 1], black -1 and white 1."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    return values.permute(2, 0, 1).to(torch.float32) / 127.5 - 1
