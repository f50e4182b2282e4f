"""Rows out of JSON lines and JSON arrays, one at a time with their lines, at constant memory.

Every row comes as `(place, row)`; where it cannot be had, as `(place, DataError)`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from triptych.training.quarantine import DataError

Rows = Iterator[tuple[str, object]]
MAX_ROW_BYTES = 1_000_000
_BOM = b"\xef\xbb\xbf"
_BAD_BYTES = re.compile(r"[\udc80-\udcff]")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_rows(path: Path, *, name: str) -> Rows:
    """The rows of a `.json` or `.jsonl` file, told apart by how they start.

    One row may take MAX_ROW_BYTES. After a bad element of an array reading goes on at the next line that
    opens as the first one did; in an array written on one line the rest is lost, and said to be.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(4096).removeprefix(_BOM)
            stream.seek(0)
            if re.match(rb"\s*\[\s*[\{\]]", start) or (path.suffix == ".json" and start[:1] == b"["):
                yield from _array(stream, name)
            else:
                yield from _lines(stream, name)
    except OSError as error:
        yield name, DataError("cannot be read", source=name, remedy=f"{error}"[:200])


def _lines(stream: BinaryIO, name: str) -> Rows:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        place = f"{name}:{number}"
        rest = line
        while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_ROW_BYTES)
        line = line.removeprefix(_BOM) if number == 1 else line
        if len(line.rstrip(b"\r\n")) > MAX_ROW_BYTES:
            yield place, _too_long(place)
        elif line.strip():
            yield place, _line(line, place)


def _line(line: bytes, place: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _bad_utf8(place, line)
    except (ValueError, RecursionError) as error:
        return _bad_json(place, error, line.decode("utf-8"))


class _Window:
    """The part of a text file that is being parsed; at: where, line: in which line of the file."""

    def __init__(self, stream: BinaryIO):
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode

    def fill(self) -> None:
        """Have as much text ahead as a row may take, or all there is."""
        while not self.ended and len(self.text) - self.at < MAX_ROW_BYTES + 1:
            block = self._stream.read(MAX_ROW_BYTES)
            self.ended = not block
            self.text = self.text[self.at :] + self._decode(block, final=self.ended)
            self.at = 0

    def go(self, end: int) -> None:
        """Move on to `end`, counting lines."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def skip_space(self) -> str:
        """Move to the next character that is not blank and return it; empty at the end."""
        while True:
            self.fill()
            match = _SPACE.match(self.text, self.at)
            self.go(match.end() if match else self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]

    def find(self, opening: str) -> bool:
        """Move to the next occurrence of a line that opens like this; False if there is none."""
        while True:
            self.fill()
            found = self.text.find(opening, self.at + 1)
            if found >= 0:
                self.go(found)
                return True
            if self.ended:
                return False
            self.go(max(self.at + 1, len(self.text) - len(opening)))


def _array(stream: BinaryIO, name: str) -> Rows:
    window = _Window(stream)
    window.skip_space()
    window.at += 1
    window.fill()
    opening = re.compile(r"\s*?(\n[ \t]*\{)").match(window.text, window.at)
    decoder = json.JSONDecoder()
    comma = False
    while True:
        char = window.skip_space()
        place = f"{name}:{window.line}"
        if char in ("", "]"):
            yield from _ending(place, char, comma)
            return
        window.fill()
        try:
            row, end = decoder.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            bad = _bad_element(window, place, error)
            if opening is None or not window.find(opening[1]):
                rest = f"{bad.remedy}; the rest of the file was not read"
                yield place, DataError(bad.reason, source=place, remedy=rest, preview=bad.preview)
                return
            yield place, bad
            comma = False
            continue
        yield place, _element(row, window.text[window.at : end], place)
        window.go(end)
        comma = window.skip_space() == ","
        window.at += comma


def _bad_element(window: _Window, place: str, error: Exception) -> DataError:
    written = window.text[window.at : window.at + MAX_ROW_BYTES]
    if isinstance(error, json.JSONDecodeError) and not window.ended:
        unfinished = error.msg.startswith("Unterminated") or error.pos >= len(window.text)
        if unfinished or error.pos - window.at > MAX_ROW_BYTES:
            return _too_long(place)
    return _bad_json(place, error, written)


def _ending(place: str, char: str, comma: bool) -> Rows:
    if not char:
        remedy = "the closing ] is missing: make the file again"
        yield place, DataError("is damaged or cut off", source=place, remedy=remedy)
    elif comma:
        yield place, DataError("has a trailing comma", source=place, remedy="remove the comma before ]")


def _element(row: object, written: str, place: str) -> object:
    if len(written) > MAX_ROW_BYTES:
        return _too_long(place)
    return _bad_utf8(place, written) if _BAD_BYTES.search(written) else row


def _too_long(place: str) -> DataError:
    remedy = f"keep a record below {MAX_ROW_BYTES:,} bytes"
    return DataError("is longer than the limit", source=place, remedy=remedy)


def _bad_utf8(place: str, preview: object) -> DataError:
    return DataError("is not valid UTF-8", source=place, remedy="save the file as UTF-8", preview=preview)


def _bad_json(place: str, error: Exception, text: str) -> DataError:
    remedy = f"correct it: {error}"[:200]
    if isinstance(error, RecursionError):
        remedy = "it is nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        remedy = f"correct it: {error.msg}"
    return DataError("is not valid JSON", source=place, remedy=remedy, preview=text)
