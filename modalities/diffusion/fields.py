"""One field of a raw row of image data, checked: its value, or a `DataError` naming field, reason and remedy.

The errors carry no place; the reader that knows the file and line adds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triptych.modalities.diffusion.records import MAX_CANDIDATES
from triptych.training.quarantine import DataError

PROMPT_NAMES = ("prompt", "caption", "text")
_PERSON_NAMES = ("user_id", "user_hash", "user", "group")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")


def require(row: Mapping, name: str) -> Any:
    """The value of a column that must be there and not null."""
    if name not in row:
        found = ", ".join(map(str, row))[:300] or "none"
        raise DataError("is missing", field=name, remedy=f"add it or rename a column (found {found})")
    if row[name] is None:
        raise DataError("is null", field=name, remedy="give a value or remove the row")
    return row[name]


def prompt_of(row: Mapping) -> str:
    """The text under `prompt`, `caption` or `text`: not blank, no NUL, no half character."""
    name = next((n for n in PROMPT_NAMES if n in row), PROMPT_NAMES[0])
    value = require(row, name)
    if not isinstance(value, str):
        raise wrong_type(value, name, "a text")
    if not value.strip():
        raise DataError("is empty", field=name, remedy="give a text or remove the row", preview=value)
    if "\0" in value:
        raise DataError("holds a NUL character", field=name, remedy="remove it", preview=value)
    if _SURROGATE.search(value):
        raise DataError("holds a lone surrogate", field=name, remedy="it is half a character", preview=value)
    return value


def person_of(row: Mapping) -> str | None:
    """Who judged, as a text, where the row says so."""
    for name in _PERSON_NAMES:
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return clean(str(value))
    return None


def check_number(value: object, name: str) -> float:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(value, name, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError("is not finite", field=name, remedy="give a finite number", preview=value)
    return number


def share_of(row: Mapping, name: str) -> float | None:
    """A number in [0, 1], or None where the column is absent or null."""
    if row.get(name) is None:
        return None
    value = check_number(row[name], name)
    if not 0 <= value <= 1:
        raise DataError(
            "is no probability", field=name, remedy="give a number from 0 to 1", preview=row[name]
        )
    return value


def check_list(value: object, name: str, what: str) -> list:
    """A list, or a tuple."""
    if isinstance(value, (list, tuple)):
        return list(value)
    raise wrong_type(value, name, f"a list of {what}")


def check_numbers(value: object, name: str, length: int) -> tuple[float, ...]:
    """Finite numbers, one for each of `length` images."""
    numbers = check_list(value, name, "numbers")
    check_length(numbers, name, length)
    return tuple(check_number(number, name) for number in numbers)


def check_length(values: Sequence, name: str, length: int) -> None:
    """One value for each image."""
    if len(values) != length:
        remedy = f"it has {len(values)} for {length} images: give one each"
        raise DataError("has another length than the images", field=name, remedy=remedy)


def check_count(values: Sequence, name: str) -> None:
    """At least two images to compare, and no more than a record may hold."""
    if len(values) < 2:
        remedy = f"it has {len(values)}: a comparison needs two or more"
        raise DataError("has too few images", field=name, remedy=remedy)
    if len(values) > MAX_CANDIDATES:
        remedy = f"it has {len(values)}: keep at most {MAX_CANDIDATES}"
        raise DataError("has too many images", field=name, remedy=remedy)


def check_flag(value: object, name: str) -> bool:
    """true or false, 1 or 0."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise wrong_type(value, name, "true or false")


def confined(root: Path, value: object, name: str) -> Path:
    """The regular file that a relative path names inside `root` (resolved); DataError for anything else."""
    if not isinstance(value, str):
        raise wrong_type(value, name, "the path of an image")
    if not value.strip() or "\0" in value or _SURROGATE.search(value):
        raise DataError("is no path", field=name, remedy="give the path of an image", preview=value)
    if _URL.match(value):
        raise DataError(
            "is a URL", field=name, remedy="download it and give its path: nothing is fetched", preview=value
        )
    if _ABSOLUTE.match(value):
        raise DataError(
            "is an absolute path", field=name, remedy="give it relative to the data", preview=value
        )
    if ".." in re.split(r"[/\\]", value):
        raise DataError(
            "leaves the data's folder", field=name, remedy="give a path without ..", preview=value
        )
    try:
        path = (root / value).resolve()
        inside, exists, regular = path.is_relative_to(root), path.exists(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError("is no path", field=name, remedy=f"{error}"[:200], preview=value) from None
    if not inside:
        raise DataError(
            "links out of the data's folder",
            field=name,
            remedy="copy the file into the folder",
            preview=value,
        )
    if not regular:
        remedy = f"below {root} there is no such file; give image_root if the paths start elsewhere"
        reason = "is not a regular file" if exists else "does not exist"
        raise DataError(reason, field=name, remedy=remedy, preview=value)
    return path


def clean(text: str) -> str:
    """The text without half characters, which names of files may have and UTF-8 cannot."""
    return _SURROGATE.sub("\ufffd", text)


def wrong_type(value: object, name: str, wanted: str) -> DataError:
    """The error for a value of another type, with that type in the preview."""
    preview = type(value).__name__ if isinstance(value, (dict, list, bytes)) else repr(value)[:200]
    return DataError("has the wrong type", field=name, remedy=f"give {wanted}", preview=preview)


def at(place: str, error: DataError) -> DataError:
    """The error with its place, unless it has one."""
    return DataError(
        error.reason,
        source=error.source or place,
        field=error.field,
        remedy=error.remedy,
        preview=error.preview,
    )
