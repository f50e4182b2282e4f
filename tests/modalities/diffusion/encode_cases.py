"""Tiny data sets of images and the encoders of a tiny pipeline, for the tests of the offline step."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tiny_diffusion import tiny_sdxl, write_pipeline

from triptych.modalities.diffusion.encoders import EncoderConfig, load_encoders
from triptych.modalities.diffusion.encoding import EncodeConfig, encode
from triptych.modalities.diffusion.sources import RecordSource, SourceConfig
from triptych.training.quarantine import Quarantine

SMALL = {"bucket_step": 8, "num_workers": 2, "dtype": "float32", "prompt_dtype": "float32"}


def picture(seed=0, *, height=32, width=32):
    """Noise over a gradient, so that crops of one picture differ."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 127, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
    return Image.fromarray((ramp + draw.integers(0, 64, (height, width, 3))).astype(np.uint8))


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def row(first, second, *, label=1.0, caption="red cat", user=None):
    return {
        "caption": caption,
        "jpg_0": first,
        "jpg_1": second,
        "label_0": label,
        "label_1": 1 - label,
        "user_id": user,
        "has_label": True,
    }


def many_rows(n, *, sizes=((32, 32), (40, 40), (24, 40))):
    """Comparisons as Pick-a-Pic has them: the next one shares an image with the last."""
    images = [
        png(picture(i, height=sizes[i % len(sizes)][0], width=sizes[i % len(sizes)][1])) for i in range(n + 1)
    ]
    return [
        row(images[i], images[i + 1], label=float(i % 2), caption=f"dog {i % 5}", user=i % 3)
        for i in range(n)
    ]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    return path


def write_folder(folder, rows, images):
    """A metadata.jsonl folder; images: name -> bytes."""
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return folder


def write_model(folder, seed=0):
    return write_pipeline(tiny_sdxl(seed), folder)


def encoders_of(folder):
    config = EncoderConfig(name_or_path=str(folder))
    return load_encoders(config, root=Path("/nowhere"), device=torch.device("cpu"))


class SilentBar:
    """A progress bar that remembers what it was told."""

    def __init__(self, total, start):
        self.total, self.start, self.steps = total, start, []

    def update(self, step, **values):
        self.steps.append(step)

    def close(self):
        self.closed = True


def run(encoders, source, out, *, stop=lambda: False, lines=None, bar=SilentBar, data=None, **options):
    """The facts of an encoding and its quarantine."""
    config = EncodeConfig(
        model=EncoderConfig(name_or_path="tiny"),
        data=SourceConfig(source=str(source), **(data or {})),
        output_dir=str(out),
        **(SMALL | options),
    )
    quarantine = Quarantine(Path(out) / "quarantine.jsonl")
    report = (lambda line: None) if lines is None else lines.append
    records = RecordSource(config.data, quarantine, report)
    facts = encode(config, encoders, records, report=report, bar=bar, stop=stop)
    return facts, quarantine


def tree(folder):
    """Every file of a folder and its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }
