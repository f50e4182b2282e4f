import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import make_run, move, no_bar

from triptych.modalities.diffusion import gallery as gallery_module
from triptych.modalities.diffusion.gallery import (
    Gallery,
    Pictures,
    Studio,
    picture_metrics,
    sample_base,
    side_by_side,
    weights_hash,
)
from triptych.modalities.diffusion.measures import brightness, diversity
from triptych.modalities.diffusion.outcome import HeldOutDrift
from triptych.training.plugs import PlugConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gallery")


def sampled(run, config, folder, lines=None):
    return sample_base(
        Studio(run.scene()), folder, report=(lines if lines is not None else []).append, bar=no_bar
    )


def pixels(pictures):
    return np.stack([np.asarray(image, dtype=np.int16) for image in pictures.images])


def count_generations(monkeypatch):
    calls = []
    original = gallery_module.generate

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(gallery_module, "generate", counted)
    return calls


def test_base_pictures_are_kept_and_taken_again_until_something_that_matters_changes(
    folder, tmp_path, monkeypatch
):
    calls = count_generations(monkeypatch)
    run, config = make_run(folder)
    first = sampled(run, config, tmp_path)
    assert first.prompts == run.data.eval_prompts[:3]
    assert first.num_per_prompt == 2
    assert sorted(p.name for p in (tmp_path / "samples" / "base").glob("*.png")) == [
        f"{i:05d}.png" for i in range(6)
    ]
    assert set(first.scores) == set(config.sample.measures)
    # Training has begun when an interrupted run starts again; what is kept is still of the base.
    move(run.policy)
    again = sampled(run, config, tmp_path)
    assert np.array_equal(pixels(again), pixels(first))
    assert again.scores == first.scores
    same = make_run(folder, batch_size=3, measures=["redness"], every=5)
    other = sampled(*same, tmp_path)
    assert (len(calls), list(other.scores)) == (1, ["redness"])
    (tmp_path / "samples" / "base" / "00002.png").unlink()
    assert np.array_equal(pixels(sampled(*make_run(folder), tmp_path)), pixels(first))
    sampled(*make_run(folder, seed=1), tmp_path)
    sampled(*make_run(folder, seed=1, num_steps=3), tmp_path)
    assert len(calls) == 4
    assert not np.array_equal(pixels(sampled(*make_run(folder, seed=1), tmp_path)), pixels(first))


def test_no_pictures_are_made_when_none_are_asked_for(folder, tmp_path):
    run, config = make_run(folder, num_prompts=0)
    assert sampled(run, config, tmp_path) is None
    assert Gallery(Studio(run.scene()), tmp_path, None, no_bar, HeldOutDrift(run)).look(run.policy, 1) == {}
    assert not (tmp_path / "samples").exists()


def test_the_text_encoders_leave_memory_and_the_denoiser_is_the_policys_own(folder, tmp_path):
    run, _ = make_run(folder, "sdxl")
    studio = Studio(run.scene())
    base = sample_base(studio, tmp_path, report=lambda line: None, bar=no_bar)
    pipeline, embedded = studio.open()
    assert pipeline.unet is run.policy.model
    assert pipeline.text_encoder is None
    assert pipeline.text_encoder_2 is None
    assert embedded.prompts == base.prompts
    assert studio.open()[0] is pipeline


def test_a_look_at_the_policy_has_pictures_beside_the_bases_and_numbers_with_intervals(folder, tmp_path):
    run, config = make_run(folder, measures=["brightness"])
    base = sampled(run, config, tmp_path)
    gallery = Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run))
    start = gallery.look(run.policy, 0)
    assert start["drift"] == 0
    assert start["reward/brightness"] == pytest.approx(np.mean(brightness(base.images)), abs=1e-6)
    assert start["diversity"] == pytest.approx(np.mean(diversity(base.groups())))
    assert not (tmp_path / "samples" / "step-000000").exists()
    move(run.policy)
    later = gallery.look(run.policy, 5)
    assert later["drift"] > 0
    assert later["reward/brightness"] != start["reward/brightness"]
    for name in ("reward/brightness", "diversity"):
        assert later[f"{name}_low"] <= later[name] <= later[f"{name}_high"]
    place = tmp_path / "samples" / "step-000005"
    assert len(list(place.glob("0*.png"))) == 6
    sheet = Image.open(io.BytesIO((place / "grid.png").read_bytes()))
    # Six rows of two pictures of 32 pixels, magnified three times, and a caption.
    assert sheet.height > 6 * 96
    assert sheet.width > 2 * 96 + 150


def test_an_untrained_policy_shows_bitwise_the_bases_pictures(folder, tmp_path):
    run, config = make_run(folder, "sdxl")
    base = sampled(run, config, tmp_path)
    values = Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run)).look(run.policy, 1)
    kept = Studio(run.scene()).along_the_way(tmp_path, before=2)
    assert np.array_equal(pixels(kept[1]), pixels(base))
    assert values["drift"] == 0


