"""Stand-ins for what a diffusion run is given: tiny pipelines of real classes, and pictures in real layouts.

As a program it runs `train_diffusion` once for each command line of a JSON file, as one of several processes.
"""

import contextlib
import json
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from image_files import jpeg, pick, write_images, write_lines, write_pickapic
from tiny_diffusion import PIXELS, TINY, tiny_sdxl, write_pipeline

from triptych.scripts import encode_images, train_diffusion
from triptych.training.logs import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "scripts" / "recipes" / "diffusion"
SCRIPT = ROOT / "scripts" / "train_diffusion.py"
# Width and height in turn; the first image of a pair has another size than the second.
SIZES = ((32, 32), (40, 34), (33, 48), (64, 36), (36, 44))
NUM_PAIRS = 20


def words(settings):
    """Settings by dotted name as a command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@contextlib.contextmanager
def aside(folder):
    """Around what several tests share: a cache in `folder`, and afterwards the process as it was before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logger = logging.getLogger("triptych")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        try:
            yield
        finally:
            logger.setLevel(level)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)


def write_model(folder, family):
    """A pipeline as it is published: SDXL's with Euler's scheduler and files of the variant fp16."""
    pipeline = tiny_sdxl(euler=True) if family == "sdxl" else TINY[family]()
    return write_pipeline(pipeline, folder, **({"variant": "fp16"} if family == "sdxl" else {}))


def rows(num=NUM_PAIRS):
    """Rows of Pick-a-Pic v2: pictures of different sizes, both labels, two ties and a row without a label."""
    found = []
    for i in range(num):
        (w, h), (v, g) = SIZES[i % len(SIZES)], SIZES[(i + 1) % len(SIZES)]
        images = {"jpg_0": jpeg(2 * i, width=w, height=h), "jpg_1": jpeg(2 * i + 1, width=v, height=g)}
        label = 0.5 if i in (3, 11) else float(i % 2)
        found.append(pick(i, label, caption=f"a picture of {i % 13}", **images))
    found.append(pick(num, 0.0, has_label=False))
    return found


def write_pairs(folder):
    """Two parquet files, as Pick-a-Pic has them."""
    made = rows()
    write_pickapic(folder / "train-00000-of-00002.parquet", made[:9], row_group_size=4)
    write_pickapic(folder / "train-00001-of-00002.parquet", made[9:])
    return folder


def write_lists(folder, num=8):
    """A metadata.jsonl folder of four pictures a prompt, with what five scorers think of each."""
    lines = []
    for i in range(num):
        names = [f"{i}-{k}.jpg" for k in range(4)]
        write_images(folder, names)
        votes = {f"scorer {s}": [float((k * (s + 1) + i) % 5) for k in range(4)] for s in range(5)}
        lines.append({"prompt": f"a picture of {i}", "images": names, "votes": votes})
    write_lines(folder / "metadata.jsonl", lines)
    return folder


def encode(model, source, out, **changes):
    """Encode as the recipe for Pick-a-Pic says, at the tiny models' size."""
    settings = {
        "model.name_or_path": model,
        "data.source": source,
        "output_dir": out,
        "resolution": PIXELS,
        "bucket_step": 8,
        # Whatever the family; only SDXL's stand-in has files of a variant.
        "model.variant": "fp16" if "sdxl" in model.name else "null",
    }
    recipe = RECIPES / "encode_pickapic_sdxl.yaml"
    given = settings | {name.replace("__", "."): value for name, value in changes.items()}
    assert encode_images.main(["--config", str(recipe), *words(given)]) == 0
    return out


def arguments(recipe, material, out, *, data, family="sdxl", **changes):
    """A recipe's command line, with what the size of the stand-ins demands."""
    settings = {
        "config": RECIPES / f"{recipe}.yaml",
        "model.name_or_path": material / family,
        "data.source": material / data,
        "data.eval_share": 0.3,
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "optim.num_steps": 4,
        "run.output_dir": out,
        "run.log_every": 1,
        "sample.num_prompts": 0,
        "sample.num_steps": 2,
        "sample.height": "null",
        "sample.width": "null",
    }
    return words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def events(out, split):
    """The log's lines of one split."""
    return [e for e in read_metrics(Path(out) / "metrics.jsonl") if e["split"] == split]


def losses(out, split="train"):
    return [e["loss"] for e in events(out, split)]


def weights(out, step):
    return (Path(out) / "checkpoints" / f"step-{step:08d}" / "policy.safetensors").read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A run ends its group of processes, which cannot be made a second time.
    leave, Accelerator.end_training = Accelerator.end_training, lambda self: None
    for line in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        assert train_diffusion.main(line) == 0
    leave(Accelerator())
