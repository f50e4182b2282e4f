import io

import numpy as np
import pytest
from PIL import Image

from triptych.modalities.diffusion.grids import _font, _line_height, _wrap, grid, png, readable

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def opened(data):
    assert data.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(data)))


def places(sheet, colour):
    """(top, left, bottom, right) of the pixels of a colour."""
    ys, xs = np.nonzero((sheet == np.array(colour)).all(-1))
    return ys.min(), xs.min(), ys.max() + 1, xs.max() + 1


def test_every_picture_stands_in_its_row_and_column_whole():
    sheet = opened(
        grid(
            [[flat(RED), flat(GREEN)], [None, flat(BLUE, (64, 32))]],
            ["base", "aligned"],
            ["a red square", "a flag"],
        )
    )
    red, green, blue = (places(sheet, c) for c in (RED, GREEN, BLUE))
    # 64 pixels are doubled, so that a side is at least 96.
    assert [(b - t, r - le) for t, le, b, r in (red, green, blue)] == [(128, 128), (128, 128), (64, 128)]
    assert red[0] == green[0] < red[2] <= blue[0]
    assert red[3] < green[1] == blue[1]
    assert (sheet == np.array([240] * 3)).all(-1).any(), "the empty place is grey"


def test_small_pictures_keep_their_pixels_sharp_and_large_ones_are_reduced():
    checks = np.indices((16, 16)).sum(0) % 2 * 255
    small = Image.fromarray(np.repeat(checks[..., None], 3, -1).astype(np.uint8))
    side = opened(grid([[small]], ["x"], [""]))
    # A sharp magnification of black and white adds no grey below the heading.
    below = side[_line_height() + 20 :]
    assert set(np.unique(below)) == {0, 255}
    assert readable(small).size == (96, 96)
    assert readable(flat(RED, (40, 20))).size == (120, 60)
    assert readable(flat(RED, (100, 20))).size == (100, 20)
    large = places(opened(grid([[flat(RED, (1024, 512))]], ["x"], [""])), RED)
    assert (large[2] - large[0], large[3] - large[1]) == (128, 256)
    chosen = places(opened(grid([[flat(RED, (50, 50))]], ["x"], [""], cell=200)), RED)
    assert chosen[2] - chosen[0] == chosen[3] - chosen[1] == 200


def test_pictures_of_different_sizes_share_a_side():
    sheet = opened(grid([[flat(RED, (64, 64)), flat(BLUE, (128, 96))]], ["", ""], [""]))
    red, blue = places(sheet, RED), places(sheet, BLUE)
    assert red[2] - red[0] == 128
    assert (blue[2] - blue[0], blue[3] - blue[1]) == (96, 128)


def test_titles_are_wrapped_within_their_width_and_lose_nothing_but_what_is_too_long():
    text = "a photograph of an astronaut riding a horse on the moon"
    lines = _wrap(text, 120)
    assert len(lines) > 2
    assert " ".join(lines) == text
    assert all(_font().getlength(line) <= 120 for line in lines)
    long_word = _wrap("x" * 60, 100)
    assert "".join(long_word) == "x" * 60
    assert all(_font().getlength(line) <= 100 for line in long_word)
    cut = _wrap("word " * 200, 100)
    assert (len(cut), cut[-1][-1]) == (8, "\u2026")
    shown = " ".join(_wrap("a\nb\x00\u202ec", 300))
    assert shown.startswith("a b")
    assert not {"\x00", "\u202e"} & set(shown)


def test_a_long_caption_makes_its_row_taller_and_a_written_one_leaves_ink():
    short = opened(grid([[flat(RED)]], ["base"], ["cat"]))
    tall = opened(grid([[flat(RED)]], ["base"], ["cat and dog " * 30]))
    assert tall.shape[0] > short.shape[0]
    top, left, bottom, _ = places(short, RED)
    assert (short[top:bottom, :left] < 128).any(), "the caption"
    assert (short[:top] < 128).any(), "the heading"
    bare = opened(grid([[flat(RED)]], [""], [""]))
    assert (bare == 255).all(-1).mean() + (bare == np.array(RED)).all(-1).mean() == 1


def test_the_same_pictures_give_the_same_bytes():
    rows = [[flat(RED), flat(BLUE)]]
    assert grid(rows, ["a", "b"], ["c"]) == grid(rows, ["a", "b"], ["c"])
    assert np.array_equal(opened(png(flat(GREEN))), np.asarray(flat(GREEN)))


def test_rows_and_titles_must_fit_together():
    with pytest.raises(ValueError, match="1 rows has 2 row titles"):
        grid([[flat(RED)]], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="row 0 of the grid has 1 places for 2 columns"):
        grid([[flat(RED)]], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="0 rows"):
        grid([], ["a"], [])
