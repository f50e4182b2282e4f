"""The latent reward model: the UNet's own stages, no up blocks, guidance, and what is saved."""

from typing import Any

import pytest
import torch
from tiny_diffusion import TINY

from triptych.modalities.diffusion.architectures import PUBLISHED, build_denoiser
from triptych.modalities.diffusion.latent_reward import LatentReward, load_latent_reward, save_latent_reward
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.reward_models import load_reward

WIDTHS = {"sd15": None, "sdxl": 24}


def conditions(unet, family, num=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    embeds = torch.randn(num, 7, width, generator=draw)
    if family == "sd15":
        return Conditions(embeds)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    ids = torch.tensor([[32, 32, 0, 0, 32, 32]]).float().expand(num, 6)
    return Conditions(embeds, torch.randn(num, pooled, generator=draw), ids)


def text_width(given):
    return (given.embeds if given.pooled is None else given.pooled).shape[-1]


def made(family, **options):
    unet = TINY[family]().unet
    torch.manual_seed(0)
    return unet, LatentReward.from_unet(unet, text_width(conditions(unet, family)), **options)


def latents(num=3):
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(1))


TIMES = torch.tensor([10.0, 500.0, 900.0])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_its_stages_are_what_the_unet_computes_on_its_way_down(family):
    unet, model = made(family, guidance=1.0)
    given, seen = conditions(unet, family), {}
    hooks = [
        block.register_forward_hook(
            lambda module, args, out, i=i: seen.update({i: out[1][-2 if module.downsamplers else -1]})
        )
        for i, block in enumerate(unet.down_blocks)
    ]
    hooks.append(unet.mid_block.register_forward_hook(lambda module, args, out: seen.update(mid=out)))
    added = None if given.pooled is None else {"text_embeds": given.pooled, "time_ids": given.time_ids}
    with torch.no_grad():
        unet(latents(), TIMES, given.embeds, added_cond_kwargs=added)
        found = model.features(latents(), TIMES, given)
    assert len(found) == len(unet.down_blocks) + 1
    for mine, stage in zip(found, seen.values(), strict=True):
        torch.testing.assert_close(mine, stage.mean((2, 3)), rtol=0, atol=1e-5)
    for hook in hooks:
        hook.remove()
    # It is a copy, and the UNet that it was made of still draws.
    assert len(unet.up_blocks) > 0
    assert not any(name.startswith("unet.up_blocks") for name in model.state_dict())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_guidance_enhances_the_middle_alone(family):
    unet, model = made(family, guidance=3.0)
    given, empty = conditions(unet, family), conditions(unet, family, num=1, seed=9)
    with torch.no_grad():
        score = model.score(latents(), TIMES, given, empty)
        *stages, middle = model.features(latents(), TIMES, given)
        many = Conditions(
            empty.embeds.expand(3, -1, -1),
            None if empty.pooled is None else empty.pooled.expand(3, -1),
            given.time_ids,
        )
        without = model.features(latents(), TIMES, many)[-1]
        image = model.visual_projection(torch.cat([*stages, without + 3 * (middle - without)], -1))
        text = model.text_projection(given.embeds.mean(1) if given.pooled is None else given.pooled)
        expected = torch.nn.functional.cosine_similarity(image, text) / 0.07
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="if and only if above 1"):
        model.score(latents(), TIMES, given)


def test_it_learns_and_comes_back_from_its_folder(tmp_path):
    unet, model = made("sdxl")
    given, empty = conditions(unet, "sdxl"), conditions(unet, "sdxl", num=1, seed=9)
    model.score(latents(), TIMES, given, empty).sum().backward()
    assert all(
        p.grad is not None and float(p.grad.abs().sum()) > 0
        for p in (model.unet.conv_in.weight, model.visual_projection.weight, model.text_projection.weight)
    )
    save_latent_reward(model, tmp_path / "lrm")
    back = load_latent_reward(tmp_path / "lrm")
    with torch.no_grad():
        expected = model.score(latents(), TIMES, given, empty)
        assert torch.equal(back.score(latents(), TIMES, given, empty), expected)
        reward = load_reward("latent", tmp_path / "lrm", device=torch.device("cpu"))
        assert torch.equal(reward(latents(), ["a"] * 3, TIMES, given, empty), expected)
        with pytest.raises(ValueError, match="guide it, too"):
            reward(latents(), ["a"] * 3, TIMES, given, None)
    assert not any(p.requires_grad for p in back.parameters())
    with pytest.raises(ValueError, match=r"no latent reward: it has no latent_reward\.json"):
        load_latent_reward(tmp_path)


def test_a_transformer_has_no_latent_reward():
    with pytest.raises(ValueError, match="made of a UNet, not of SD3Transformer2DModel"):
        LatentReward.from_unet(TINY["sd3"]().transformer, 8)


def test_on_sdxl_it_has_the_released_widths_and_two_fifths_of_the_unet():
    """320 + 640 + 1280 + 1280 features, and no up block."""
    unet: Any = build_denoiser(PUBLISHED["sdxl"])
    whole = sum(p.numel() for p in unet.parameters())
    with torch.device("meta"):
        model = LatentReward(unet, 1280)
    assert model.visual_projection.weight.shape == (1280, 3520)
    own = sum(p.numel() for p in model.unet.parameters())
    assert 0.3 < own / whole < 0.6
