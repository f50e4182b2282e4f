import numpy as np
import peft
import pytest
import torch
from tiny_diffusion import LATENT, PIXELS, TINY, tiny_sd3, tiny_sd15, tiny_sdxl

from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.rollout import (
    SampleConfig,
    Sampling,
    _generator,
    decode,
    denoiser_of,
    embed,
    generate,
    generate_latents,
)
from triptych.training.references import AdapterOff

PROMPTS = ["red cat", "blue dog", "a car"]
SHORT = Sampling(num_steps=3, guidance=3.0, batch_size=4)


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize("family", list(TINY))
def test_pictures_are_bitwise_those_of_a_plain_call_of_the_pipeline(family):
    pipeline = TINY[family]()
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        prompt=PROMPTS,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[_generator(0, i, 0) for i in range(3)],
    ).images
    found = generate(pipeline, PROMPTS, SHORT)
    assert found[0].size == (PIXELS, PIXELS)
    assert np.array_equal(pixels(found), pixels(plain))


@pytest.mark.parametrize("family", list(TINY))
def test_the_text_encoders_are_not_needed_once_the_prompts_are_embedded(family):
    pipeline = TINY[family]()
    expected = generate(pipeline, PROMPTS, SHORT)
    embedded = embed(pipeline, PROMPTS, batch_size=2)
    assert len(embedded) == 3
    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    pipeline.register_modules(**dict.fromkeys(names))
    assert np.abs(pixels(generate(pipeline, embedded, SHORT)) - pixels(expected)).max() <= 1


def test_noise_belongs_to_seed_prompt_and_repeat_alone():
    pipeline = tiny_sd15()
    once = generate_latents(pipeline, PROMPTS, Sampling(num_steps=2, guidance=1.0, batch_size=1))
    cuts = [Sampling(num_steps=2, guidance=1.0, batch_size=n, num_per_prompt=2) for n in (1, 4, 6)]
    found = [generate_latents(pipeline, PROMPTS, cut) for cut in cuts]
    assert found[0].shape == (6, 4, LATENT, LATENT)
    assert torch.equal(found[0][::2], once)
    # Kernels may sum in another order in another batch; no noise differs.
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-4)
    assert not torch.allclose(found[0][0], found[0][1], atol=0.1)
    part = generate_latents(pipeline, PROMPTS[1:], cuts[0], first=1)
    assert torch.equal(part, found[0][2:])
    other = generate_latents(pipeline, PROMPTS, Sampling(num_steps=2, guidance=1.0, batch_size=1, seed=1))
    assert not torch.allclose(once, other, atol=0.1)


def test_latents_are_decoded_to_the_same_pictures():
    pipeline = tiny_sdxl()
    latents = generate_latents(pipeline, PROMPTS, SHORT)
    assert (latents.dtype, latents.shape) == (torch.float32, (3, 4, LATENT, LATENT))
    assert np.array_equal(pixels(decode(pipeline, latents)), pixels(generate(pipeline, PROMPTS, SHORT)))


def test_decoding_goes_through_few_pixels_at_a_time(monkeypatch):
    pipeline = tiny_sd3()
    latents = torch.randn(5, 16, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    whole = pixels(decode(pipeline, latents))
    sizes = []
    original = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: sizes.append(len(z)) or original(z))
    monkeypatch.setattr("triptych.modalities.diffusion.rollout._PIXELS_AT_ONCE", 2 * PIXELS**2)
    assert np.abs(pixels(decode(pipeline, latents)) - whole).max() <= 1
    assert sizes == [2, 2, 1]


def test_a_vae_of_latent_statistics_is_undone_as_the_pipeline_does():
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(["red cat"], num_inference_steps=2, generator=[_generator(0, 0, 0)]).images
    assert np.array_equal(pixels(generate(pipeline, ["red cat"], Sampling(num_steps=2))), pixels(plain))


