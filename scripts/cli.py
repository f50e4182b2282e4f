"""The `triptych` command: the same entry points as the scripts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    ("train", "llm"): ("train_llm", "align a language model"),
    ("train", "llm-online"): (
        "train_llm_online",
        "align a language model on its own samples",
    ),
    ("train", "diffusion"): ("train_diffusion", "align a diffusion or flow model"),
    ("train", "diffusion-online"): (
        "train_diffusion_online",
        "align a diffusion or flow model on its own samples",
    ),
    ("train", "image-scorer"): ("train_image_scorer", "train a scorer of pictures or of denoising steps"),
    ("train", "recsys"): ("train_recsys", "train a generative recommender"),
    ("train", "recsys-online"): ("train_recsys_online", "align a generative recommender in rounds"),
    ("train", "session-reward"): ("train_session_reward", "train a reward model of recommended sessions"),
    ("log",): ("log_sessions", "draw logged sessions from a ground truth that is known"),
    ("judge", "recsys"): ("judge_recsys", "judge aligned recommenders by what none was trained on"),
    ("tokenise",): ("tokenise_items", "make semantic ids of items"),
    ("evaluate", "recsys"): ("evaluate_recsys", "rank held-out events with exported recommenders"),
    ("recommend",): ("recommend", "recommend from an exported recommender alone"),
    ("train", "reward"): ("train_reward", "train a reward model"),
    ("evaluate",): ("evaluate", "held-out results of an aligned model"),
    ("encode",): ("encode_images", "encode images and prompts once, for train diffusion"),
    ("prefer",): ("make_preferences", "draw pictures and label them by a measure"),
    ("draw",): ("draw_images", "draw pictures of every prompt with several models"),
    ("label",): ("label_images", "let scorers judge pictures, and write preferences of their votes"),
    ("feedback",): ("ai_feedback", "draw, vote, encode and train in one recipe"),
    ("users",): ("make_users", "vectors of persons from a few of their preferences"),
    ("compare",): ("compare_images", "draw the same prompts from the same noise with several models"),
    ("plan",): ("plan", "memory, FLOPs and days of a diffusion run"),
    ("improve",): ("improve", "let a trained model improve its answers, step by step"),
    ("methods",): ("methods", "how every online method is composed"),
    ("objectives",): ("objectives", "list the objectives, or show one"),
    ("data",): ("check_data", "what a data set holds and what would be left out of it"),
    ("evidence",): ("evidence", "run the experiments behind EVIDENCE.md"),
    ("env",): ("environment", "versions and devices, for bug reports"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Hand over to the entry point that the first words name."""
    words = list(sys.argv[1:] if args is None else args)
    for command, (module, _) in COMMANDS.items():
        if tuple(words[: len(command)]) == command:
            return importlib.import_module(f"triptych.scripts.{module}").main(words[len(command) :])
    usage = [f"  triptych {' '.join(c):<22} {text}" for c, (_, text) in COMMANDS.items()]
    asked = not words or words[0] in ("-h", "--help")
    problem = [] if asked else [f"error: no command '{' '.join(words[:2])}'; see triptych --help"]
    print(
        "\n".join(problem or ["usage: triptych COMMAND [options]", *usage]),
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2


if __name__ == "__main__":
    raise SystemExit(main())
