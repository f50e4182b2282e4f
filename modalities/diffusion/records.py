"""Preference records of images as they come out of files, in one type: a prompt and its graded images.

Images are kept as bytes or as a path inside the data's folder and are read when somebody asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from triptych.training.quarantine import DataError

MAX_IMAGE_BYTES = 32 << 20
MAX_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One encoded image: its bytes, or the path of its file. `name` is what messages call it.

    place, column: the record and the field it was named in, such as `metadata.jsonl:17` and `chosen`.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    path: Path | None = None
    place: str = ""
    column: str = ""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None):
            raise ValueError(f"image {self.name!r} needs either data or a path")

    def read(self, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The encoded bytes; DataError where they are too many, none, or cannot be had."""
        data = self.data if self.data is not None else self._load(max_bytes)
        if len(data) > max_bytes:
            raise self.error(
                "is larger than the limit", f"keep an encoded image below {max_bytes:,} bytes or raise it"
            )
        if not data:
            raise self.error("is an empty file", "make the image again or remove the record")
        return data

    def content_hash(self) -> str:
        """Hex sha256 of the encoded bytes."""
        return hashlib.sha256(self.read()).hexdigest()

    def error(self, reason: str, remedy: str) -> DataError:
        """A DataError about this image, at the record that names it."""
        where = self.place or self.name
        return DataError(reason, source=where, field=self.column, remedy=remedy, preview=self.name)

    def identity(self) -> str:
        """What a record's id knows of the image: its bytes' hash, or the name and size of its file."""
        if self.data is not None:
            return hashlib.sha256(self.data).hexdigest()
        try:
            return f"{self.name}:{os.stat(self._file()).st_size}"
        except OSError as error:
            raise self.error("cannot be read", _one_line(error)) from None

    def _file(self) -> Path:
        assert self.path is not None
        return self.path

    def _load(self, max_bytes: int) -> bytes:
        try:
            with open(self._file(), "rb") as file:
                return file.read(max_bytes + 1)
        except OSError as error:
            raise self.error("cannot be read", _one_line(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One context: a prompt and K graded images.

    relevance: K numbers, higher is better: (1, 0) for a pair, chosen first; (1,) or (0,) for an image that is
    desirable or not; anything for a list. strength: P(chosen preferred), margin: gap of the two scores, both
    of a pair. group: the person who judged, None if unknown. id: 32 hex digits of the content, the same
    wherever the record stands in whatever file; source: `train.parquet[17]`, `metadata.jsonl:3`.
    """

    id: str
    source: str
    prompt: str
    images: tuple[ImageSource, ...]
    relevance: tuple[float, ...]
    strength: float | None = None
    group: str | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.relevance):
            raise ValueError(f"{len(self.images)} images need as many grades, not {len(self.relevance)}")
        if self.kind != "pair" and not (self.strength is None and self.margin is None):
            raise ValueError(f"strength and margin belong to a pair, not to a {self.kind}")

    @property
    def kind(self) -> Literal["single", "pair", "list"]:
        """What the record holds, which says what input it can become. A pair is also a list of two."""
        if len(self.images) == 1:
            return "single"
        return "pair" if self.relevance == (1.0, 0.0) else "list"

    @property
    def is_tie(self) -> bool:
        """Whether it prefers nothing: a pair of strength one half, or a list of equal grades."""
        if len(self.images) == 1:
            return False
        return self.strength == 0.5 or len(set(self.relevance)) == 1


def make_record(
    *,
    source: str,
    prompt: str,
    images: Sequence[ImageSource],
    relevance: Sequence[float],
    strength: float | None = None,
    group: str | None = None,
    margin: float | None = None,
) -> ImageRecord:
    """A record with its id. Two images graded (0, 1) become a pair, chosen first.

    DataError for an image that is given twice: it cannot be better than itself.
    """
    images, grades = tuple(images), tuple(float(r) for r in relevance)
    if grades == (0.0, 1.0):
        images, grades = images[::-1], (1.0, 0.0)
    identities = [image.identity() for image in images]
    for k, image in enumerate(images):
        if identities.index(identities[k]) < k:
            raise image.error("is the same as another image of its record", "remove one of them")
    content = json.dumps([prompt, identities, grades, strength, group, margin])
    return ImageRecord(
        id=hashlib.sha256(content.encode()).hexdigest()[:32],
        source=source,
        prompt=prompt,
        images=images,
        relevance=grades,
        strength=strength,
        group=group,
        margin=margin,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