def test_a_float16_vae_decodes_in_float32_and_stays_float16():
    pipeline = tiny_sdxl()
    latents = torch.randn(1, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    pipeline.vae.half()
    exact = pipeline.vae.float().decode(latents / pipeline.vae.config.scaling_factor).sample
    pipeline.vae.half()
    expected = pixels(pipeline.image_processor.postprocess(exact.detach(), output_type="pil"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(pixels(decode(pipeline, latents)), expected)
    assert pipeline.vae.dtype == torch.float16


def test_pictures_that_are_not_finite_say_where_it_happened():
    pipeline = tiny_sd15()
    with pytest.raises(ValueError, match="not finite: the latents"):
        decode(pipeline, torch.full((1, 4, LATENT, LATENT), torch.nan))
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"decoding in torch\.float32"):
        decode(pipeline, torch.zeros(1, 4, LATENT, LATENT))


@pytest.mark.parametrize("family", list(TINY))
def test_an_untrained_adapter_changes_no_bit_and_a_trained_one_is_off_in_the_reference(family):
    pipeline = TINY[family]()
    base = generate_latents(pipeline, PROMPTS[:2], SHORT)
    model = denoiser_of(pipeline)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.5, target_modules=["to_q", "to_v"]))
    policy = Denoiser(model).train()
    assert torch.equal(generate_latents(pipeline, PROMPTS[:2], SHORT), base)
    learnt = {name for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in learnt:
                parameter.add_(0.5)
    changed = generate_latents(pipeline, PROMPTS[:2], SHORT)
    assert not torch.allclose(changed, base, atol=1e-2)
    assert torch.equal(generate_latents(pipeline, PROMPTS[:2], SHORT), changed), "dropout is off"
    with AdapterOff().active(policy):
        assert torch.equal(generate_latents(pipeline, PROMPTS[:2], SHORT), base)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == learnt
    assert all(module.training for module in policy.modules())


def test_the_pipeline_is_left_as_it_was():
    pipeline = tiny_sd15()
    pipeline.set_progress_bar_config(leave=False)
    scheduler, steps = pipeline.scheduler, pipeline.scheduler.timesteps.clone()
    pipeline.unet.train()
    before = torch.random.get_rng_state()
    generate(pipeline, PROMPTS[:1], SHORT)
    assert pipeline.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, steps)
    assert pipeline._progress_bar_config == {"leave": False}
    assert pipeline.unet.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sdxls_own_scheduler_samples_without_a_warning_and_ddim_can_replace_it():
    euler, ddim = tiny_sdxl(euler=True), tiny_sdxl()
    own = generate_latents(euler, PROMPTS[:1], Sampling(num_steps=50, guidance=1.0))
    replaced = generate_latents(euler, PROMPTS[:1], Sampling(num_steps=50, guidance=1.0, scheduler="ddim"))
    exact = generate_latents(ddim, PROMPTS[:1], Sampling(num_steps=50, guidance=1.0))
    # The replacement does not clip, and takes the betas and the spacing of the scheduler it replaces.
    assert torch.equal(replaced, exact)
    assert replaced.abs().max() > 1
    assert not torch.equal(own, replaced)
    with pytest.raises(ValueError, match="a flow model needs its own"):
        generate(tiny_sd3(), PROMPTS[:1], Sampling(num_steps=2, scheduler="ddim"))


def test_without_guidance_the_empty_prompt_costs_nothing():
    pipeline = tiny_sd15()
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    generate_latents(pipeline, PROMPTS, Sampling(num_steps=2, guidance=1.0, batch_size=2))
    generate_latents(pipeline, PROMPTS, Sampling(num_steps=2, guidance=2.0, batch_size=3))
    assert rows == [2, 2, 1, 1, 6, 6]


def test_progress_counts_pictures_and_size_can_be_chosen():
    done = []
    sampling = Sampling(num_steps=1, batch_size=4, num_per_prompt=2, height=16, width=48)
    images = generate(tiny_sd15(), PROMPTS, sampling, progress=done.append)
    assert done == [4, 6]
    assert {image.size for image in images} == {(48, 16)}


def test_settings_that_cannot_mean_anything_are_refused():
    for made in (Sampling, SampleConfig):
        with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
            made(num_steps=0)
        with pytest.raises(ValueError, match="height=100 must be a positive multiple of 8"):
            made(height=100)
        with pytest.raises(ValueError, match="guidance=-1"):
            made(guidance=-1)
        with pytest.raises(ValueError, match="scheduler=euler is not one of"):
            made(scheduler="euler")
    with pytest.raises(ValueError, match=r"sample\.num_prompts=-1"):
        SampleConfig(num_prompts=-1)
    with pytest.raises(ValueError, match="measure 'rednes' is not one of"):
        SampleConfig(measures=["rednes"])
    config = SampleConfig(num_steps=7, seed=3, width=64)
    assert config.sampling() == Sampling(num_steps=7, num_per_prompt=2, seed=3, width=64)
