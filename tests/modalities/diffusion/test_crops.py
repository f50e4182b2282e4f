from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.modalities.diffusion.crops import (
    Placement,
    buckets,
    choose_bucket,
    cut,
    place,
    to_pixels,
    window,
)
from triptych.training.quarantine import DataError

# (height, width) of Podell et al. 2023, appendix I.
PUBLISHED = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896
1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576
1856x512 1920x512 1984x512 2048x512
"""


def ramp(height, width):
    """An image whose red is its row and whose green is its column."""
    rows = np.broadcast_to(np.arange(height)[:, None], (height, width))
    columns = np.broadcast_to(np.arange(width)[None], (height, width))
    return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))


def test_buckets_at_1024_are_the_published_ones_and_the_mirror_image_that_is_missing_there():
    published = {tuple(map(int, name.split("x"))) for name in PUBLISHED.split()}
    assert len(published) == 40
    assert set(buckets(1024)) == published | {(1344, 704)}


def test_every_bucket_has_its_mirror_image_and_at_most_the_target_area():
    for resolution, step in ((512, 64), (768, 32), (32, 8)):
        found = buckets(resolution, step=step)
        assert {(w, h) for h, w in found} == set(found)
        assert all(0.9 * resolution**2 <= h * w <= resolution**2 for h, w in found)
        assert all(side % step == 0 for size in found for side in size)
        assert (resolution, resolution) in found


def test_square_buckets_are_one():
    assert buckets(512, square=True) == ((512, 512),)


def test_a_resolution_that_the_step_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="resolution=500 must be a multiple of bucket_step=64"):
        buckets(500)


def test_one_image_takes_the_bucket_of_its_own_aspect():
    assert choose_bucket([(1080, 1920)], buckets(1024)) == (768, 1344)
    assert choose_bucket([(3000, 2000)], buckets(1024)) == (1216, 832)
    assert choose_bucket([(640, 640)], buckets(1024)) == (1024, 1024)


def test_images_of_one_context_share_the_bucket_of_their_mean_log_aspect():
    # A portrait and its mirror image meet in the square; two of three landscapes by 2 ** (1/3).
    assert choose_bucket([(512, 2048), (2048, 512)], buckets(1024)) == (1024, 1024)
    # ln 2 / 3 = 0.231: ln(1152 / 896) = 0.251 is nearer than ln(1088 / 896) = 0.194.
    assert choose_bucket([(100, 200), (100, 200), (200, 100)], buckets(1024)) == (896, 1152)


def test_mirrored_sizes_choose_mirrored_buckets():
    for size in ((700, 1300), (911, 1023), (512, 1799)):
        h, w = choose_bucket([size], buckets(1024))
        assert choose_bucket([size[::-1]], buckets(1024)) == (w, h)


def test_time_ids_by_hand():
    # 100 x 200 into 64 x 64: scale 0.64, 64 x 128 after resizing, 64 columns to spare.
    size, bucket = (100, 200), (64, 64)
    quarter = window(size, bucket, Placement((0.5, 0.25)), max_upscale=1)
    assert quarter.scale == Fraction(64, 100)
    assert quarter.time_ids == (100, 200, 0, 16, 64, 64)
    centre = window(size, bucket, Placement(), max_upscale=1)
    assert centre.time_ids == (100, 200, 0, 32, 64, 64)


def test_a_flip_mirrors_left_and_nothing_else():
    placement, mirrored = Placement((0.3, 0.25)), Placement((0.3, 0.25), flipped=True)
    plain = window((100, 200), (64, 64), placement, max_upscale=1)
    flipped = window((100, 200), (64, 64), mirrored, max_upscale=1)
    assert flipped.time_ids == (100, 200, 0, 48, 64, 64)
    assert flipped.left == 128 - 64 - plain.left
    tall = window((200, 100), (64, 64), mirrored, max_upscale=1)
    assert tall.time_ids == (200, 100, 19, 0, 64, 64)  # 0.3 * 64 = 19.2


def test_a_flipped_window_shows_the_same_pixels_the_other_way_round():
    image = ramp(100, 200)
    for at in (0.0, 0.25, 0.5, 1.0):
        plain = window((100, 200), (50, 50), Placement((0.5, at)), max_upscale=1)
        flipped = window((100, 200), (50, 50), Placement((0.5, at), flipped=True), max_upscale=1)
        shown = np.asarray(cut(image, plain))
        assert np.array_equal(np.asarray(cut(image, flipped)), shown[:, ::-1])


def test_images_of_different_sizes_show_the_same_relative_window():
    placement = Placement((0.5, 0.75))
    small = window((64, 128), (64, 64), placement, max_upscale=1)
    large = window((640, 1280), (64, 64), placement, max_upscale=1)
    assert small.time_ids == (64, 128, 0, 48, 64, 64)
    assert large.time_ids == (640, 1280, 0, 48, 64, 64)
    odd = window((100, 190), (64, 64), placement, max_upscale=1)
    assert odd.time_ids == (100, 190, 0, 43, 64, 64)  # 121 columns after resizing, 0.75 * 57 = 42.75


def test_a_crop_without_resizing_is_the_pixels_themselves():
    image = ramp(64, 128)
    part = window((64, 128), (64, 64), Placement((0, 0.5)), max_upscale=1)
    assert np.array_equal(np.asarray(cut(image, part)), np.asarray(image)[:, 32:96])


def test_resizing_keeps_the_aspect_of_what_is_shown():
    # A circle stays a circle: as wide as high after a crop of a landscape to a square.
    height, width = 120, 300
    y, x = np.mgrid[:height, :width]
    disc = ((y - 60) ** 2 + (x - 150) ** 2 < 40**2).astype(np.uint8) * 255
    image = Image.fromarray(np.stack([disc] * 3, -1))
    part = window((height, width), (64, 64), Placement(), max_upscale=1)
    shown = np.asarray(cut(image, part))[..., 0].astype(float) / 255
    assert shown[32].sum() == pytest.approx(shown[:, 32].sum(), abs=0.5)
    assert shown[32].sum() == pytest.approx(80 * 64 / 120, abs=1)


def test_a_crop_between_pixels_is_cut_there_and_not_at_the_nearest_ones():
    # 31 x 50 into 32 x 32: 19 columns to spare, left 10, which is 10 * 31 / 32 = 9.6875 in the file.
    part = window((31, 50), (32, 32), Placement(), max_upscale=2)
    assert part.time_ids == (31, 50, 0, 10, 32, 32)
    columns = np.asarray(cut(ramp(31, 50), part))[16, 4:28, 1].astype(float)
    exact = 9.6875 + (np.arange(4, 28) + 0.5) * 31 / 32 - 0.5
    assert np.abs(columns - exact).max() <= 0.5  # whole numbers


def test_shrinking_is_antialiased():
    # Stripes of one pixel become even grey, not a pattern.
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    part = window((256, 256), (32, 32), Placement(), max_upscale=1)
    shown = np.asarray(cut(Image.fromarray(stripes), part)).astype(int)
    assert np.abs(shown[4:-4, 4:-4] - 127).max() <= 3


def test_every_size_can_be_cut_for_every_bucket():
    generator = np.random.default_rng(0)
    for _ in range(60):
        height, width = (int(n) for n in generator.integers(16, 300, 2))
        for bucket in buckets(32, step=8):
            for flipped in (False, True):
                at = tuple(generator.random(2).tolist())
                part = window((height, width), bucket, Placement(at, flipped), max_upscale=10)
                assert 0 <= part.top <= height * part.scale - bucket[0]
                assert 0 <= part.left <= width * part.scale - bucket[1]
        assert cut(ramp(height, width), part).size == bucket[::-1]


def test_an_image_much_smaller_than_its_bucket_is_refused_with_the_reason():
    assert window((32, 32), (64, 64), Placement(), max_upscale=2).time_ids == (32, 32, 0, 0, 64, 64)
    with pytest.raises(DataError, match=r"much smaller.*31x40.*64x64, beyond max_upscale=2"):
        window((31, 40), (64, 64), Placement(), max_upscale=2)


def test_a_placement_is_a_function_of_seed_and_context():
    first = place(0, "a", crop="random", flip=0.5)
    assert first == place(0, "a", crop="random", flip=0.5)
    assert first != place(1, "a", crop="random", flip=0.5)
    assert first.position != place(0, "b", crop="random", flip=0.5).position


def test_centre_crops_and_flips_follow_their_settings():
    drawn = [place(0, str(i), crop="center", flip=0.25) for i in range(400)]
    assert {p.position for p in drawn} == {(0.5, 0.5)}
    assert sum(p.flipped for p in drawn) / 400 == pytest.approx(0.25, abs=0.07)
    assert not any(place(0, str(i), crop="random", flip=0.0).flipped for i in range(100))
    assert all(place(0, str(i), crop="random", flip=1.0).flipped for i in range(100))
    # The flip does not depend on how crops are drawn.
    assert [place(0, str(i), crop="random", flip=0.25).flipped for i in range(400)] == [
        p.flipped for p in drawn
    ]


def test_random_positions_cover_the_range_evenly():
    at = np.array([place(3, str(i), crop="random", flip=0).position for i in range(2000)])
    assert at.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert at.std(0) == pytest.approx([12**-0.5] * 2, abs=0.02)


def test_pixels_run_from_minus_one_to_one_in_channel_order():
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    values = to_pixels(image)
    assert values.shape == (3, 1, 1)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
