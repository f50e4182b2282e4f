"""Images opened safely: three formats, checked before a pixel is decoded, always upright RGB on white.

Codecs are called directly and by content, since `Image.open` asks every plugin and warns where this refuses.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from triptych.modalities.diffusion.records import MAX_IMAGE_BYTES, ImageSource

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 4}
_STRIP = 256
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"BM", "a BMP"),
    (b"%PDF", "a PDF"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What an image may be.

    max_bytes: encoded. max_pixels: width times height. max_memory: bytes that decoding and converting may
    take at once, by format (4 a pixel for plain RGB, 8 with transparency or rotation, 10 for a progressive
    JPEG, 17 to 20 for WebP). min_side: pixels. max_aspect: long side over short side.
    """

    max_bytes: int = MAX_IMAGE_BYTES
    max_pixels: int = 40_000_000
    max_memory: int = 300_000_000
    min_side: int = 16
    max_aspect: float = 8.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def open_image(source: ImageSource, *, limits: ImageLimits | None = None) -> Image.Image:
    """The decoded image: RGB, turned as its EXIF says, transparency on white, no metadata.

    CMYK is converted without its colour profile; of 16 bits the upper 8 stay. DataError with a constant
    reason for what is no single, whole JPEG, PNG or WebP image within the limits.
    """
    limits = ImageLimits() if limits is None else limits
    data = source.read(limits.max_bytes)
    image = _open(source, data)
    _check(source, image, data, limits)
    # Another library may have allowed images with a missing end.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        elif image.format == "WEBP":
            image = image.copy()  # without the decoder, which holds two more canvases
        return _rgb(image)
    except Exception as error:  # whatever a decoder raises on hostile bytes is the image's fault
        raise source.error("is a broken image", _remedy(error)) from None


def _open(source: ImageSource, data: bytes) -> ImageFile.ImageFile:
    stream = io.BytesIO(data)
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return JpegImageFile(stream)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return PngImageFile(stream)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return WebPImageFile(stream)
    except Image.DecompressionBombError as error:
        raise source.error("has too many pixels", _remedy(error)) from None
    except Exception as error:  # see open_image
        raise source.error("is a broken image", _remedy(error)) from None
    raise source.error(
        "is not a JPEG, PNG or WebP image", f"{_looks_like(data)}: convert it or remove the record"
    )


def _looks_like(data: bytes) -> str:
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "it looks like an SVG"
    if start.startswith(b"<"):
        return "it looks like a web page"
    known = next((what for magic, what in _OTHERS if data.startswith(magic)), None)
    return f"it looks like {known}" if known else "its first bytes are of no known image"


def _check(source: ImageSource, image: ImageFile.ImageFile, data: bytes, limits: ImageLimits) -> None:
    """Refuse by what the header says, before any pixel is decoded."""
    width, height = image.size
    size = f"it is {width}x{height}"
    if width * height > limits.max_pixels:
        raise source.error("has too many pixels", f"{size}: scale it below {limits.max_pixels:,} pixels")
    if getattr(image, "is_animated", False):
        raise source.error("is animated", "save one frame of it")
    if min(width, height) < limits.min_side:
        raise source.error("is too small", f"{size}: each side needs {limits.min_side} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise source.error("is too long and thin", f"{size}: crop it to at most {limits.max_aspect:g} to 1")
    needed = width * height * _bytes_a_pixel(image, data)
    if needed > limits.max_memory:
        remedy = (
            f"{size} and needs {needed:,} bytes: scale it, save it as plain JPEG or PNG, or raise max_memory"
        )
        raise source.error("takes too much memory to decode", remedy)


def _bytes_a_pixel(image: ImageFile.ImageFile, data: bytes) -> int:
    """The most that decoding or converting holds at once, as measured; Pillow keeps RGB in four bytes."""
    own = _PIXEL_BYTES.get(image.mode, 4)
    if image.format == "WEBP":
        # Two canvases, the frame as bytes and the image; lossless coding holds the frame once more.
        return 17 if data[12:16] == b"VP8 " else 20
    coefficients = 2 * len(image.getbands()) if image.info.get("progressive") else 0
    transparent = 4 if image.has_transparency_data and image.mode != "RGBA" else 0
    turned = own if _orientation(image) in _TURNS else 0
    converted = 0 if image.mode == "RGB" and not transparent else 4
    return max(own + coefficients, own + turned, own + transparent + converted)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that cannot be parsed turns nothing
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = _on_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    image = image if image.mode == "RGB" else image.convert("RGB")
    image.info = {}
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, transparent on white; Pillow's own conversion cuts at 255."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image over white, in place and strip by strip, so that no second copy of it is held."""
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        strip = Image.new("RGBA", (image.width, box[3] - top), "white")
        strip.alpha_composite(image.crop(box))
        image.paste(strip, box)
    return image


def _remedy(error: Exception) -> str:
    return f"make it again or remove the record ({' '.join(str(error).split())[:160]})"
