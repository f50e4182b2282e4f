"""Opening images: what is accepted comes out as upright RGB; everything else is a DataError, cheaply."""

import io
import os
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import encoded, jpeg, noise, png_header, source, webp_header
from PIL import Image, ImageFile

from triptych.modalities.diffusion.images import ImageLimits, open_image
from triptych.modalities.diffusion.records import ImageSource
from triptych.training.quarantine import DataError

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def flat(mode, colour, size=(32, 20)):
    return Image.new(mode, size, colour)


def animated(format):
    frames = [flat("RGB", (40 * i, 0, 0)) for i in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)


REFUSED = {
    "zero bytes": (b"", "is an empty file", "make the image again"),
    "half JPEG": (jpeg()[: len(jpeg()) // 2], "is a broken image", "truncated"),
    "half progressive JPEG": (
        encoded(noise(), progressive=True)[:-60],
        "is a broken image",
        "truncated",
    ),
    "half PNG": (encoded(noise(), "PNG")[:-300], "is a broken image", "make it again"),
    "half WebP": (encoded(noise(), "WEBP")[:-100], "is a broken image", "make it again"),
    "JPEG start only": (b"\xff\xd8\xff", "is a broken image", "make it again"),
    "PNG start only": (b"\x89PNG\r\n\x1a\n", "is a broken image", "make it again"),
    "animated WebP": (animated("WEBP"), "is animated", "save one frame"),
    "animated PNG": (animated("PNG"), "is animated", "save one frame"),
    "GIF": (animated("GIF"), "is not a JPEG, PNG or WebP image", "looks like a GIF"),
    "1x1": (encoded(flat("RGB", 0, (1, 1)), "PNG"), "is too small", "it is 1x1"),
    "1x20000": (encoded(flat("L", 0, (1, 20000)), "PNG"), "is too small", "it is 1x20000"),
    "20x20000": (encoded(flat("L", 0, (20, 20000)), "PNG"), "is too long and thin", "it is 20x20000"),
    "30000 squared": (png_header(30000, 30000), "has too many pixels", "it is 30000x30000"),
    "webp 16000 squared": (webp_header(16000, 16000), "has too many pixels", "limit"),
    "webp 9000 squared": (webp_header(9000, 9000), "has too many pixels", "it is 9000x9000"),
    "webp 6000 squared": (webp_header(6000, 6000), "takes too much memory to decode", "720,000,000 bytes"),
    "SVG": (SVG, "is not a JPEG, PNG or WebP image", "looks like an SVG"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not a JPEG, PNG or WebP image", "looks like PostScript"),
    "PSD": (b"8BPS\0\1" + bytes(60), "is not a JPEG, PNG or WebP image", "a Photoshop file"),
    "TIFF": (encoded(noise(), "TIFF"), "is not a JPEG, PNG or WebP image", "a TIFF"),
    "HTML as jpg": (b"\n<!DOCTYPE html><html>404</html>", "is not a JPEG, PNG or WebP image", "a web page"),
    "text": (b"hello", "is not a JPEG, PNG or WebP image", "no known image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_usable_image_is_refused_with_reason_record_and_remedy(kind):
    data, reason, remedy = REFUSED[kind]
    with pytest.raises(DataError) as caught:
        open_image(source(data))
    assert caught.value.reason == reason
    assert remedy in caught.value.remedy
    assert (caught.value.source, caught.value.field) == ("rows.jsonl:1", "image")
    assert caught.value.preview == "picture"


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'image' cannot be read; .*No such file"):
        open_image(ImageSource("a.jpg", path=tmp_path / "a.jpg", place="rows.jsonl:1", column="image"))


def test_too_many_bytes_are_not_read(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    image = ImageSource("a.jpg", path=path)
    with pytest.raises(DataError, match=r"a.jpg: is larger than the limit; keep .* below 99 bytes"):
        open_image(image, limits=ImageLimits(max_bytes=99))
    assert open_image(image).size == (40, 24)


def test_a_wrong_ending_does_not_matter():
    assert open_image(source(encoded(noise(3), "PNG"), "a.jpg")).tobytes() == noise(3).tobytes()


def test_lossless_pixels_come_through_unchanged():
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        opened = open_image(source(encoded(noise(1), format, **options)))
        assert (opened.mode, opened.size) == ("RGB", (40, 24))
        assert opened.tobytes() == noise(1).tobytes()


def test_jpeg_pixels_are_those_pillow_decodes():
    data = jpeg(4)
    assert open_image(source(data)).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_sixteen_bits_keep_their_upper_eight():
    values = (np.arange(20 * 32, dtype=np.uint16) * 100).reshape(20, 32)
    opened = np.asarray(open_image(source(encoded(Image.fromarray(values), "PNG"))))
    assert np.array_equal(opened, np.repeat((values >> 8)[:, :, None], 3, axis=2))
    assert opened.max() == 249


def test_cmyk_becomes_rgb():
    opened = open_image(source(encoded(flat("CMYK", (0, 255, 255, 0)), quality=100)))
    red, green, blue = opened.getpixel((5, 5))
    assert red > 240
    assert max(green, blue) < 15


def test_transparency_is_laid_on_white():
    half = flat("RGBA", (0, 0, 200, 128))
    assert open_image(source(encoded(half, "PNG"))).getpixel((3, 3)) == pytest.approx((127, 127, 227), abs=1)
    clear = flat("LA", (7, 0))
    assert open_image(source(encoded(clear, "PNG"))).getpixel((0, 0)) == (255, 255, 255)
    lossless = encoded(flat("RGBA", (9, 9, 9, 0)), "WEBP", lossless=True, exact=True)
    assert open_image(source(lossless)).getpixel((31, 19)) == (255, 255, 255)


def test_transparency_is_laid_on_white_beyond_the_first_strip():
    tall = Image.new("RGBA", (40, 300), (10, 20, 30, 255))
    tall.paste((0, 0, 0, 0), (0, 270, 40, 300))
    opened = open_image(source(encoded(tall, "PNG")))
    assert [opened.getpixel((5, y)) for y in (0, 260, 299)] == [(10, 20, 30), (10, 20, 30), (255, 255, 255)]


def test_a_transparent_colour_is_white_in_palettes_grey_and_sixteen_bits():
    palette = flat("P", 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    opened = open_image(source(encoded(palette, "PNG", transparency=0)))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((255, 255, 255), (0, 255, 0))
    assert open_image(source(encoded(flat("L", 9), "PNG", transparency=9))).getpixel((0, 0)) == (255,) * 3
    deep = Image.fromarray(np.full((20, 32), 5000, dtype=np.uint16))
    data = encoded(deep, "PNG")
    clear = b"tRNS" + (5000).to_bytes(2, "big")
    at = data.index(b"IDAT") - 4
    chunk = (2).to_bytes(4, "big") + clear + zlib.crc32(clear).to_bytes(4, "big")
    assert open_image(source(data)).getpixel((0, 0)) == (19, 19, 19)
    assert open_image(source(data[:at] + chunk + data[at:])).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_images_come_upright_as_their_exif_says(format, orientation, corner):
    """The stored upper left corner is red; orientation 6 (turn clockwise) shows it at the upper right."""
    image = flat("RGB", (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    opened = open_image(source(encoded(image, format, exif=exif, **options)))
    assert opened.size == ((32, 20) if orientation < 5 else (20, 32))
    x, y = corner[0] * (opened.width - 1), corner[1] * (opened.height - 1)
    red, _, blue = opened.getpixel((x, y))
    assert red > 200 > 50 > blue
    assert opened.getexif().get(0x0112, 1) == 1 or orientation == 1


def test_metadata_does_not_come_along():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    opened = open_image(source(encoded(noise(), "JPEG", exif=exif, comment=b"secret", icc_profile=b"x" * 99)))
    assert opened.info == {}
    assert b"secret" not in encoded(opened, "PNG") + encoded(opened, "JPEG")


def test_broken_exif_turns_nothing():
    data = encoded(noise(2), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert open_image(source(data)).tobytes() == noise(2).tobytes()


def test_truncated_images_stay_refused_when_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="is a broken image"):
        open_image(source(REFUSED["half JPEG"][0]))


def test_a_webp_image_does_not_keep_its_decoder_and_two_canvases():
    assert type(open_image(source(encoded(noise(), "WEBP")))) is Image.Image


def test_memory_counts_progressive_coding_and_transparency_and_turning():
    """Bytes a pixel: RGB 4, its coefficients 6 more; RGBA and its RGB 8; turned 4 and 4."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for data, most in (
        (jpeg(), 4),
        (encoded(noise(), progressive=True), 10),
        (encoded(noise(mode="L"), progressive=True), 5),
        (encoded(noise(mode="RGBA"), "PNG"), 8),
        (encoded(noise(mode="LA"), "PNG"), 12),
        (encoded(noise(), exif=exif), 8),
        (encoded(noise(), "WEBP"), 17),
        (encoded(noise(), "WEBP", lossless=True), 20),
    ):
        assert open_image(source(data), limits=ImageLimits(max_memory=960 * most))
        with pytest.raises(DataError, match="takes too much memory to decode"):
            open_image(source(data), limits=ImageLimits(max_memory=960 * most - 1))


def test_limits_are_checked():
    data = encoded(noise(0, width=40, height=24), "PNG")
    for limit, reason in (
        ({"max_pixels": 959}, "has too many pixels"),
        ({"min_side": 25}, "is too small"),
        ({"max_aspect": 1.6}, "is too long and thin"),
        ({"max_memory": 959 * 4}, "takes too much memory to decode"),
    ):
        with pytest.raises(DataError) as caught:
            open_image(source(data), limits=ImageLimits(**limit))
        assert caught.value.reason == reason
    exact = ImageLimits(max_pixels=960, min_side=24, max_aspect=40 / 24, max_memory=960 * 4)
    assert open_image(source(data), limits=exact).size == (40, 24)
    with pytest.raises(ValueError, match="min_side=0 must be at least 1"):
        ImageLimits(min_side=0)


CHILD = """
import sys
from image_files import source
from triptych.modalities.diffusion.images import open_image
from triptych.training.quarantine import DataError
data = open(sys.argv[1], "rb").read()
# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
try:
    size = open_image(source(data)).size
except DataError as error:
    size = error.reason
print((peak() - before) * 1024, size)
"""


def added_memory(tmp_path, data):
    """Bytes that opening adds to the peak of a fresh process, and what came of it."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak memory of a process is read from /proc")
    path = tmp_path / "image"
    path.write_bytes(data)
    paths = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    added, _, outcome = done.stdout.strip().partition(" ")
    return int(added), outcome


@pytest.mark.parametrize(
    "kind", ["30000 squared", "webp 16000 squared", "webp 9000 squared", "webp 6000 squared"]
)
def test_refusing_a_bomb_takes_next_to_no_memory(tmp_path, kind):
    added, outcome = added_memory(tmp_path, REFUSED[kind][0])
    assert outcome == REFUSED[kind][1]
    assert added < 30_000_000


LARGEST = {
    "rgba png": (
        lambda: encoded(flat("RGBA", (1, 2, 3, 9), (6000, 6100)), "PNG", compress_level=1),
        "(6000, 6100)",
    ),
    "grey alpha png": (lambda: encoded(flat("LA", (1, 9), (5000, 4900)), "PNG"), "(5000, 4900)"),
    "palette png": (
        lambda: encoded(flat("P", 0, (5700, 5700)), "PNG", transparency=0),
        "(5700, 5700)",
    ),
    "progressive jpeg": (
        lambda: encoded(flat("RGB", 9, (5400, 5500)), progressive=True, subsampling=0),
        "(5400, 5500)",
    ),
    "webp": (
        lambda: encoded(flat("RGB", 0, (3800, 3900)), "WEBP", lossless=True, method=0, quality=0),
        "(3800, 3900)",
    ),
}


@pytest.mark.parametrize("kind", LARGEST)
def test_no_accepted_image_takes_more_than_the_limit(tmp_path, kind):
    make, size = LARGEST[kind]
    added, outcome = added_memory(tmp_path, make())
    assert outcome == size
    assert 100_000_000 < added < 304_000_000


GOOD = [
    jpeg(),
    encoded(noise(), "PNG"),
    encoded(noise(), "WEBP"),
    encoded(flat("P", 3), "PNG", transparency=3),
]


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    st.integers(0, 10_000) | st.none(),
    st.binary(max_size=20),
)
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(data, flips, cut, tail):
    damaged = bytearray(data)
    for place, value in flips:
        damaged[place % len(damaged)] = value
    damaged = bytes(damaged)[: len(damaged) if cut is None else cut] + tail
    reason = None
    try:
        opened = open_image(source(damaged), limits=ImageLimits(max_pixels=1_000_000))
        assert (opened.mode, min(opened.size) >= 16) == ("RGB", True)
    except DataError as error:
        reason = error.reason
    assert reason in {None, *(case[1] for case in REFUSED.values())}