def test_looks_are_at_the_steps_that_every_divides(folder, tmp_path, monkeypatch):
    calls = count_generations(monkeypatch)
    run, config = make_run(folder, every=2)
    base = sampled(run, config, tmp_path)
    gallery = Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run))
    assert gallery.look(run.policy, 1) == {}
    move(run.policy)
    first = gallery.look(run.policy, 2)
    assert len(calls) == 2
    # A run that was killed and comes to the same step with the same weights takes what is there.
    assert gallery.look(run.policy, 2) == first
    assert len(calls) == 2
    move(run.policy)
    gallery.look(run.policy, 2)
    assert len(calls) == 3
    run, config = make_run(folder, every=0)
    assert Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run)).look(run.policy, 2) == {}


def test_pictures_along_the_way_are_this_runs_own_and_of_earlier_steps(folder, tmp_path):
    run, config = make_run(folder)
    base = sampled(run, config, tmp_path)
    gallery = Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run))
    for step in (1, 2, 3):
        move(run.policy)
        gallery.look(run.policy, step)
    shutil.copytree(tmp_path / "samples" / "step-000001", tmp_path / "samples" / "step-000000")
    about = tmp_path / "samples" / "step-000000" / "samples.json"
    about.write_text(json.dumps(json.loads(about.read_text("utf-8")) | {"settings": "others"}), "utf-8")
    found = Studio(run.scene()).along_the_way(tmp_path, before=3)
    assert list(found) == [1, 2]
    assert found[1].prompts == base.prompts
    assert not np.array_equal(pixels(found[1]), pixels(found[2]))


def test_pictures_are_as_large_as_the_encoded_data_unless_a_size_is_given(folder, tmp_path):
    run, config = make_run(folder, resolution=16)
    assert sampled(run, config, tmp_path).images[0].size == (16, 16)
    run, config = make_run(folder, resolution=16, width=24)
    assert run.scene().sampling().width == 24
    assert run.scene().sampling().height == 16


def test_drift_needs_something_to_drift_from(folder, tmp_path):
    for options, expected in (
        ({"lora": True, "objective": "sft"}, True),  # the base under the adapters
        ({"lora": False}, True),  # the frozen copy of the objective
        ({"lora": False, "objective": "sft"}, False),
    ):
        run, _ = make_run(folder, **options)
        gallery = Gallery(Studio(run.scene()), tmp_path, None, no_bar, HeldOutDrift(run))
        assert (gallery.drift(run.policy) == 0) is expected
        move(run.policy, by=0.05)
        found = gallery.drift(run.policy)
        assert (found is not None and found > 0) is expected
        assert found == gallery.drift(run.policy)


def test_the_hash_of_the_weights_is_of_those_that_are_trained(folder):
    run, _ = make_run(folder)
    before = weights_hash(run.policy)
    assert weights_hash(run.policy) == before
    with torch.no_grad():
        next(p for p in run.policy.parameters() if not p.requires_grad).add_(1)
    assert weights_hash(run.policy) == before
    move(run.policy)
    assert weights_hash(run.policy) != before


def flat(level):
    return Image.new("RGB", (8, 8), (level,) * 3)


def made(*levels, k=2):
    images = tuple(map(flat, levels))
    prompts = tuple(f"prompt {i}" for i in range(len(levels) // k))
    return Pictures(prompts, k, images, {"brightness": brightness(images)})


def test_metrics_are_means_with_intervals_over_prompts():
    found = picture_metrics(made(0, 255, 51, 51))
    # Prompt means 0.5 and 0.2, distances 1 and 0.
    assert found["reward/brightness"] == pytest.approx(0.35)
    assert (found["reward/brightness_low"], found["reward/brightness_high"]) == pytest.approx((0.2, 0.5))
    assert (found["diversity"], found["diversity_low"], found["diversity_high"]) == (0.5, 0, 1)
    assert "diversity" not in picture_metrics(made(0, 255, k=1))


def test_a_sheet_shows_the_first_picture_of_every_prompt_before_the_second_of_any():
    # 12 prompts of 2 pictures; 16 rows are 12 first ones and 4 second ones.
    base = made(*range(0, 240, 10))
    sheet = np.asarray(Image.open(io.BytesIO(side_by_side({"base": base, "aligned": base}))))
    middle = sheet[:, 150 + 10 + 48, 0]
    shown = [level for level in range(0, 240, 10) if (middle == level).sum() >= 96]
    expected = [level for i, level in enumerate(range(0, 240, 10)) if i % 2 == 0 or i < 8]
    assert shown == expected


def test_scorers_judge_the_pictures_beside_the_measures(folder, tmp_path):
    scorer = PlugConfig(name="measure", options={"measure": "brightness"})
    run, config = make_run(folder, measures=["redness"], scorers={"light": scorer})
    pictures = sampled(run, config, tmp_path)
    assert list(pictures.scores) == ["redness", "light"]
    assert pictures.scores["light"] == pytest.approx(brightness(pictures.images))
    with pytest.raises(ValueError, match="redness is the name of a measure, too"):
        make_run(folder, measures=["redness"], scorers={"redness": scorer})
