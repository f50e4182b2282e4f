"""Folders that appear whole or not at all: written aside, synced, renamed; deleted by renaming first.

A folder called X is only ever seen as `.tmp-X-...` (being written), `X` (complete), `.aside-X-...` (the
previous X while a new one takes its name) or `.trash-X-...` (being deleted). `clean_temporary` sorts out
what a crash left.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_HIDDEN = re.compile(r"\.(?P<kind>tmp|aside|trash)-(?P<name>.+)-\d+-\d+")


def fault_point(name: str) -> None:
    """Do nothing; tests replace it to kill the process or raise at the step called `name`."""


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` means a full disk, quota or file-size limit; safetensors tells by text only."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found[1]) in FULL_DISK


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file at `path`, then flush it."""
    fault_point(f"write:{path.name}")
    write(path)
    fault_point(f"fsync:{path.name}")
    sync(path)


def make_temporary(final: Path) -> Path:
    """Make the empty folder in which `final` is to be written."""
    temporary = _hidden(final, "tmp")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, final: Path) -> None:
    """Give a complete, synced folder its final name, replacing what has that name now.

    A crash in between leaves the old or the new one under `final`, or the old one aside, from where
    `clean_temporary` puts it back.
    """
    aside = None
    fault_point("fsync-folder")
    sync(temporary)
    if os.path.lexists(final):
        fault_point("set-aside")
        aside = _hidden(final, "aside")
        os.rename(final, aside)
    fault_point("rename")
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    fault_point("fsync-parent")
    sync(final.parent)
    if aside is not None:
        discard(aside, called=final)


def discard(path: Path, *, called: Path | None = None) -> None:
    """Delete a folder so that a half-deleted one never has its name; `called` is the name if it is hidden."""
    fault_point("rotate")
    trash = _hidden(called or path, "trash")
    os.rename(path, trash)
    delete(trash)


def delete(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder, entry by entry."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for entry in sorted(path.iterdir()):
        fault_point(f"remove:{entry.name}")
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    path.rmdir()


def clean_temporary(root: Path) -> list[str]:
    """Remove what a crash left in `root` and put an old folder back whose replacement never came.

    Call it when a run starts, before looking for checkpoints and while nothing else writes to `root`.
    Only names made by this module are touched. Returns one line per entry for the log.
    """
    done = []
    hidden = {path: found for path in _listing(root) if (found := _HIDDEN.fullmatch(path.name))}
    for path, found in hidden.items():
        final = root / found["name"]
        if found["kind"] == "aside" and not os.path.lexists(final):
            fault_point("restore")
            os.rename(path, final)
            done.append(f"put back {final.name}, whose replacement was not finished")
        else:
            delete(path)
            done.append(f"removed {path.name}, left by an interrupted run")
    return done


def _listing(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _hidden(final: Path, kind: str) -> Path:
    """Return a free sibling name; a counter, as process ids come back after a crash in a container."""
    names = (final.parent / f".{kind}-{final.name}-{os.getpid()}-{number}" for number in count())
    return next(path for path in names if not os.path.lexists(path))


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")
    temporary.replace(path)
