import dataclasses
import errno
import hashlib
import io
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_cases import (
    SilentBar,
    encoders_of,
    many_rows,
    picture,
    png,
    row,
    run,
    tree,
    write_folder,
    write_model,
    write_parquet,
)
from PIL import Image
from tiny_diffusion import TINY, tiny_vae, write_pipeline

from triptych.modalities.diffusion import parts
from triptych.modalities.diffusion.cutting import ahead
from triptych.modalities.diffusion.encoders import EncoderConfig, VaeEncoder, load_encoders
from triptych.modalities.diffusion.encoding import EncodeConfig, size_text
from triptych.modalities.diffusion.shards import EncodedDataset
from triptych.modalities.diffusion.sources import SourceConfig, num_rows
from triptych.training import atomic
from triptych.training.quarantine import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def encoders(model):
    return encoders_of(model)


def scaled_mean(encoders, image):
    """The latent of an RGB image of the right size, computed from the classes alone."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return encoders.vae.vae.encode(pixels).latent_dist.mean[0] * 0.13025


def two_images():
    return png(picture(0)), png(picture(1, height=40, width=80))


def test_a_pair_is_stored_chosen_first_as_the_vae_and_the_text_encoders_give_it(tmp_path, encoders):
    first, second = two_images()
    source = write_parquet(tmp_path / "a.parquet", [row(first, second, label=0.0, caption="red cat", user=3)])
    facts, quarantine = run(encoders, source, tmp_path / "out", buckets="square")
    data = EncodedDataset(tmp_path / "out")
    record = data.record(0)
    assert record["kind"] == "pair"
    assert record["contents"] == [hashlib.sha256(x).hexdigest() for x in (second, first)]
    assert record["group"] == "3"
    assert quarantine.total == 0
    # 40 x 80 to 32 x 64, of which the middle 32 columns are shown: left 16.
    assert record["time_ids"] == [[40, 80, 0, 16, 32, 32], [32, 32, 0, 0, 32, 32]]
    mean, logvar = data.latents(record, [0, 1])
    middle = picture(1, height=40, width=80).resize((32, 32), Image.Resampling.LANCZOS, box=(20, 0, 60, 40))
    torch.testing.assert_close(mean[0], scaled_mean(encoders, middle), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean[1], scaled_mean(encoders, picture(0)), atol=1e-5, rtol=1e-5)
    assert logvar is None
    embeds, pooled = encoders.text(["red cat"])
    torch.testing.assert_close(data.prompt(record).embeds, embeds[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(data.prompt(record).pooled, pooled[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(data.empty_prompt().embeds, encoders.text([""])[0][0], atol=1e-6, rtol=0)
    assert facts == {k: v for k, v in data.facts.items() if k in facts}


def test_facts_say_what_was_encoded_and_by_which_models(tmp_path, encoders):
    rows = many_rows(6)
    rows[0]["user_id"] = None
    rows[3]["jpg_1"] = b"no image"
    source = write_parquet(tmp_path / "a.parquet", rows)
    facts, _ = run(encoders, source, tmp_path / "out", contexts_per_part=4)
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("part-*/*"))
    expected = {
        "family": "sdxl",
        "pipeline": "StableDiffusionXLPipeline",
        "resolution": 32,
        "num_rows": 6,
        "num_read": 6,
        "num_records": 5,
        "num_images": 10,
        "num_grouped": 4,
        "num_cut_prompts": 0,
        "kinds": {"pair": 5},
        "left_out": {"is not a JPEG, PNG or WebP image": 1, "lost an image of its pair": 1},
        "num_bytes": size + (tmp_path / "out" / "empty.safetensors").stat().st_size,
    }
    assert {k: facts[k] for k in expected} == expected
    assert sum(facts["shapes"].values()) == 10
    assert facts["vae"]["class"] == "AutoencoderKL"
    assert facts["vae"]["scaling_factor"] == 0.13025
    assert set(facts["text_encoders"]) == {"text_encoder", "text_encoder_2"}
    hashes = [facts["vae"]["hash"], *(t["hash"] for t in facts["text_encoders"].values())]
    assert len(set(hashes)) == 3
    assert all(len(h) == 64 for h in hashes)


def test_images_of_a_context_share_a_bucket_and_contexts_have_their_own(tmp_path, encoders):
    sizes = [((32, 32), (40, 40)), ((24, 40), (48, 80)), ((64, 16), (16, 64))]
    rows = [
        row(*(png(picture(10 * i + k, height=h, width=w)) for k, (h, w) in enumerate(pair)))
        for i, pair in enumerate(sizes)
    ]
    facts, _ = run(encoders, write_parquet(tmp_path / "a.parquet", rows), tmp_path / "out")
    data = EncodedDataset(tmp_path / "out")
    assert [data.record(i)["shape"] for i in range(3)] == ["4x8x8", "4x6x10", "4x8x8"]
    assert facts["shapes"] == {"4x6x10": 2, "4x8x8": 4}
    # A tall and a wide one meet in the square and show their middles.
    assert data.record(2)["time_ids"] == [[64, 16, 48, 0, 32, 32], [16, 64, 0, 48, 32, 32]]


def counted(encoders, monkeypatch):
    seen = []
    real = VaeEncoder.encode
    monkeypatch.setattr(
        VaeEncoder, "encode", lambda self, x, names: (seen.append(len(x)), real(self, x, names))[1]
    )
    return seen


def test_an_image_that_comes_again_is_encoded_and_stored_once(tmp_path, encoders, monkeypatch):
    rows = many_rows(9, sizes=[(32, 32)])
    seen = counted(encoders, monkeypatch)
    run(encoders, write_parquet(tmp_path / "a.parquet", rows), tmp_path / "out", contexts_per_part=5)
    # Parts of 5 and 4 comparisons of consecutive images: 6 and 5 images of 10 and 8 places.
    assert seen == [4, 2, 4, 1]
    data = EncodedDataset(tmp_path / "out")
    tables = [{k for i in span for k in data.record(i)["rows"]} for span in (range(5), range(5, 9))]
    assert tables == [set(range(6)), set(range(5))]
    for i in range(9):
        record = data.record(i)
        images = [picture(i), picture(i + 1)]
        for got, image in zip(
            data.latents(record, [0, 1])[0], images if i % 2 else images[::-1], strict=True
        ):
            torch.testing.assert_close(got, scaled_mean(encoders, image), atol=1e-5, rtol=1e-5)


def test_posteriors_are_stored_in_the_dtype_asked_for(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", [row(*two_images())])
    options = {"keep": "mean_logvar", "dtype": "bfloat16", "prompt_dtype": "float16", "buckets": "square"}
    run(encoders, source, tmp_path / "out", **options)
    data = EncodedDataset(tmp_path / "out")
    mean, logvar = data.latents(data.record(0), [0])
    assert logvar is not None
    latent = encoders.vae.encode(
        torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None] / 127.5 - 1, "a"
    )[0]
    assert mean.dtype == logvar.dtype == torch.bfloat16
    torch.testing.assert_close(mean[0], latent.mean.bfloat16())
    torch.testing.assert_close(logvar[0], latent.logvar.bfloat16())
    assert data.prompt(data.record(0)).embeds.dtype == torch.float16
    assert data.empty_prompt().embeds.dtype == torch.float16


def test_a_flipped_context_shows_all_its_images_mirrored_and_says_so(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", [row(png(picture(0)), png(picture(1)))])
    run(encoders, source, tmp_path / "out", flip=1.0)
    data = EncodedDataset(tmp_path / "out")
    record = data.record(0)
    assert [c.endswith(":mirrored") for c in record["contents"]] == [True, True]
    for got, seed in zip(data.latents(record, [0, 1])[0], (0, 1), strict=True):
        mirrored = picture(seed).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        torch.testing.assert_close(got, scaled_mean(encoders, mirrored), atol=1e-5, rtol=1e-5)


def test_random_crops_follow_the_context_and_the_seed(tmp_path, encoders):
    wide = [png(picture(i, height=32, width=128)) for i in range(9)]
    rows = [row(a, b) for a, b in pairwise(wide)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    lefts = {}
    for name, options in {"a": {}, "b": {"contexts_per_part": 2}, "c": {"seed": 1}}.items():
        run(encoders, source, tmp_path / name, crop="random", buckets="square", **options)
        data = EncodedDataset(tmp_path / name)
        ids = [data.record(i)["time_ids"] for i in range(8)]
        assert all(one[3] == two[3] for one, two in ids)
        lefts[name] = [one[3] for one, _ in ids]
    assert lefts["a"] == lefts["b"] != lefts["c"]
    assert len(set(lefts["a"])) > 4
    assert all(0 <= left <= 96 for left in lefts["a"])


def broken_cases():
    frames, animation = [picture(i) for i in range(2)], io.BytesIO()
    frames[0].save(animation, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return {
        "is not a JPEG, PNG or WebP image": b"no image",
        "is a broken image": png(picture(7))[:300],
        "is animated": animation.getvalue(),
        "has too many pixels": png(picture(8, height=120, width=120)),
        "is too small": png(picture(9, height=10, width=40)),
        "is much smaller than what it would be enlarged to": png(picture(9, height=15, width=15)),
        "is an empty file": b"",
    }


@pytest.mark.parametrize("reason", list(broken_cases()))
def test_a_pair_with_an_image_that_cannot_be_used_is_left_out_with_the_reason(tmp_path, encoders, reason):
    folder = write_folder(
        tmp_path / "data",
        [
            {"prompt": "dog", "chosen": "a.png", "rejected": "bad.png"},
            {"prompt": "cat", "chosen": "a.png", "rejected": "b.png"},
        ],
        {"a.png": png(picture(0)), "b.png": png(picture(1)), "bad.png": broken_cases()[reason]},
    )
    limits = {"max_pixels": 10_000, "min_side": 16 if reason == "is too small" else 12}
    facts, quarantine = run(encoders, folder, tmp_path / "out", data=limits)
    assert quarantine.counts == {reason: 1, "lost an image of its pair": 1}
    assert facts["left_out"] == quarantine.counts
    data = EncodedDataset(tmp_path / "out")
    assert data.column("prompt").to_pylist() == ["cat"]
    # The prompt of a context that is left out is not embedded.
    assert data.facts["num_prompts"] == 1
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert '"field": "rejected"' in listed
    assert "bad.png" in listed


def test_a_list_keeps_what_is_left_and_its_grades(tmp_path, encoders):
    good = {f"{k}.png": png(picture(k)) for k in range(4)}
    rows = [
        {"prompt": "dog", "images": ["0.png", "bad.png", "1.png", "2.png"], "relevance": [3, 2, 1, 0]},
        {"prompt": "cat", "images": ["0.png", "bad.png", "bad2.png"], "relevance": [2, 1, 0]},
        {"prompt": "red", "image": "bad.png"},
        {"prompt": "red", "image": "3.png"},
    ]
    bad = {"bad.png": b"x", "bad2.png": b"y"}
    folder = write_folder(tmp_path / "data", rows, good | bad)
    facts, quarantine = run(encoders, folder, tmp_path / "out")
    data = EncodedDataset(tmp_path / "out")
    assert facts["kinds"] == {"list": 1, "single": 1}
    assert data.record(0)["relevance"] == [3, 1, 0]
    assert data.record(0)["contents"] == [hashlib.sha256(good[f"{k}.png"]).hexdigest() for k in (0, 1, 2)]
    assert len(data.record(0)["time_ids"]) == 3
    assert data.latents(data.record(0), [0, 1, 2])[0].shape == (3, 4, 8, 8)
    assert quarantine.counts == {"is not a JPEG, PNG or WebP image": 4, "has fewer than two images left": 1}


def test_an_image_that_is_too_small_has_no_say_in_the_bucket(tmp_path, encoders):
    # With the 16 x 64 one the mean aspect would be 1.6; without it the rest is square.
    images = {
        "a.png": png(picture(0)),
        "b.png": png(picture(1)),
        "c.png": png(picture(2, height=16, width=64)),
    }
    rows = [{"prompt": "dog", "images": ["a.png", "b.png", "c.png"], "relevance": [2, 1, 0]}]
    folder = write_folder(tmp_path / "data", rows, images)
    run(encoders, folder, tmp_path / "all", data={"min_side": 12}, max_upscale=2.0)
    assert EncodedDataset(tmp_path / "all").record(0)["shape"] == "4x6x10"
    _, quarantine = run(encoders, folder, tmp_path / "two", data={"min_side": 12}, max_upscale=1.25)
    data = EncodedDataset(tmp_path / "two")
    assert quarantine.counts == {"is much smaller than what it would be enlarged to": 1}
    assert data.record(0)["shape"] == "4x8x8"
    assert data.record(0)["relevance"] == [2, 1]


def test_ties_are_left_out_or_kept_at_one_half(tmp_path, encoders):
    rows = [row(*two_images(), label=0.5), row(*two_images(), caption="dog")]
    source = write_parquet(tmp_path / "a.parquet", rows)
    facts, quarantine = run(encoders, source, tmp_path / "drop")
    assert facts["num_records"] == 1
    assert quarantine.counts == {"is a tie": 1}
    facts, _ = run(encoders, source, tmp_path / "half", data={"ties": "half"})
    assert EncodedDataset(tmp_path / "half").column("strength").to_pylist()[0] == 0.5
    assert facts["num_records"] == 2


@pytest.mark.parametrize("value", [torch.inf, 1e6])  # a million is no number of float16
def test_an_image_that_becomes_inf_in_the_vae_or_in_the_file_is_left_out_by_name(tmp_path, model, value):
    encoders = encoders_of(model)

    def overflow(module, inputs, output):
        white = inputs[0].flatten(1).amin(1) > 0.99
        return torch.where(white[:, None, None, None], value, output)

    encoders.vae.vae.encoder.register_forward_hook(overflow)
    images = {f"{k}.png": png(picture(k)) for k in range(2)}
    images["white.png"] = png(Image.new("RGB", (32, 32), "white"))
    rows = [
        {"prompt": "dog", "chosen": "0.png", "rejected": "white.png"},
        {"prompt": "cat", "images": ["white.png", "0.png", "1.png"], "relevance": [2, 1, 0]},
    ]
    source = write_folder(tmp_path / "data", rows, images)
    _, quarantine = run(encoders, source, tmp_path / "out", dtype="float16")
    assert quarantine.counts == {"became inf or nan in the VAE": 1, "lost an image of its pair": 1}
    assert "white.png" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    data = EncodedDataset(tmp_path / "out")
    assert data.num_records == 1
    assert data.record(0)["relevance"] == [1, 0]
    assert data.latents(data.record(0), [0, 1])[0].isfinite().all()


def test_each_prompt_is_embedded_once_and_long_ones_are_counted(tmp_path, encoders, monkeypatch):
    rows = many_rows(8)
    for r in rows[4:6]:
        r["caption"] = "b" * 30
    seen = []
    real = type(encoders.text).__call__

    def call(self, prompts):
        seen.extend(prompts)
        return real(self, prompts)

    monkeypatch.setattr(type(encoders.text), "__call__", call)
    facts, _ = run(
        encoders, write_parquet(tmp_path / "a.parquet", rows), tmp_path / "out", contexts_per_part=3
    )
    assert sorted(seen) == sorted(["", "dog 0", "dog 1", "dog 2", "dog 3", "b" * 30])
    assert facts["num_cut_prompts"] == 1


def test_a_part_ends_early_when_lists_are_long(tmp_path, encoders):
    images = {f"{k}.png": png(picture(k)) for k in range(6)}
    rows = [{"prompt": f"dog {i}", "images": list(images), "relevance": [*range(6)]} for i in range(5)]
    run(encoders, write_folder(tmp_path / "data", rows, images), tmp_path / "out", contexts_per_part=3)
    data = EncodedDataset(tmp_path / "out")
    # 4 images a context: a part of 3 holds 12 images, two lists of 6.
    assert [data.record(i)["part"] for i in range(5)] == [0, 0, 1, 1, 2]


def test_crops_that_wait_for_a_batch_stay_few_whatever_their_shapes(tmp_path, encoders, monkeypatch):
    waiting = []
    real = parts.Part.add

    def add(self, cut):
        real(self, cut)
        waiting.append(sum(map(len, self._waiting.values())))

    monkeypatch.setattr(parts.Part, "add", add)
    sizes = [(32, 32), (24, 40), (40, 24), (16, 64), (64, 16)]
    rows = [
        row(*(png(picture(10 * i + k, height=sizes[i % 5][0], width=sizes[i % 5][1])) for k in range(2)))
        for i in range(40)
    ]
    source = write_parquet(tmp_path / "a.parquet", rows)
    run(encoders, source, tmp_path / "out", vae_batch_size=1000)
    assert max(waiting) == 80  # a batch that large is never full before the end
    waiting.clear()
    monkeypatch.setattr(parts, "_WAITING_BATCHES", 2)
    run(encoders, source, tmp_path / "small", vae_batch_size=6)
    assert 6 < max(waiting) < 2 * 6
    assert EncodedDataset(tmp_path / "small").num_records == 40


def test_records_are_read_only_a_little_ahead():
    started, lock = [], threading.Lock()

    def items():
        for i in range(20):
            with lock:
                started.append(i)
            yield i

    with ThreadPoolExecutor(4) as pool:
        for i, done in enumerate(ahead(pool, lambda x: (time.sleep(0.001 * (x % 3)), x)[1], items(), 5)):
            assert done == i
            assert len(started) <= i + 5
    assert len(started) == 20


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    rows = many_rows(24)
    rows[2]["label_0"] = rows[2]["label_1"] = 0.5
    rows[9]["jpg_0"] = b"no image"
    rows[14]["label_0"] = None
    return write_parquet(tmp_path_factory.mktemp("long") / "a.parquet", rows)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, encoders, long_source):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(encoders, long_source, folder, contexts_per_part=6)
    return tree(folder)


class Crash(BaseException):
    """As good as a kill: nothing catches it."""


@pytest.mark.parametrize("where", ["fsync-folder", "rename", "fsync-parent"])
@pytest.mark.parametrize("part", [1, 3])
def test_a_run_that_died_goes_on_to_the_very_same_files(
    tmp_path, encoders, long_source, uninterrupted, monkeypatch, where, part
):
    seen = []

    def die(name):
        seen.append(name)
        if seen.count(where) == part and name == where:
            raise Crash

    monkeypatch.setattr(atomic, "fault_point", die)
    with pytest.raises(Crash):
        run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    monkeypatch.undo()
    lines = []
    done = part if where == "fsync-parent" else part - 1
    counted_images = counted(encoders, monkeypatch)
    facts, quarantine = run(encoders, long_source, tmp_path / "out", contexts_per_part=6, lines=lines)
    assert tree(tmp_path / "out") == uninterrupted
    assert any(f"going on after {done} parts" in line for line in lines) == (done > 0)
    assert facts["left_out"] == quarantine.counts
    assert quarantine.total == 4
    # What was done is not done again.
    assert sum(counted_images) < 25 - 6 * done + 4


def test_kill_9_in_the_middle_of_a_run_loses_one_part_at_most(
    tmp_path, model, encoders, long_source, uninterrupted
):
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from triptych.training import atomic
from encode_cases import encoders_of, run
seen = []
def die(name):
    seen.append(name)
    if seen.count("rename") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
atomic.fault_point = die
run(encoders_of({str(model)!r}), {str(long_source)!r}, {str(tmp_path / "out")!r}, contexts_per_part=6)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"part-00000", "part-00001"} <= names
    assert any(name.startswith(".tmp-part-00002") for name in names)
    assert "dataset.json" not in names
    run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    assert tree(tmp_path / "out") == uninterrupted


def test_a_finished_run_started_again_encodes_nothing_and_changes_nothing(
    tmp_path, encoders, long_source, uninterrupted, monkeypatch
):
    run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    seen = counted(encoders, monkeypatch)
    run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    assert seen == []
    assert tree(tmp_path / "out") == uninterrupted


def test_a_run_that_is_told_to_stop_leaves_whole_parts(tmp_path, encoders, long_source, uninterrupted):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 10

    facts, _ = run(encoders, long_source, tmp_path / "out", contexts_per_part=6, stop=stop)
    assert facts is None
    assert {p.name for p in (tmp_path / "out").glob("part-*")} == {"part-00000"}
    run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    assert tree(tmp_path / "out") == uninterrupted


def test_threads_and_batch_sizes_change_nothing_but_rounding(tmp_path, encoders, long_source):
    for name, options in {
        "a": {},
        "b": {"num_workers": 1},
        "c": {"vae_batch_size": 1, "text_batch_size": 2},
    }.items():
        run(encoders, long_source, tmp_path / name, **options)
    one, two, three = (EncodedDataset(tmp_path / name) for name in "abc")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert one.column("id") == three.column("id")
    for i in range(one.num_records):
        for data in (two, three):
            mine, theirs = one.record(i), data.record(i)
            pair = [d.latents(r, [0, 1])[0] for d, r in ((one, mine), (data, theirs))]
            torch.testing.assert_close(pair[0], pair[1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                one.prompt(mine).embeds, data.prompt(theirs).embeds, atol=1e-5, rtol=1e-5
            )


def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_later(
    tmp_path, encoders, long_source, uninterrupted, monkeypatch
):
    seen = []

    def full(name):
        seen.append(name)
        if seen.count("rename") == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "fault_point", full)
    with pytest.raises(ValueError, match="the disk is full after 1 parts; make room"):
        run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    monkeypatch.undo()
    run(encoders, long_source, tmp_path / "out", contexts_per_part=6)
    assert tree(tmp_path / "out") == uninterrupted


def test_other_settings_or_models_are_refused_in_the_same_folder(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", many_rows(3))
    run(encoders, source, tmp_path / "out")
    with pytest.raises(ValueError, match="encoded with another crop"):
        run(encoders, source, tmp_path / "out", flip=0.5)
    other = encoders_of(write_model(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="encoded with another model"):
        run(other, source, tmp_path / "out")
    # These change nothing that is stored.
    run(encoders, source, tmp_path / "out", num_workers=1, vae_batch_size=2)


def test_other_data_is_refused_and_more_data_is_added(tmp_path, encoders):
    rows = many_rows(7)
    source = write_parquet(tmp_path / "a.parquet", rows[:5])
    run(encoders, source, tmp_path / "out", contexts_per_part=3)
    write_parquet(source, rows)
    facts, _ = run(encoders, source, tmp_path / "out", contexts_per_part=3)
    assert facts["num_records"] == 7
    assert EncodedDataset(tmp_path / "out").column("source").to_pylist()[-1] == "a.parquet[6]"
    write_parquet(source, [rows[0], rows[2], rows[1]])
    with pytest.raises(ValueError, match="begun with other data: part 0"):
        run(encoders, source, tmp_path / "out", contexts_per_part=3)
    write_parquet(source, rows[:4])
    with pytest.raises(ValueError, match="begun with other data: part 1"):
        run(encoders, source, tmp_path / "out", contexts_per_part=3)


def test_the_bar_counts_rows_and_starts_where_the_run_goes_on(tmp_path, encoders):
    rows = many_rows(9)
    rows[1]["label_0"] = rows[1]["label_1"] = 0.5
    source = write_parquet(tmp_path / "a.parquet", rows[:6])
    made, lines = [], []

    def bar(total, start):
        made.append(SilentBar(total, start))
        return made[-1]

    run(encoders, source, tmp_path / "out", contexts_per_part=2, bar=bar, lines=lines)
    assert (made[0].total, made[0].start, made[0].steps[-1]) == (6, 0, 6)
    assert made[0].steps == sorted(made[0].steps)
    assert made[0].closed
    assert sum("in all" in line for line in lines) == 1
    write_parquet(source, rows)
    run(encoders, source, tmp_path / "out", contexts_per_part=2, bar=bar)
    assert (made[1].total, made[1].start, made[1].steps[-1]) == (9, 6, 9)


def test_without_a_known_total_there_is_a_line_a_part(tmp_path, encoders):
    images = {f"{k}.png": png(picture(k)) for k in range(2)}
    rows = [{"prompt": f"dog {i}", "chosen": "0.png", "rejected": "1.png"} for i in range(3)]
    folder = write_folder(tmp_path / "data", rows, images)
    lines = []

    def no_bar(total, start):
        raise AssertionError

    run(encoders, folder, tmp_path / "out", contexts_per_part=2, lines=lines, bar=no_bar)
    assert [line for line in lines if "encoded" in line] == [
        "2 records read, 4 images encoded",
        "3 records read, 6 images encoded",
    ]


def test_rows_are_counted_for_parquet_alone(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", many_rows(3))
    write_parquet(tmp_path / "train-1.parquet", many_rows(2))
    write_parquet(tmp_path / "test-0.parquet", many_rows(1))
    assert num_rows(SourceConfig(source=str(tmp_path))) == 5
    assert num_rows(SourceConfig(source=str(tmp_path / "*.parquet"))) == 6
    assert num_rows(SourceConfig(source=str(tmp_path / "train-1.parquet"))) == 2
    assert num_rows(SourceConfig(source=str(tmp_path / "none.jsonl"))) is None
    (tmp_path / "train-2.parquet").write_bytes(b"damaged")
    assert num_rows(SourceConfig(source=str(tmp_path))) is None


def test_only_the_first_records_are_read_when_asked(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", many_rows(9))
    facts, _ = run(encoders, source, tmp_path / "out", data={"max_records": 4})
    assert facts["num_records"] == facts["num_read"] == 4


def test_data_that_gives_nothing_is_an_error_with_the_reasons(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", [row(b"x", b"y"), row(b"x", b"z")])
    with pytest.raises(DataError, match=r"gave nothing to learn from.*not a JPEG"):
        run(encoders, source, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip=1.5 is a probability"),
        ({"max_upscale": 0.5}, "max_upscale=0.5 must be at least 1"),
        ({"contexts_per_part": 0}, "contexts_per_part=0 must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(options, message):
    model, data = EncoderConfig(name_or_path="x"), SourceConfig(source="y")
    with pytest.raises(ValueError, match=message):
        EncodeConfig(model=model, data=data, output_dir="z", **options)


def test_a_float16_vae_and_empty_limits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"vae_dtype=float16.*NaN; use float32 or bfloat16"):
        EncoderConfig(name_or_path="x", vae_dtype="float16")
    with pytest.raises(ValueError, match="max_t5_tokens=0"):
        EncoderConfig(name_or_path="x", max_t5_tokens=0)
    with pytest.raises(ValueError, match=r"data\.max_records=0"):
        SourceConfig(source="y", max_records=0)


def test_a_bucket_step_that_the_vae_cannot_halve_is_refused(tmp_path, encoders):
    source = write_parquet(tmp_path / "a.parquet", many_rows(2))
    with pytest.raises(ValueError, match="bucket_step=2 must be a multiple of the VAE's 4 pixels"):
        run(encoders, source, tmp_path / "out", bucket_step=2)
    with pytest.raises(ValueError, match="resolution=36 must be a multiple of bucket_step=8"):
        run(encoders, source, tmp_path / "out", resolution=36)


def test_another_vae_takes_the_pipelines_place(tmp_path, model):
    other = encoders_of(model).vae.vae
    torch.nn.init.zeros_(other.encoder.conv_in.weight)
    other.save_pretrained(tmp_path / "vae")
    config = EncoderConfig(name_or_path=str(model), vae=str(tmp_path / "vae"))
    found = load_encoders(config, root=tmp_path, device=torch.device("cpu"))
    assert found.facts["vae"]["hash"] != encoders_of(model).facts["vae"]["hash"]
    assert found.vae.vae.encoder.conv_in.weight.abs().sum() == 0
    with pytest.raises(ValueError, match=r"cannot load model\.vae="):
        load_encoders(
            dataclasses.replace(config, vae=str(tmp_path / "none")), root=tmp_path, device=torch.device("cpu")
        )


def test_a_vae_of_other_latents_is_refused(tmp_path, model):
    tiny_vae(16, shift=0.1).save_pretrained(tmp_path / "vae")
    config = EncoderConfig(name_or_path=str(model), vae=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="latents of 16 channels, but the model takes 4"):
        load_encoders(config, root=tmp_path, device=torch.device("cpu"))


def test_every_family_is_loaded_with_its_resolution_and_encodes(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [row(*two_images())])
    for kind, make in TINY.items():
        found = encoders_of(write_pipeline(make(), tmp_path / kind))
        assert found.resolution == 32
        facts, _ = run(found, source, tmp_path / f"{kind}-out")
        data = EncodedDataset(tmp_path / f"{kind}-out")
        assert facts["family"] == kind
        assert data.record(0)["shape"].startswith("16x" if kind == "sd3" else "4x")
        assert (data.prompt(data.record(0)).pooled is None) == (kind == "sd15")


def test_sizes_are_said_for_people():
    assert [size_text(n) for n in (12, 1500, 134e9, 2.5e12)] == ["12 bytes", "1.5 kB", "134 GB", "2.5 TB"]
