"""WebDataset tars: the files of one record stand together and share a key; streamed, nothing is unpacked.

    000017.txt  000017.chosen.jpg  000017.rejected.jpg              a pair
    000017.json  000017.0.jpg  000017.1.jpg  000017.2.jpg           a list; the json has its prompt and grades
    000017.txt  000017.jpg                                          one image

A `.json` beside a pair or an image may have prompt, strength, margin, desirable and user_id.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.modalities.diffusion.fields import at, check_count, clean, person_of, prompt_of
from triptych.modalities.diffusion.layouts import desirability_of, grades_of, pair_extras
from triptych.modalities.diffusion.records import (
    MAX_CANDIDATES,
    MAX_IMAGE_BYTES,
    ImageRecord,
    ImageSource,
    make_record,
)
from triptych.training.quarantine import DataError

_PART = re.compile(r"(?:(?P<side>chosen|rejected|\d{1,4})\.)?(?:jpg|jpeg|png|webp)|txt|json")
_BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError)
_MAX_TEXT_BYTES = 1 << 20
_MAX_KEY_BYTES = 256 << 20
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _BoundedTarInfo(tarfile.TarInfo):
    """tarfile reads extended headers into memory whole, however large they say they are."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*_EXTENDED, tarfile.SOLARIS_XHDTYPE) and self.size > _MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"an extended header has {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass(slots=True)
class _Key:
    """The files of one key as they come: by side, the first thing wrong with them, and their size."""

    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    error: DataError | None = None
    num_bytes: int = 0


def read_webdataset(path: Path, *, name: str) -> Iterator[ImageRecord | DataError]:
    """The records of one `.tar`, `.tar.gz` or `.tgz`, in order; one DataError for every key that is none.

    Members of other kinds than those above are passed over. Where the file is cut off, the last key is lost.
    """
    for key in _keys(path, name):
        yield key if isinstance(key, DataError) else _finish(key, clean(f"{name}/{key.name}"))


def _keys(path: Path, name: str) -> Iterator[_Key | DataError]:
    """The files of one key after the other; at most one key is in memory."""
    mode = "r|" if path.suffix == ".tar" else "r|gz"
    key: _Key | None = None
    try:
        with tarfile.open(path, mode, tarinfo=_BoundedTarInfo) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                # tarfile remembers every member, which would grow with the file.
                tar.members = []  # type: ignore[attr-defined]
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                part = _PART.fullmatch(ending.lower())
                if member.isdir() or part is None or not stem:
                    continue
                found = f"{folder}/{stem}".removeprefix("./").lstrip("/")
                if key is not None and key.name != found:
                    yield key
                    key = None
                key = key or _Key(found)
                _add(key, tar, member, part["side"] or ending.lower())
    except _BROKEN as error:
        place = f"{name}/{key.name}" if key else name
        remedy = f"the rest was not read ({' '.join(str(error).split())[:160]}): make the file again"
        yield DataError("is damaged or cut off", source=clean(place), remedy=remedy)
        return
    if key is not None:
        yield key


def _add(key: _Key, tar: tarfile.TarFile, member: tarfile.TarInfo, part: str) -> None:
    """Read one member, or note why not."""
    part = part if part in ("txt", "json", "chosen", "rejected") or part.isdigit() else "image"
    limit = _MAX_TEXT_BYTES if part in ("txt", "json") else MAX_IMAGE_BYTES
    part = str(int(part)) if part.isdigit() else part
    reason = ""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        reason = "leaves the archive"
    elif not member.isreg():
        reason = "is not a regular file"
    elif part in key.parts:
        reason = "appears twice"
    elif member.size > limit or key.num_bytes + member.size > _MAX_KEY_BYTES:
        reason = "is larger than the limit"
    elif len(key.parts) >= MAX_CANDIDATES + 2:
        reason = "has too many images"
    if reason or key.error:
        remedy = "give each record its own regular files of at most "
        remedy += f"{limit:,} bytes, {_MAX_KEY_BYTES:,} in all, and {MAX_CANDIDATES} images"
        key.error = key.error or DataError(reason, field=part, remedy=remedy, preview=member.name)
        return
    stream = tar.extractfile(member)
    assert stream is not None
    key.parts[part], key.names[part] = stream.read(), member.name
    key.num_bytes += member.size


def _finish(key: _Key, place: str) -> ImageRecord | DataError:
    try:
        if key.error is not None:
            raise key.error
        return _record(key, place)
    except DataError as error:
        return at(place, error)


def _record(key: _Key, place: str) -> ImageRecord:
    row = _row(key)
    sides, relevance, extras = ["image"], (), {}
    numbered = sorted(int(part) for part in key.parts if part.isdigit())
    if "chosen" in key.parts or "rejected" in key.parts:
        sides, relevance, extras = ["chosen", "rejected"], (1.0, 0.0), pair_extras(row)
    elif numbered:
        if numbered[-1] != len(numbered) - 1:
            raise DataError("has a gap", field=str(numbered[-1]), remedy="number the images from 0")
        check_count(numbered, "images")
        sides, relevance = [str(i) for i in numbered], grades_of(row, len(numbered))
    else:
        relevance = desirability_of(row)
    for side in sides:
        if side not in key.parts:
            remedy = "the files of one key stand together in the tar: write them in one go"
            raise DataError("is missing", field=side, remedy=f"found {', '.join(key.parts)}; {remedy}")
    if len(sides) < len(key.parts.keys() - {"txt", "json"}):
        found = ", ".join(key.parts)
        raise DataError("mixes kinds of records", remedy=f"found {found}: give a pair, a list or one image")
    images = tuple(
        ImageSource(name=clean(f"{place}: {key.names[side]}"), data=key.parts[side], place=place, column=side)
        for side in sides
    )
    return make_record(
        source=place,
        prompt=prompt_of(row),
        images=images,
        relevance=relevance,
        group=person_of(row),
        **extras,
    )


def _row(key: _Key) -> dict[str, Any]:
    """What the .json says; the .txt is the prompt."""
    row: Any = {}
    try:
        if "json" in key.parts:
            row = json.loads(key.parts["json"].decode("utf-8-sig"))
        if "txt" in key.parts and isinstance(row, dict):
            row = row | {"prompt": key.parts["txt"].decode("utf-8-sig").strip()}
    except UnicodeDecodeError:
        raise DataError("is not valid UTF-8", field="txt or json", remedy="save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError("is not valid JSON", field="json", remedy=f"correct it: {error}"[:200]) from None
    if not isinstance(row, dict):
        raise DataError("is not an object", field="json", remedy="write {...}", preview=row)
    return row
