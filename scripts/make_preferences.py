"""Draw pictures from a model and label them by a measurable property: a folder of preferences to learn from.

    python scripts/make_preferences.py --model.name_or_path asset:openmoji_sdxl --prompts prompts.txt \
        --measure redness --output_dir data/redder

The folder holds PNG files and metadata.jsonl, which scripts/encode_images.py reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from triptych.modalities.diffusion.measures import label_pairs, measure_of, write_lists, write_pairs
from triptych.modalities.diffusion.model import ModelConfig, load_pipeline, locate
from triptych.modalities.diffusion.prompts import read_prompts
from triptych.modalities.diffusion.rollout import Sampling, embed, generate
from triptych.scripts.common import errors_in_one_line, parse, progress, quiet_diffusers

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is drawn and how it is compared.

    prompts: a text file, one prompt a line. measure: a name of `measures`, higher is preferred. form: 'pairs'
    (see pairs) or 'lists' with the measure as score. margin: pairs whose measures differ by no more are left
    out.
    """

    model: ModelConfig
    prompts: Path
    measure: str
    output_dir: Path
    num_per_prompt: int = 4
    num_steps: int = 30
    guidance: float = 5.0
    batch_size: int = 8
    seed: int = 0
    form: Literal["pairs", "lists"] = "pairs"
    pairs: Literal["best_worst", "all"] = "best_worst"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.num_per_prompt < 2:
            raise ValueError(f"num_per_prompt={self.num_per_prompt} must be at least 2 to compare pictures")

    def sampling(self) -> Sampling:
        """How the pictures are drawn."""
        names = ("num_per_prompt", "num_steps", "guidance", "batch_size", "seed")
        return Sampling(**{name: getattr(self, name) for name in names})


def run(config: PreferenceConfig) -> int:
    """Draw, measure and write; returns the exit code."""
    measure = measure_of(config.measure)
    prompts = read_prompts(config.prompts)
    pipeline = load_pipeline(locate(config.model, root=ROOT), config.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    k = config.num_per_prompt
    number = len(prompts) * k
    with progress("pictures", enabled=True)(number, 0) as bar:
        images = generate(pipeline, embed(pipeline, prompts), config.sampling(), progress=bar.update)
    groups = [images[i : i + k] for i in range(0, number, k)]
    labelled = label_pairs(prompts, groups, measure, pairs=config.pairs, margin=config.margin)
    write = write_pairs if config.form == "pairs" else write_lists
    written = write(labelled, config.output_dir)
    print(f"{config.output_dir}: {written} {config.form} from {number} pictures", file=sys.stderr)
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(PreferenceConfig, args, prog="make_preferences", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
