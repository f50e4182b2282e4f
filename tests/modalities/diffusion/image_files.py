"""Tiny images and data sets in the published layouts, for tests. Bytes come from Pillow and a seed."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from triptych.modalities.diffusion.records import ImageSource
from triptych.training.quarantine import Quarantine


def noise(seed=0, *, width=40, height=24, mode="RGB"):
    bands = len(mode) if mode != "P" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels, "L" if mode == "P" else mode)


def encoded(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def jpeg(seed=0, **size):
    return encoded(noise(seed, **size))


def source(data, name="picture"):
    return ImageSource(name, data=data, place="rows.jsonl:1", column="image")


def png_header(width, height):
    """A PNG that says how large it is and then has almost nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def webp_header(width, height):
    """A lossless WebP of one colour is 34 bytes whatever its size; the size is patched in."""
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    assert data[12:16] == b"VP8L"
    bits = (width - 1) | (height - 1) << 14
    data[21:25] = struct.pack("<I", (struct.unpack("<I", data[21:25])[0] & 0xF0000000) | bits)
    return bytes(data)


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1), "utf-8")
    return path


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_images(folder, names):
    """One image a name, each different; the bytes by name."""
    found = {}
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        found[name] = jpeg(seed)
        (folder / name).write_bytes(found[name])
    return found


def pick(i, label=1.0, **changes):
    """A row of Pick-a-Pic v2 with all its columns."""
    return {
        "are_different": True,
        "best_image_uid": f"uid{i}",
        "caption": f"a picture of {i}",
        "created_at": "2023-05-01",
        "has_label": True,
        "image_0_uid": f"uid{i}",
        "image_0_url": "http://127.0.0.1:9/image.png",
        "image_1_uid": f"other{i}",
        "image_1_url": "http://127.0.0.1:9/image.png",
        "jpg_0": jpeg(2 * i),
        "jpg_1": jpeg(2 * i + 1),
        "label_0": label,
        "label_1": 1.0 - label,
        "model_0": "SDXL",
        "model_1": "SD2",
        "num_example_per_prompt": 1,
        "ranking_id": i,
        "user_id": i % 2,
        "__index_level_0__": i,
    } | changes


def write_pickapic(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_tar(path, members, mode="w"):
    """members: (name, bytes) or a TarInfo of its own."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Errors(Quarantine):
    """A quarantine that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def add(self, error, *, strict=False):
        self.errors.append(error)
        super().add(error, strict=strict)

    def told(self):
        return [(error.source, error.field, error.reason) for error in self.errors]
