"""Pick-a-Pic v2: parquet files whose rows hold two encoded images and what a person preferred.

Only the needed columns are read, never the URLs; one row group is open at a time, so memory does not grow
with the number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from triptych.modalities.diffusion.fields import at, check_number, person_of, prompt_of, require, wrong_type
from triptych.modalities.diffusion.records import ImageRecord, ImageSource, make_record
from triptych.training.quarantine import DataError

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_OPTIONAL = ("has_label", "user_id")
_ROWS_AT_ONCE = 8
_BUFFER_BYTES = 1 << 16
_MAX_ROW_GROUP_BYTES = 2 << 30


def read_pickapic(path: Path, *, name: str) -> Iterator[ImageRecord | DataError]:
    """The pairs of one parquet file, the preferred image first; labels of one half are ties of strength 1/2.

    A row group that is damaged or unpacks to more than 2 GiB costs its rows, not the file.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            columns = _columns_of(file, name)
            start = 0
            for index in range(file.num_row_groups):
                yield from _row_group(file, index, columns, name, start)
                start += file.metadata.row_group(index).num_rows
    except DataError as error:
        yield error
    except (pa.ArrowException, OSError) as error:
        yield _damaged(name, error)


def check_columns(path: Path, *, name: str) -> None:
    """DataError for a parquet file of other columns; a damaged one is left to be found when it is read."""
    with contextlib.suppress(pa.ArrowException, OSError), pq.ParquetFile(path) as file:
        _columns_of(file, name)


def _columns_of(file: pq.ParquetFile, name: str) -> list[str]:
    found = file.schema_arrow.names
    for column in COLUMNS:
        if column not in found:
            remedy = f"found {', '.join(found)[:300]}; Pick-a-Pic needs {', '.join(COLUMNS)}"
            raise DataError("is missing", source=name, field=column, remedy=remedy)
    return [*COLUMNS, *(column for column in _OPTIONAL if column in found)]


def _row_group(
    file: pq.ParquetFile, index: int, columns: list[str], name: str, start: int
) -> Iterator[ImageRecord | DataError]:
    group = file.metadata.row_group(index)
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    if size > _MAX_ROW_GROUP_BYTES:
        remedy = f"row group {index} has {size:,} bytes: write it again with 100 rows in a group"
        yield DataError("unpacks to too much", source=f"{name}[{start}]", remedy=remedy)
        return
    number = start
    try:
        batches = file.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=[index], columns=columns, use_threads=False
        )
        for batch in batches:
            for i in range(batch.num_rows):
                yield _record(batch, i, f"{name}[{number}]")
                number += 1
    except (pa.ArrowException, OSError) as error:
        yield _damaged(f"{name}[{number}]", error)


def _damaged(place: str, error: Exception) -> DataError:
    remedy = f"what follows in this file or row group was not read ({' '.join(str(error).split())[:160]})"
    return DataError("is damaged or cut off", source=place, remedy=remedy)


def _record(batch: pa.RecordBatch, i: int, place: str) -> ImageRecord | DataError:
    try:
        row = {column: batch.column(column)[i].as_py() for column in batch.schema.names}
        return _parse(row, place)
    except UnicodeDecodeError:
        return DataError("is not valid UTF-8", source=place, remedy="save the texts as UTF-8")
    except DataError as error:
        return at(place, error)


def _parse(row: dict[str, Any], place: str) -> ImageRecord:
    if row.get("has_label") is False:
        raise DataError("has no label", field="has_label", remedy="nobody judged this pair")
    labels = tuple(check_number(require(row, column), column) for column in ("label_0", "label_1"))
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        remedy = "label_0, label_1 are 1, 0 or 0, 1, or 0.5 each for a tie"
        raise DataError("is no preference", field="label_0", remedy=remedy, preview=labels)
    images = [_image(row, column, place) for column in ("jpg_0", "jpg_1")]
    return make_record(
        source=place,
        prompt=prompt_of(row),
        images=images[::-1] if labels == (0, 1) else images,
        relevance=(1.0, 0.0),
        strength=0.5 if labels == (0.5, 0.5) else None,
        group=person_of(row),
    )


def _image(row: dict[str, Any], column: str, place: str) -> ImageSource:
    value = require(row, column)
    if isinstance(value, dict):  # written by `datasets` as an image; its path is never followed
        value = require(value, "bytes")
    if not isinstance(value, bytes):
        raise wrong_type(value, column, "the bytes of an image")
    return ImageSource(name=f"{place}.{column}", data=value, place=place, column=column)
