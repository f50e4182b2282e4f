"""From files or a folder of image preferences to checked records, streamed.

for record in read_records("pickapic/data", quarantine=Quarantine("runs/a/quarantine.jsonl")): ...
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from triptych.modalities.diffusion.fields import at, clean, confined
from triptych.modalities.diffusion.json_rows import Rows, read_json_rows
from triptych.modalities.diffusion.layouts import ImageOf, detect_layout, parse_row
from triptych.modalities.diffusion.readers_pickapic import check_columns, read_pickapic
from triptych.modalities.diffusion.readers_webdataset import read_webdataset
from triptych.modalities.diffusion.records import ImageRecord, ImageSource
from triptych.training.quarantine import DataError, Quarantine

LAYOUTS = ("pickapic", "hpdv2", "hpdv3", "imagereward", "folder", "webdataset")
_ENDINGS = {
    "parquet": (".parquet",),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "json": (".json", ".jsonl"),
}
_KIND_OF = {"pickapic": "parquet", "webdataset": "tar"}
_METADATA = "metadata.jsonl"
_ACCEPTED = "a .parquet, .tar, .tar.gz, .json or .jsonl file, a folder of one of these, or a pattern with *"
_SPLIT_WORDS = "train|test|val|valid|validation|eval|dev"
_NUM_ROWS_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of one data set, of one kind, with the names messages call them."""

    name: str
    kind: str
    files: tuple[tuple[Path, str], ...]


def read_records(
    path: str | os.PathLike[str],
    *,
    layout: str = "auto",
    split: str = "train",
    ties: Literal["drop", "half"] = "drop",
    image_root: str | os.PathLike[str] | None = None,
    quarantine: Quarantine,
    report: Callable[[str], object] = lambda line: None,
) -> Iterator[ImageRecord]:
    """The usable records of a file, a folder or a pattern, one at a time; the others go to `quarantine`.

    Layouts: Pick-a-Pic v2 parquet, HPDv2, HPDv3, ImageReward, `metadata.jsonl` folders, WebDataset tars;
    "auto" tells them apart by endings and columns, and `report` gets a line that says what was found. In a
    folder whose files are named for splits, those of `split` are read. Paths of images start at the file
    that names them (for HPDv2 at `train/` beside train.json if there is one) or at `image_root`, and must
    stay below it. ties: what prefers nothing is left out ("drop") or kept ("half"; a pair then has strength
    1/2). Settings are checked at once; DataError at the end if no record was usable.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it is one of auto, {', '.join(LAYOUTS)}")
    if ties not in ("drop", "half"):
        raise ValueError(f"ties is {ties!r}; it is drop or half")
    source = _find(os.fspath(path), split)
    found = _detect(source) if layout == "auto" else layout
    if _KIND_OF.get(found, "json") != source.kind:
        needed = ", ".join(_ENDINGS[_KIND_OF.get(found, "json")])
        raise DataError(
            f"holds {source.kind} files", source=source.name, remedy=f"layout {found} needs {needed}"
        )
    if image_root is not None and source.kind != "json":
        raise ValueError(f"image_root={image_root} is for images that are files; {found} holds them itself")
    roots = [_image_root(file, found, image_root) for file, _ in source.files]
    how = "detected" if layout == "auto" else "given"
    where = f", images below {_shown(roots)}" if source.kind == "json" else ""
    files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
    report(f"{source.name}: layout {found} ({how}), {files}{where}, ties: {ties}")
    return _kept(_everything(source, found, roots), source.name, ties, quarantine)


def _kept(
    results: Iterator[ImageRecord | DataError], name: str, ties: str, quarantine: Quarantine
) -> Iterator[ImageRecord]:
    num_kept = 0
    for result in results:
        if isinstance(result, ImageRecord) and result.is_tie and ties == "drop":
            result = DataError("is a tie", source=result.source, remedy="ties: half keeps it")
        if isinstance(result, DataError):
            quarantine.add(result)
        else:
            num_kept += 1
            yield result
    if not num_kept:
        raise DataError("holds no usable record", source=name, remedy=quarantine.summary())


def _everything(source: _Source, layout: str, roots: Sequence[Path]) -> Iterator[ImageRecord | DataError]:
    for (file, name), root in zip(source.files, roots, strict=True):
        if source.kind == "parquet":
            yield from read_pickapic(file, name=name)
        elif source.kind == "tar":
            yield from read_webdataset(file, name=name)
        else:
            yield from _json_records(read_json_rows(file, name=name), layout, root.resolve())


def _json_records(rows: Rows, layout: str, root: Path) -> Iterator[ImageRecord | DataError]:
    for place, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            yield parse_row(row, layout, place, _opener(root, place))
        except DataError as error:
            yield at(place, error)


def _opener(root: Path, place: str) -> ImageOf:
    def image(value: object, column: str) -> ImageSource:
        path = confined(root, value, column)
        return ImageSource(name=str(value), path=path, place=place, column=column)

    return image


def _image_root(file: Path, layout: str, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        if not Path(given).is_dir():
            raise DataError("is no folder", source=os.fspath(given), field="image_root")
        return Path(given)
    split_folder = file.parent / file.stem
    return split_folder if layout == "hpdv2" and split_folder.is_dir() else file.parent


def _shown(roots: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(str(root) for root in roots))


def _detect(source: _Source) -> str:
    """The layout of most of the first rows; DataError, with the first reason, if none of them has one."""
    if source.kind == "parquet":
        for file, name in source.files:
            check_columns(file, name=name)
        return "pickapic"
    if source.kind == "tar":
        return "webdataset"
    votes: Counter[str] = Counter()
    first: DataError | None = None
    rows = itertools.chain.from_iterable(read_json_rows(file, name=name) for file, name in source.files)
    for place, row in itertools.islice(rows, _NUM_ROWS_LOOKED_AT):
        try:
            if isinstance(row, DataError):
                raise row
            votes[detect_layout(row)] += 1
        except DataError as error:
            first = first or at(place, error)
    if not votes:
        raise first or DataError("holds no record", source=source.name, remedy="it is empty")
    return votes.most_common(1)[0][0]


def _find(path: str, split: str) -> _Source:
    """The files that a path names. Links out of a folder are refused, as somebody else may have made it."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise DataError("is a URL", source=path, remedy=f"download it first; then give {_ACCEPTED}")
    if not path.strip() or "\0" in path:
        raise DataError("is no path", source=path, remedy=f"give {_ACCEPTED}")
    folder = Path(path).expanduser()
    if folder.is_file():
        return _source(path, [folder])
    if folder.is_dir():
        return _source(path, _of_folder(folder, split))
    if glob.has_magic(path):
        found = sorted(Path(p) for p in glob.glob(str(folder), recursive=True) if Path(p).is_file())
        if found:
            return _source(path, found)
        raise DataError("matches no file", source=path, remedy=f"give {_ACCEPTED}")
    raise DataError("does not exist", source=path, remedy=f"give {_ACCEPTED}")


