"""What can be measured of pictures: scalar properties, diversity, a policy's drift, and labels made of them.

A measure takes pictures and gives one number each; none is learnt. R, G, B are in [0, 1] unless said
otherwise, luma is 0.299 R + 0.587 G + 0.114 B (Rec. 601). Transparency counts as white.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from triptych.modalities.diffusion.likelihood import DiffusionBatch, ElboLikelihood
from triptych.training.atomic import make_temporary, publish
from triptych.training.evaluation import estimate
from triptych.training.references import Reference, unchanged
from triptych.training.stats import Estimate

Measure = Callable[[Sequence[Image.Image]], list[float]]
Pairs = Literal["best_worst", "all"]
_COLOURED = 0.2
_PAPER = 0.9


def redness(images: Sequence[Image.Image]) -> list[float]:
    """mean (R - B), in [-1, 1]."""
    return [float((a[..., 0] - a[..., 2]).mean()) for a in map(_array, images)]


def warm_share(images: Sequence[Image.Image]) -> list[float]:
    """Share of the coloured pixels whose hue is red to yellow, 345 to 70 degrees, in [0, 1].

    Coloured: max(R, G, B) - min(R, G, B) > 0.2, so that neither black nor white outvotes a picture's colours.
    0 where nothing is coloured.
    """
    shares = []
    for a in map(_array, images):
        chroma = a.max(-1) - a.min(-1)
        coloured = chroma > _COLOURED
        hue = _hue(a, chroma)[coloured]
        shares.append(float(((hue >= 345) | (hue <= 70)).mean()) if hue.size else 0.0)
    return shares


def colourfulness(images: Sequence[Image.Image]) -> list[float]:
    """sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), 0 for grey to about 180.

    rg = R - G, yb = (R + G) / 2 - B with R, G, B in [0, 255]. Hasler & Suesstrunk 2003, eq. 3.
    """
    values = []
    for a in map(_array, images):
        red, green, blue = (255 * a[..., i] for i in range(3))
        rg, yb = red - green, (red + green) / 2 - blue
        values.append(float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())))
    return values


def brightness(images: Sequence[Image.Image]) -> list[float]:
    """Mean luma, in [0, 1]."""
    return [float(_luma(a).mean()) for a in map(_array, images)]


def saturation(images: Sequence[Image.Image]) -> list[float]:
    """mean (max - min) / max of R, G, B (0 for black), the S of HSV, in [0, 1]."""
    values = []
    for a in map(_array, images):
        top = a.max(-1)
        values.append(float(np.divide(top - a.min(-1), top, out=np.zeros_like(top), where=top > 0).mean()))
    return values


def ink(images: Sequence[Image.Image]) -> list[float]:
    """Share of pixels that are not white, min(R, G, B) < 0.9, in [0, 1]."""
    return [float((a.min(-1) < _PAPER).mean()) for a in map(_array, images)]


def sharpness(images: Sequence[Image.Image]) -> list[float]:
    """Variance over inner pixels of up + down + left + right - 4 luma, the Laplacian; 0 or more.

    Pech-Pacheco et al. 2000. Noise counts as sharp.
    """
    values = []
    for y in (_luma(a) for a in map(_array, images)):
        laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        values.append(float(laplacian.var()) if laplacian.size else 0.0)
    return values


def jpeg_size(images: Sequence[Image.Image]) -> list[float]:
    """Thousands of bytes of the picture as JPEG of quality 95 (Black et al. 2024, section 5.1)."""
    values = []
    for image in images:
        buffer = io.BytesIO()
        on_white(image).save(buffer, "JPEG", quality=95)
        values.append(buffer.tell() / 1000)
    return values


MEASURES: dict[str, Measure] = {
    f.__name__: f
    for f in (redness, warm_share, colourfulness, brightness, saturation, ink, sharpness, jpeg_size)
}


def measure_of(name: str) -> Measure:
    """The measure of a name; ValueError naming the valid ones."""
    if name not in MEASURES:
        raise ValueError(f"measure '{name}' is not one of {', '.join(sorted(MEASURES))}")
    return MEASURES[name]


def diversity(images_by_prompt: Sequence[Sequence[Image.Image]]) -> list[float]:
    """Mean over a prompt's pairs of pictures of sqrt(mean (a - b)^2), in [0, 1]; one number a prompt.

    0 when all pictures of a prompt are the same. ValueError for a prompt with fewer than two.
    """
    values = []
    for images in images_by_prompt:
        if len(images) < 2:
            raise ValueError(f"diversity needs at least 2 pictures of every prompt, not {len(images)}")
        arrays = [_array(image) for image in images]
        values.append(float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(arrays, 2)])))
    return values


def diversity_estimate(images_by_prompt: Sequence[Sequence[Image.Image]], *, seed: int = 0) -> Estimate:
    """Mean of `diversity` with a 95 % bootstrap interval over prompts."""
    return estimate(torch.tensor(diversity(images_by_prompt), dtype=torch.float64), seed=seed)


@torch.no_grad()
def drift(
    likelihood: ElboLikelihood, policy: nn.Module, reference: Reference, batches: Sequence[DiffusionBatch]
) -> Tensor:
    """mean (e_policy - e_ref)^2 over latent numbers, candidates and draws of each context, [num_contexts].

    e: what the model predicts (eps, v or the flow's velocity) at the batches' own times and noise, on the
    policy's device. float64, on the CPU.
    """
    found: list[Tensor] = []
    device = next(policy.parameters()).device
    for batch in (b.to(device) for b in batches):
        with reference.active(policy) as other:
            theirs = likelihood.predict(other, batch)
        with unchanged(policy):
            mine = likelihood.predict(policy, batch)
        sums, counts = torch.zeros(2, batch.size, dtype=torch.float64)
        for stack, a, b in zip(batch.stacks, mine, theirs, strict=True):
            squared = (a.float() - b.float()).square().flatten(1).mean(1).cpu().double()
            sums.index_add_(0, stack.prompt.cpu(), squared)
            counts.index_add_(0, stack.prompt.cpu(), torch.ones_like(squared))
        found.append(sums / counts)
    return torch.cat(found)


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """Pictures with what a measure says of them: scores [P, K], and pairs of (prompt, better, worse)."""

    prompts: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    pairs: tuple[tuple[int, int, int], ...]


def label_pairs(
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    measure: Measure,
    *,
    pairs: Pairs = "best_worst",
    margin: float = 0.0,
) -> LabelledPictures:
    """Pairs of the pictures of each prompt, the one that measures higher first.

    pairs: the two ends of each prompt's ranking, or all of its pairs. margin: pairs whose difference is not
    above it are left out, ties always. ValueError for a score that is not finite.
    """
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs '{pairs}' is not one of {', '.join(get_args(Pairs))}")
    if len(prompts) != len(images) or not margin >= 0:
        raise ValueError(
            f"{len(prompts)} prompts for {len(images)} groups of pictures, margin {margin}: "
            "one group a prompt and a margin of 0 or more are needed"
        )
    flat = measure([image for group in images for image in group])
    if not np.isfinite(flat).all():
        raise ValueError("the measure gave inf or nan for a picture")
    given = iter(flat)
    scores = tuple(tuple(next(given) for _ in group) for group in images)
    found: list[tuple[int, int, int]] = []
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        ends = [(order[0], order[-1])] if len(order) > 1 else []
        for better, worse in ends if pairs == "best_worst" else combinations(order, 2):
            if row[better] - row[worse] > margin:
                found.append((i, better, worse))
    return LabelledPictures(tuple(prompts), tuple(map(tuple, images)), scores, tuple(found))


def write_pairs(labelled: LabelledPictures, folder: Path) -> int:
    """A folder of PNG files with metadata.jsonl, a line {prompt, chosen, rejected, margin} a pair.

    margin: the difference of the two scores. Returns the number of lines; ValueError when there is none.
    """
    used = {(i, k) for i, better, worse in labelled.pairs for k in (better, worse)}
    lines = [
        {
            "prompt": labelled.prompts[i],
            "chosen": _file(i, better),
            "rejected": _file(i, worse),
            "margin": labelled.scores[i][better] - labelled.scores[i][worse],
        }
        for i, better, worse in labelled.pairs
    ]
    return _write(labelled, sorted(used), lines, folder)


def write_lists(labelled: LabelledPictures, folder: Path) -> int:
    """As `write_pairs`, a line {prompt, images, scores} a prompt whose pictures do not all tie."""
    kept = [i for i, row in enumerate(labelled.scores) if len(set(row)) > 1]
    used = [(i, k) for i in kept for k in range(len(labelled.scores[i]))]
    lines = [
        {
            "prompt": labelled.prompts[i],
            "images": [_file(i, k) for k in range(len(labelled.scores[i]))],
            "scores": list(labelled.scores[i]),
        }
        for i in kept
    ]
    return _write(labelled, used, lines, folder)


def _write(
    labelled: LabelledPictures,
    used: Sequence[tuple[int, int]],
    lines: Sequence[Mapping[str, Any]],
    folder: Path,
) -> int:
    if not lines:
        raise ValueError("no pair is left: every prompt's pictures tie, or differ by less than the margin")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(folder)
    (temporary / "images").mkdir()
    for i, k in used:
        labelled.images[i][k].save(temporary / _file(i, k), "PNG")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (temporary / "metadata.jsonl").write_text(text, "utf-8")
    publish(temporary, folder)
    return len(lines)


def _file(prompt: int, repeat: int) -> str:
    return f"images/{prompt:05d}-{repeat:02d}.png"


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent is white."""
    if image.mode == "RGB":
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] float64 in [0, 1]."""
    return np.asarray(on_white(image), dtype=np.float64) / 255


def _luma(array: np.ndarray) -> np.ndarray:
    return array @ np.array([0.299, 0.587, 0.114])


def _hue(array: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Hue in degrees, [H, W] in [0, 360); without meaning where the chroma is 0."""
    red, green, blue = (array[..., i] for i in range(3))
    safe = np.where(chroma > 0, chroma, 1.0)
    sector = np.select(
        [array.argmax(-1) == 0, array.argmax(-1) == 1],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return 60 * sector
