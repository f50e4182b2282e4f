"""The step-aware preference model: the CLIP it starts as, what the time changes, and what is saved."""

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from tiny_diffusion import text_config, tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from triptych.modalities.diffusion.reward_models import load_reward
from triptych.modalities.diffusion.step_scorer import (
    Modulation,
    StepScorer,
    TimeEmbedding,
    clip_pixels,
    load_step_scorer,
    save_step_scorer,
)

TEXTS = ["a red cat", "a dog", "a red cat"]


def tiny_clip(seed=0, layers=2):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    text = text_config(16, projection=24)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return CLIPModel(config).eval()


def scorer(seed=0, **options):
    return StepScorer.from_clip(tiny_clip(seed), tokenizer(), **options)


def pixels(num=3, seed=0):
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def moved(made):
    """After some training of the time's network."""
    with torch.no_grad():
        for m in [*made.layers, made.last]:
            m.linear.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return made


def test_before_training_it_is_its_clip_at_every_time():
    made, clip = scorer(), tiny_clip()
    with torch.no_grad():
        found = clip.get_image_features(pixel_values=pixels()).pooler_output
        expected = torch.nn.functional.normalize(found, dim=-1)
        for time in (0.0, 1.0, 999.0):
            torch.testing.assert_close(
                made.image_features(pixels(), torch.full((3,), time)), expected, rtol=0, atol=1e-6
            )
        words = tokenizer()(TEXTS, padding=True, return_tensors="pt")
        both = clip(pixel_values=pixels(), **words).logits_per_image.diagonal()
        torch.testing.assert_close(
            made.score(pixels(), TEXTS, torch.tensor([3.0, 500.0, 900.0])), both, rtol=0, atol=1e-4
        )


def test_the_time_reaches_every_layer_once_its_network_has_learnt():
    made = scorer()
    early, late = torch.full((3,), 50.0), torch.full((3,), 900.0)
    score = made.score(pixels(), TEXTS, early).sum()
    score.backward()
    # At the start only the last layers of the networks have a gradient: what is before them is times zero.
    assert all(float(m.linear.weight.grad.abs().sum()) > 0 for m in [*made.layers, made.last])
    assert float(made.time.first.weight.grad.abs().sum()) == 0
    for i in range(3):
        only = scorer()
        part = [*only.layers, only.last][i]
        torch.nn.init.normal_(part.linear.weight, std=0.3)
        with torch.no_grad():
            gap = only.score(pixels(), TEXTS, early) - only.score(pixels(), TEXTS, late)
        assert float(gap.abs().min()) > 1e-3


def test_a_batch_is_its_pictures_one_by_one_with_or_without_checkpointing():
    made = moved(scorer())
    times = torch.tensor([10.0, 400.0, 800.0])
    together = made.score(pixels(), TEXTS, times)
    alone = [made.score(pixels()[i : i + 1], [TEXTS[i]], times[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    other = moved(scorer(checkpointing=True))
    again = other.score(pixels(), TEXTS, times)
    torch.testing.assert_close(again, together, rtol=0, atol=0)
    for one in (together, again):
        one.sum().backward()
    torch.testing.assert_close(
        other.layers[0].linear.weight.grad, made.layers[0].linear.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_pixels_are_those_of_clips_own_processor():
    noise = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = torch.nn.functional.interpolate(noise, (40, 60), mode="bilinear")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = VaeImageProcessor().postprocess(pictures, output_type="pil")
    expected = CLIPImageProcessor(**size)(images=images, return_tensors="pt")["pixel_values"]
    # Through 8 bits and PIL's own resizing it is off by a level or two.
    assert float((clip_pixels(pictures, 32) - expected).abs().max()) < 0.06
    assert clip_pixels(pictures, 32).shape == (2, 3, 32, 32)


def test_what_is_saved_comes_back_and_is_what_judges_load(tmp_path):
    made = moved(scorer())
    save_step_scorer(made, tmp_path / "spm")
    back = load_step_scorer(tmp_path / "spm")
    times = torch.tensor([10.0, 400.0, 800.0])
    with torch.no_grad():
        torch.testing.assert_close(
            back.score(pixels(), TEXTS, times), made.score(pixels(), TEXTS, times), rtol=0, atol=1e-5
        )
        reward = load_reward("step", tmp_path / "spm", device=torch.device("cpu"))
        pictures = torch.rand(3, 3, 48, 48) * 2 - 1
        expected = made.score(clip_pixels(pictures, 32), TEXTS, times)
        torch.testing.assert_close(reward(pictures, TEXTS, times, None, None), expected, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in back.parameters())
    assert not [p for p in (tmp_path / "spm").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    with pytest.raises(ValueError, match=r"no step-aware scorer: it has no step_scorer\.json"):
        load_step_scorer(tmp_path)
    other = StepScorer.from_clip(tiny_clip(layers=3), tokenizer())
    save_step_scorer(other, tmp_path / "other")
    (tmp_path / "other" / "modulation.safetensors").write_bytes(
        (tmp_path / "spm" / "modulation.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"does not fit the CLIP beside it: see layers\.2"):
        load_step_scorer(tmp_path / "other")


def test_on_clip_h_the_networks_of_the_time_have_the_published_sizes():
    """6 vectors of 1280 numbers in each of 32 layers, 2 for the pooled output, 256 sinusoids."""
    with torch.device("meta"):
        parts = [TimeEmbedding(1280), *(Modulation(1280, 6) for _ in range(32)), Modulation(1280, 2)]
    assert parts[1].linear.weight.shape == (6 * 1280, 1280)
    assert parts[0].first.weight.shape == (1280, 256)
    total = sum(p.numel() for part in parts for p in part.parameters())
    assert total == 256 * 1280 + 1280 * 1280 + 2 * 1280 + 32 * (6 * 1280 * 1281) + 2 * 1280 * 1281
