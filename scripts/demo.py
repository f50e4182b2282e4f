"""The main job of a panel, on real data, from nothing to a report.

    python scripts/demo.py --panel llm
    python scripts/demo.py --panel images
    python scripts/demo.py --panel recsys

llm: SmolLM2-135M-Instruct aligned with pairs of real customers' reviews; about 8 minutes on 2 CPU cores.
images: the project's own small SDXL-class pipeline draws pictures, five scorers vote on them, and three
methods learn from the votes: Diffusion-DPO from pairs, RankDPO from lists, SPO from its own denoising steps.
They are drawn beside the base from the same noise and judged by what no scorer saw; about 5 minutes.
recsys: a session model with semantic ids learns MovieLens-100k from nothing, beside classical recommenders; a
reward model learns from logged sessions, the recommender from it, and a ground truth that neither saw judges
sessions of films before and after; about 5 minutes.
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
    judge_recsys,
    log_sessions,
    train_diffusion,
    train_diffusion_online,
    train_llm,
    train_recsys,
    train_recsys_online,
    train_session_reward,
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
    """The recommender panel: learn, log, reward, align, judge; (exit code, folder of the verdict)."""
    logs, reward, base, verdict = (folder / name for name in ("logs", "reward", "base", "verdict"))
    runs = {"ipa": folder / "ipa", "next tokens alone": folder / "control"}
    steps: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (
            train_recsys.main,
            [
                *("--config", str(RECIPES / "recsys" / "movielens_sessions.yaml"), "--optim.num_epochs", "3"),
                *("--run.output_dir", str(base)),
            ],
        ),
        (
            log_sessions.main,
            [
                *("--config", str(RECIPES / "recsys_logs" / "movielens_logs.yaml"), "--output", str(logs)),
                *("--logging.requests", "20"),
            ],
        ),
        (
            train_session_reward.main,
            [
                *("--config", str(RECIPES / "recsys_reward" / "movielens_reward.yaml")),
                *("--logs", str(logs / "logs.safetensors"), "--output", str(reward)),
                *("--training.model.num_members", "2", "--training.optim.num_epochs", "4"),
            ],
        ),
    ]
    for name, run in runs.items():
        words = [
            *("--config", str(RECIPES / "recsys" / "online" / "movielens_ipa.yaml")),
            *("--base", str(base / "model"), "--evaluation.logs", str(logs / "logs.safetensors")),
            *("--judge.options.model", str(reward / "model"), "--evaluation.alarm", "null"),
            *("--evaluation.requests", "200", "--evaluation.alarm_requests", "100"),
            *("--rounds.num_rounds", "2", "--run.output_dir", str(run)),
        ]
        steps.append((train_recsys_online.main, words + (["--weight", "0"] if name != "ipa" else [])))
    judged = [
        *("--config", str(RECIPES / "recsys_judge" / "movielens_judge.yaml"), "--output", str(verdict)),
        *("--logs", str(logs / "logs.safetensors"), "--oracle", str(logs / "oracle")),
        *("--other_oracle", str(logs / "other_oracle"), "--control", "next tokens alone"),
        *("--runs", json.dumps({name: [str(run)] for name, run in runs.items()})),
    ]
    for run, words in [*steps, (judge_recsys.main, judged)]:
        if code := run(words):
            return code, verdict
    return 0, verdict


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
