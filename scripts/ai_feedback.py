"""Preferences without people, in one recipe: models draw, scorers vote, and a model learns from the votes.

    python scripts/ai_feedback.py --config scripts/recipes/diffusion/openmoji_ai_feedback.yaml
    python scripts/ai_feedback.py --config ... --label.min_margin 0.2 --stop_after label

The sections draw, label, encode and train are the configurations of scripts/draw_images.py, label_images.py,
encode_images.py and train_diffusion.py; without draw, label reads pictures that are there. output_dir gets a
folder for each. A stage that is complete for the same settings is not run again, an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from triptych.modalities.diffusion.encoding import EncodeConfig
from triptych.modalities.diffusion.setup import DiffusionConfig
from triptych.scripts import draw_images, encode_images, label_images, train_diffusion
from triptych.scripts.common import as_dict, errors_in_one_line, parse, quiet_diffusers
from triptych.scripts.draw_images import DrawConfig
from triptych.scripts.label_images import LabelConfig
from triptych.training.atomic import discard, write_json
from triptych.training.config import flat

_DONE = "stage.json"
_READS = {"encode.data.source": "label.output_dir", "train.data.source": "encode.output_dir"}


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """The whole way from prompts to an aligned model.

    output_dir: each stage works in a folder of it, and the next one reads that, unless its section says
    otherwise: pictures, labels, data, run. stop_after: the last stage that is run.
    """

    output_dir: str
    label: LabelConfig
    encode: EncodeConfig
    train: DiffusionConfig
    draw: DrawConfig | None = None
    stop_after: Literal["draw", "label", "encode", "train"] = "train"

    def __post_init__(self) -> None:
        if self.stop_after == "draw" and self.draw is None:
            raise ValueError("stop_after=draw, but there is no section draw")
        drawn = {} if self.draw is None else {"label.data.source": "draw.output_dir"}
        for there, here in (drawn | _READS).items():
            written, read = _at(self, here), _at(self, there)
            if Path(written) != Path(read):
                raise ValueError(
                    f"{there}={read} is not {here}={written}: a stage reads what the one before wrote"
                )


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: where it works, how it is run, and everything that decides what it makes."""

    name: str
    folder: Path
    run: Callable[[], int]
    decides: Mapping[str, Any]


def run(config: FeedbackConfig) -> int:
    """Run the stages that are not complete, one after the other; returns the exit code."""
    before = ""
    for stage in stages(config):
        before = hashlib.sha256(json.dumps([before, stage.decides], sort_keys=True).encode()).hexdigest()
        if _state(stage) == {"made_of": before, "complete": True}:
            _report(f"{stage.name}: complete, {stage.folder}")
        elif code := _made(stage, before):
            return code
        if stage.name == config.stop_after:
            break
    return 0


def stages(config: FeedbackConfig) -> list[Stage]:
    """The stages in order."""
    label, encode, train = config.label, config.encode, config.train
    found: list[Stage] = []
    if (draw := config.draw) is not None:
        decides = draw_images.identity(draw)
        found.append(Stage("draw", Path(draw.output_dir), lambda: draw_images.run(draw), decides))
    own = label_images.identity(label, files=draw is None)
    where = {"encode": Path(encode.output_dir), "train": Path(train.run.output_dir)}
    return [
        *found,
        Stage("label", Path(label.output_dir), lambda: label_images.run(label), own),
        Stage("encode", where["encode"], lambda: encode_images.run(encode), _settings(encode)),
        Stage("train", where["train"], lambda: train_diffusion.run(train), _settings(train)),
    ]


def _settings(config: EncodeConfig | DiffusionConfig) -> dict[str, Any]:
    """A stage's settings, wherever it reads and writes."""
    places = ("output_dir", "run.output_dir", "data.source")
    return {name: value for name, value in flat(as_dict(config)).items() if name not in places}


def _made(stage: Stage, made_of: str) -> int:
    """Run a stage and note that it is complete; returns its exit code."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and stage.name != "train":
        raise ValueError(f"{stage.name} runs as one process: first, without torchrun, --stop_after encode")
    _report(f"{stage.name}: {stage.folder}")
    had = _state(stage)
    if stage.name == "encode" and had is not None and had["made_of"] != made_of:
        # Other labels or settings: what was encoded before is of no use, and its script refuses to go on.
        _report(f"{stage.folder}: was made of other labels or settings and is made anew")
        discard(stage.folder)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        write_json(stage.folder / _DONE, {"made_of": made_of, "complete": False})
    code = stage.run()
    if not code and first:
        write_json(stage.folder / _DONE, {"made_of": made_of, "complete": True})
    return code


def _state(stage: Stage) -> dict[str, Any] | None:
    path = stage.folder / _DONE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def with_paths(args: Sequence[str]) -> list[str]:
    """The command line with the paths between the stages in front, where the recipe overrides them.

    ValueError where neither a recipe nor the command line says output_dir.
    """
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    output, draws = None, False
    for name, value in itertools.pairwise([*words, ""]):
        recipe = _recipe(value) if name == "--config" else {}
        output = value if name == "--output_dir" else recipe.get("output_dir", output)
        draws = draws or name.startswith("--draw") or recipe.get("draw") is not None
    if output is None:
        if {"--help", "-h", "--print_config"} & {*words}:
            return list(args)
        raise ValueError("output_dir is not given; each stage gets a folder of it")
    places = {stage: str(Path(output) / stage) for stage in ("pictures", "labels", "data", "run")}
    paths = {
        "label.output_dir": places["labels"],
        "encode.data.source": places["labels"],
        "encode.output_dir": places["data"],
        "train.data.source": places["data"],
        "train.run.output_dir": places["run"],
    }
    if draws:
        paths |= {"draw.output_dir": places["pictures"], "label.data.source": places["pictures"]}
    return [*(f"--{name}={value}" for name, value in paths.items()), *args]


def _recipe(path: str) -> dict[str, Any]:
    """A recipe's sections; {} where it cannot be read, which is then said by the parser."""
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _at(config: Any, name: str) -> str:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        words = with_paths(sys.argv[1:] if args is None else args)
        config = parse(FeedbackConfig, words, prog="ai_feedback", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
