"""Encode images and prompts once, so that training reads latents and needs no VAE or text encoder.

    python scripts/encode_images.py --model.name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --data.source 'pickapic/*.parquet' --output_dir data/pickapic_sdxl

Reads Pick-a-Pic v2, HPDv2, HPDv3, ImageReward, metadata.jsonl folders and WebDataset tars. Run the same
command again after an interruption and it goes on where it was. What was left out is listed with its reason
in quarantine.jsonl of the output folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from triptych.modalities.diffusion.encoders import load_encoders
from triptych.modalities.diffusion.encoding import EncodeConfig, encode, size_text
from triptych.modalities.diffusion.sources import RecordSource, num_rows
from triptych.scripts.common import (
    StopSignal,
    errors_in_one_line,
    parse,
    progress,
    quiet_diffusers,
    save_config,
)
from triptych.training.quarantine import Quarantine


def run(config: EncodeConfig) -> int:
    """Encode, and say what was made; returns the exit code."""
    stop = StopSignal()
    folder = Path(config.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before the models, since they take longer to load than a wrong path to be found.
    records = RecordSource(config.data, Quarantine(folder / "quarantine.jsonl"), _report)
    encoders = load_encoders(config.model, root=Path(__file__).resolve().parent.parent, device=device)
    bar = progress("encode", enabled=True)
    facts = encode(config, encoders, records, report=_report, bar=bar, stop=stop)
    if facts is None:
        _report("stopped; the same command continues after the last whole part")
        return 128 + stop.number
    save_config(config, folder)
    for line in _summary(config, facts):
        print(line)
    print(records.quarantine.summary())
    return 0


def _summary(config: EncodeConfig, facts: dict[str, Any]) -> list[str]:
    """What was made, and what it takes on the disk."""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in facts["kinds"].items())
    shapes = ", ".join(f"{number:,} of {shape}" for shape, number in facts["shapes"].items())
    size, images = facts["num_bytes"], facts["num_images"]
    lines = [
        f"{config.output_dir}: {facts['num_records']:,} contexts ({kinds}) for {facts['family']}",
        f"latents: {images:,} images ({shapes})",
        f"size: {size_text(size)}, {size_text(size / images)} an image, prompts included",
    ]
    if facts["num_grouped"]:
        lines.append(f"persons or groups: named by {facts['num_grouped']:,} contexts")
    if facts["num_cut_prompts"]:
        lines.append(f"prompts longer than CLIP reads: {facts['num_cut_prompts']:,}, read up to there")
    rows = num_rows(config.data)
    if config.data.max_records is not None and rows and rows > facts["num_rows"]:
        lines.append(f"all {rows:,} rows would take about {size_text(size * rows / facts['num_rows'])}")
    return lines


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(EncodeConfig, args, prog="encode_images", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
