"""The main job of a panel, on real data, from nothing to a report.

    python scripts/demo.py --panel llm
    python scripts/demo.py --panel images

llm: SmolLM2-135M-Instruct aligned with pairs of real customers' reviews; about 8 minutes on 2 CPU cores.
images: the project's own small SDXL-class pipeline draws pictures, the redder of them is preferred, and
Diffusion-DPO learns from the pairs; about 5 minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from triptych.scripts import encode_images, make_preferences, train_diffusion, train_llm

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
OPENMOJI = "asset:openmoji_sdxl"
DRAWING = ("--measure=redness", "--num_per_prompt=3", "--num_steps=20", "--guidance=3", "--batch_size=48")


def llm(folder: Path) -> tuple[int, Path]:
    """The text panel; (exit code, run folder)."""
    recipe = RECIPES / "llm" / "smollm2_dpo_reviews.yaml"
    return train_llm.main(["--config", str(recipe), "--run.output_dir", str(folder)]), folder


def images(folder: Path) -> tuple[int, Path]:
    """The image panel: draw and compare, encode, align; (exit code, run folder). Continues what is there."""
    pairs, data, run = folder / "pairs", folder / "data", folder / "run"
    model = ["--model.name_or_path", OPENMOJI]
    if not pairs.exists():
        # Every second prompt: 160 of 320.
        prompts = (ROOT / "assets" / "openmoji_sdxl" / "prompts.txt").read_text("utf-8").splitlines()[::2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
        drawing = [
            "--measure=redness",
            "--num_per_prompt=3",
            "--num_steps=20",
            "--guidance=3",
            "--batch_size=48",
        ]
        files = ["--prompts", str(folder / "prompts.txt"), "--output_dir", str(pairs)]
        if code := make_preferences.main([*model, *drawing, *files]):
            return code, run
    if code := encode_images.main([*model, "--data.source", str(pairs), "--output_dir", str(data)]):
        return code, run
    recipe = RECIPES / "diffusion" / "openmoji_dpo.yaml"
    places = ["--data.source", str(data), "--run.output_dir", str(run)]
    return train_diffusion.main(["--config", str(recipe), *places]), run


PANELS: dict[str, Callable[[Path], tuple[int, Path]]] = {"llm": llm, "images": images}


def main() -> int:
    """Run the chosen panels one after the other."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--panel", choices=[*PANELS, "all"], default="all")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument(
        "--keep", action="store_true", help="continue an interrupted demo instead of starting anew"
    )
    options = parser.parse_args()
    for panel in PANELS if options.panel == "all" else [options.panel]:
        folder = options.output / panel
        if folder.exists() and not options.keep:
            shutil.rmtree(folder)
        started = time.monotonic()
        code, run = PANELS[panel](folder)
        if code:
            return code
        minutes = (time.monotonic() - started) / 60
        print(
            f"{panel}: {minutes:.1f} minutes on {os.cpu_count()} cores. Open {run / 'report.html'}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
