"""The main job of a panel, on real data, from nothing to a report.

    python scripts/demo.py --panel llm
    python scripts/demo.py --panel images
    python scripts/demo.py --panel recsys

llm: SmolLM2-135M-Instruct aligned with pairs of real customers' reviews; about 8 minutes on 2 CPU cores.
images: the project's own small SDXL-class pipeline draws pictures, five scorers vote on them, and three
methods learn from the votes: Diffusion-DPO from pairs, RankDPO from lists, SPO from its own denoising steps.
They are drawn beside the base from the same noise and judged by what no scorer saw; about 5 minutes.
recsys: a session model with semantic ids learns MovieLens-100k from nothing and recommends films by title,
beside classical recommenders; about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from triptych.scripts import (
    ai_feedback,
    compare_images,
    train_diffusion,
    train_diffusion_online,
    train_llm,
    train_recsys,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
OPENMOJI = "asset:openmoji_sdxl"


def llm(folder: Path) -> tuple[int, Path]:
    """The text panel; (exit code, run folder)."""
    recipe = RECIPES / "llm" / "smollm2_dpo_reviews.yaml"
    return train_llm.main(["--config", str(recipe), "--run.output_dir", str(folder)]), folder


def images(folder: Path) -> tuple[int, Path]:
    """The image panel: draw, vote, align in three ways, compare; (exit code, folder of the comparison)."""
    recipes, compared = RECIPES / "diffusion", folder / "compared"
    # Every second prompt is learnt from; the others are drawn at the end.
    prompts = (ROOT / "assets" / "openmoji_sdxl" / "prompts.txt").read_text("utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.txt" for name in ("learnt", "held_out")}
    for name, part in (("learnt", prompts[::2]), ("held_out", prompts[1::2])):
        files[name].write_text("\n".join(part) + "\n", "utf-8")
    runs = {"pairs": folder / "run", "ranked": folder / "ranked", "steps": folder / "steps"}
    models = json.dumps({name: str(run) for name, run in runs.items()})
    steps: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (
            ai_feedback.main,
            [
                *("--config", str(recipes / "openmoji_ai_feedback.yaml"), "--output_dir", str(folder)),
                *("--draw.prompts", str(files["learnt"]), "--label.form", "lists"),
                *("--train.data.form", "pairs", "--train.optim.num_steps", "80"),
                *("--train.sample.num_prompts", "12", "--train.sample.num_per_prompt", "2"),
            ],
        ),
        (
            train_diffusion.main,
            [
                *("--config", str(recipes / "openmoji_rankdpo.yaml")),
                *("--data.source", str(folder / "data"), "--run.output_dir", str(runs["ranked"])),
            ],
        ),
        (
            train_diffusion_online.main,
            [
                *("--config", str(recipes / "online" / "openmoji_spo.yaml")),
                *("--prompts.source", str(files["learnt"]), "--run.output_dir", str(runs["steps"])),
            ],
        ),
        (
            compare_images.main,
            [
                *("--model.name_or_path", OPENMOJI, "--models", models, "--prompts", str(files["held_out"])),
                *(
                    "--output_dir",
                    str(compared),
                    "--sample.num_prompts",
                    "40",
                    "--sample.num_per_prompt",
                    "2",
                ),
                *("--sample.num_steps", "20", "--sample.guidance", "3", "--sample.batch_size", "40"),
                *("--sample.measures", '["warm_share", "redness", "saturation", "brightness"]'),
            ],
        ),
    ]
    for run, words in steps:
        if code := run(words):
            return code, compared
    return 0, compared


def recsys(folder: Path) -> tuple[int, Path]:
    """The recommender panel; (exit code, run folder)."""
    recipe = RECIPES / "recsys" / "movielens_onerec_lazy.yaml"
    words = ["--config", str(recipe), "--run.output_dir", str(folder), "--optim.num_epochs", "12"]
    return train_recsys.main(words), folder


PANELS: dict[str, Callable[[Path], tuple[int, Path]]] = {"llm": llm, "images": images, "recsys": recsys}


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