def _source(path: str, files: Sequence[Path]) -> _Source:
    kinds = {_kind(file) for file in files}
    if None in kinds:
        odd = next(file for file in files if _kind(file) is None)
        raise DataError(
            "is not a file type of image preferences", source=odd.name, remedy=f"give {_ACCEPTED}"
        )
    if len(kinds) > 1:
        names = ", ".join(file.name for file in files[:20])
        remedy = f"name one of them or a pattern: it holds {names}"
        raise DataError("holds files of several kinds", source=path, remedy=remedy)
    parents = {file.parent for file in files}
    top = files[0].parent if len(parents) == 1 else Path(os.path.commonpath(parents))
    named = tuple((file, clean(file.relative_to(top).as_posix())) for file in files)
    return _Source(Path(path).name or path, str(kinds.pop()), named)


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), None)


def _of_folder(folder: Path, split: str) -> list[Path]:
    """Its metadata.jsonl or the split's; else all data files, or this split's where some name one."""
    for place in (folder, folder / split):
        if (place / _METADATA).is_file():
            return _inside(folder, [place / _METADATA])
    paths = sorted(p for p in folder.rglob("*") if _kind(p) and p.is_file() and not _hidden(p, folder))
    # A data set's JSON lies at the top, and beside other data it only describes these.
    top = [p for p in paths if _kind(p) != "json"] or [p for p in paths if p.parent == folder]
    if not top:
        raise DataError("holds no data file", source=str(folder), remedy=f"give {_ACCEPTED}")
    named = [p for p in top if re.match(rf"(?:{_SPLIT_WORDS})(?![a-z])", p.name.lower())]
    if named:
        chosen = [p for p in top if re.match(rf"{re.escape(split.lower())}(?![a-z_])", p.name.lower())]
        if not chosen:
            found = ", ".join(p.name for p in top[:20])
            raise DataError(
                f"has no file for split {split!r}", source=str(folder), remedy=f"it holds {found}"
            )
        top = chosen
    return _inside(folder, top)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _inside(folder: Path, paths: list[Path]) -> list[Path]:
    root = folder.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(root):
            remedy = "copy the file into the folder, or name it, or give a pattern with *"
            raise DataError("links out of its folder", source=str(path), remedy=remedy)
    return paths
