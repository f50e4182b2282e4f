"""Where the records of an encoding come from, and how far they were read."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from triptych.modalities.diffusion.readers import read_records
from triptych.modalities.diffusion.records import ImageRecord
from triptych.training.quarantine import DataError, Quarantine


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is read; see `readers.read_records`. source: a file, a folder, or a pattern with * in quotes.

    max_records: only the first ones. max_pixels, min_side, max_aspect: limits of an image, see `ImageLimits`.
    """

    source: str
    layout: str = "auto"
    split: str = "train"
    ties: Literal["drop", "half"] = "drop"
    image_root: str | None = None
    max_records: int | None = None
    max_pixels: int = 40_000_000
    min_side: int = 16
    max_aspect: float = 8.0

    def __post_init__(self) -> None:
        if self.max_records is not None and self.max_records < 1:
            raise ValueError(f"data.max_records={self.max_records} must be at least 1")


class RecordSource:
    """The records of a source, and how far it was read. total: rows of the source where that is known.

    ValueError (DataError among them) at once for a source that is none; bad records go to `quarantine`.
    """

    def __init__(self, config: SourceConfig, quarantine: Quarantine, report: Callable[[str], None]):
        self.num_read = 0
        rows = num_rows(config)
        self.total = rows if rows is None or config.max_records is None else min(rows, config.max_records)
        self._most = config.max_records
        self.quarantine = quarantine
        self._num_images_left_out = 0
        self._records = read_records(
            config.source,
            layout=config.layout,
            split=config.split,
            ties=config.ties,
            image_root=config.image_root,
            quarantine=quarantine,
            report=report,
        )

    def take(self) -> ImageRecord | None:
        """The next record, or None at the end."""
        if self._most is not None and self.num_read >= self._most:
            return None
        record = next(self._records, None)
        self.num_read += record is not None
        return record

    def leave_out(self, facts: dict[str, Any]) -> None:
        """Count what was left out of a part after it was read, also when an earlier start wrote the part."""
        for given in facts["left_out"]:
            details = {name: value for name, value in given.items() if name != "reason"}
            self.quarantine.add(DataError(given["reason"], **details))
        self._num_images_left_out += len(facts["left_out"])

    @property
    def num_rows(self) -> int:
        """Rows of the source that are done with, whether they became records or not."""
        return self.num_read + self.quarantine.total - self._num_images_left_out


def num_rows(config: SourceConfig) -> int | None:
    """Rows of the parquet files that are read, an estimate for the bar; None for other sources."""
    path = Path(config.source).expanduser()
    files = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if path.is_dir():
        files = sorted(path.rglob(f"{config.split}*.parquet")) or sorted(path.rglob("*.parquet"))
    if not files or any(f.suffix != ".parquet" for f in files):
        return None
    try:
        return sum(pq.read_metadata(f).num_rows for f in files)
    except (pa.ArrowException, OSError):
        return None
