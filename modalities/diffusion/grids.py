"""Contact sheets: rows of pictures with their prompts, one column a model or step, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from triptych.modalities.diffusion.measures import on_white
from triptych.training.redaction import printable

_GAP = 6
_MARGIN = 10
_TEXT = 13
_INK, _MUTED, _PAPER, _EMPTY = "#1a1a1a", "#555555", "#ffffff", "#f0f0f0"
_MAX_LINES = 8


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    *,
    cell: int | None = None,
    caption: int = 150,
) -> bytes:
    """One sheet, PNG bytes; the same pictures give the same bytes.

    rows: pictures, one list a row; None leaves an empty place. cell: longer side of a place in pixels; None
    is the pictures' own, kept within 96 to 256. Smaller pictures are magnified: by whole factors pixels stay
    sharp, otherwise they are interpolated. caption: width of the column of row titles, whose text is
    wrapped. ValueError for rows and titles that do not fit together.
    """
    if not rows or len(rows) != len(row_titles):
        raise ValueError(f"a grid of {len(rows)} rows has {len(row_titles)} row titles; one a row is needed")
    for i, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {i} of the grid has {len(row)} places for {len(column_titles)} columns")
    sizes = [max(image.size) for row in rows for image in row if image is not None]
    side = cell or _side(max(sizes, default=96))
    fitted = [[None if image is None else _fit(image, side) for image in row] for row in rows]
    heads = [_wrap(title, side) for title in column_titles]
    texts = [_wrap(title, caption - _GAP) for title in row_titles]
    line = _line_height()
    top = _MARGIN + max(map(len, heads)) * line + _GAP
    heights = [
        max([len(text) * line, *(image.height for image in row if image is not None)])
        for row, text in zip(fitted, texts, strict=True)
    ]
    left = _MARGIN + (caption if any(row_titles) else 0)
    width = left + len(column_titles) * (side + _GAP) - _GAP + _MARGIN
    height = top + sum(heights) + (len(rows) - 1) * _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        _write(pen, (left + j * (side + _GAP), top - _GAP - len(head) * line), head, _INK)
    y = top
    for row, text, tall in zip(fitted, texts, heights, strict=True):
        _write(pen, (_MARGIN, y), text, _MUTED)
        for j, image in enumerate(row):
            x = left + j * (side + _GAP)
            if image is None:
                pen.rectangle((x, y, x + side - 1, y + tall - 1), fill=_EMPTY)
            else:
                sheet.paste(image, (x + (side - image.width) // 2, y))
        y += tall + _GAP
    return png(sheet)


def png(image: Image.Image) -> bytes:
    """A picture as PNG bytes, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def readable(image: Image.Image, least: int = 96) -> Image.Image:
    """The picture, magnified where its longer side is below `least` pixels."""
    side = max(image.size)
    return image if side >= least else _fit(image, side * -(-least // side))


def _side(largest: int) -> int:
    """Side of a place for pictures of this size: small ones are magnified by a whole factor."""
    return largest * -(-96 // largest) if largest < 96 else min(largest, 256)


def _fit(image: Image.Image, side: int) -> Image.Image:
    rgb = on_white(image)
    longer = max(rgb.size)
    if longer == side:
        return rgb
    if longer < side and side % longer == 0:
        factor = side // longer
        return rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)
    scale = side / longer
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    # matplotlib brings the font along, so sheets look alike everywhere.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _TEXT)


def _line_height() -> int:
    ascent, descent = _font().getmetrics()
    return ascent + descent + 1


def _wrap(text: str, width: int) -> list[str]:
    """Lines no wider than `width` pixels; words that are wider are cut, and what is left over has dots."""
    lines: list[str] = []
    current = ""
    for word in printable(text).split():
        wider = f"{current} {word}" if current else word
        if _font().getlength(wider) <= width:
            current = wider
            continue
        if current:
            lines.append(current)
        current = word
        while _font().getlength(current) > width:
            keep = next(n for n in range(len(current), 0, -1) if _fits(current[:n], width) or n == 1)
            lines.append(current[:keep])
            current = current[keep:]
    lines += [current] if current else []
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], lines[_MAX_LINES - 1].rstrip()[:-1] + "\u2026"]
    return lines


def _fits(text: str, width: int) -> bool:
    return _font().getlength(text) <= width


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], colour: str) -> None:
    for i, text in enumerate(lines):
        pen.text((at[0], at[1] + i * _line_height()), text, fill=colour, font=_font())
