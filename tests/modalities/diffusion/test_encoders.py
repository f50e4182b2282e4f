import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import tiny_sd3, tiny_sd15, tiny_sdxl, tiny_vae
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from triptych.modalities.diffusion.crops import to_pixels
from triptych.modalities.diffusion.encoders import Latent, TextEncoder, VaeEncoder
from triptych.training.quarantine import DataError

PROMPTS = ["red cat", "", "a dog, a cat and 12 red balls on a very long way home", "dog"]


def parts_of(pipe):
    return {k: v for k, v in pipe.components.items() if k.startswith(("tokenizer", "text_encoder"))}


def pictures(n=3, size=32):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]
    return torch.stack([to_pixels(i) for i in images])


def tiny_t5(width=48):
    words = [
        (w, -float(i)) for i, w in enumerate(["\u2581red", "\u2581cat", "\u2581dog", "\u2581a", "\u2581"])
    ]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words], extra_ids=0)
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    return tokenizer, T5EncoderModel(config).eval()


def test_sdxl_embeddings_are_the_pipelines_own():
    pipe = tiny_sdxl()
    mine = TextEncoder(family="sdxl", parts=parts_of(pipe))
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    got, got_pooled = mine(PROMPTS)
    assert torch.equal(got, embeds)
    assert got_pooled is not None
    assert torch.equal(got_pooled, pooled)


def test_sd15_embeddings_are_the_pipelines_own():
    pipe = tiny_sd15()
    mine = TextEncoder(family="sd15", parts=parts_of(pipe))
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    got, pooled = mine(PROMPTS)
    assert torch.equal(got, embeds)
    assert pooled is None


@pytest.mark.parametrize("with_t5", [False, True])
def test_sd3_embeddings_are_the_pipelines_own(with_t5):
    pipe = tiny_sd3()
    if with_t5:
        tokenizer, encoder = tiny_t5()
        pipe.register_modules(tokenizer_3=tokenizer, text_encoder_3=encoder)
    joint = pipe.transformer.config.joint_attention_dim
    mine = TextEncoder(family="sd3", parts=parts_of(pipe), joint=joint)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False
        )
    got, got_pooled = mine(PROMPTS)
    assert got.shape == (4, 16 + 256, 48)
    assert torch.equal(got, embeds)
    assert got_pooled is not None
    assert torch.equal(got_pooled, pooled)
    assert (got[:, 16:].abs().sum() > 0) == with_t5


def test_the_empty_prompt_is_the_pipelines_negative_one():
    pipe = tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    with torch.no_grad():
        _, empty, _, pooled = pipe.encode_prompt(["dog"], device="cpu")
    got = TextEncoder(family="sdxl", parts=parts_of(pipe)).encode([""], batch_size=4)[""]
    torch.testing.assert_close(got.embeds, empty[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.pooled, pooled[0], atol=1e-6, rtol=0)


def test_each_different_prompt_is_encoded_once_and_batches_do_not_change_it():
    pipe = tiny_sdxl()
    mine = TextEncoder(family="sdxl", parts=parts_of(pipe))
    seen = []
    pipe.text_encoder_2.register_forward_pre_hook(lambda _, ids: seen.append(len(ids[0])))
    found = mine.encode([*PROMPTS, *PROMPTS[::-1], "cat"], batch_size=2)
    assert list(found) == [*PROMPTS, "cat"]
    assert seen == [2, 2, 1]
    whole, pooled = mine(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[prompt].embeds, whole[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(found[prompt].pooled, pooled[i], atol=1e-6, rtol=0)


def test_autocast_around_does_not_change_embeddings():
    mine = TextEncoder(family="sdxl", parts=parts_of(tiny_sdxl()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mine(PROMPTS)[0]
    assert torch.equal(inside, mine(PROMPTS)[0])


def test_prompts_longer_than_clip_reads_are_counted():
    mine = TextEncoder(family="sdxl", parts=parts_of(tiny_sdxl()))
    # 16 tokens with start and end: 14 letters fit, 15 do not.
    assert mine.num_cut(["b" * 14, "b" * 15, "", "b" * 40]) == 2
    assert mine.num_cut([]) == 0


def test_embeddings_that_are_not_finite_stop_the_run_and_name_the_setting():
    pipe = tiny_sd15()
    torch.nn.init.constant_(pipe.text_encoder.final_layer_norm.weight, math.inf)
    with pytest.raises(ValueError, match=r"inf or nan for the prompt 'dog'.*text_dtype"):
        TextEncoder(family="sd15", parts=parts_of(pipe)).encode(["dog"], batch_size=1)


def test_an_sd3_encoder_without_the_width_is_refused():
    with pytest.raises(ValueError, match="joint"):
        TextEncoder(family="sd3", parts=parts_of(tiny_sd3()))


def test_latents_are_the_posterior_scaled_as_the_pipelines_scale_it():
    pipe = tiny_sdxl()
    pixels = pictures()
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    for i, latent in enumerate(VaeEncoder(pipe.vae).encode(pixels, "abc")):
        assert isinstance(latent, Latent)
        assert latent.mean.shape == (4, 8, 8)
        torch.testing.assert_close(latent.mean, posterior.mean[i] * 0.13025)
        torch.testing.assert_close(latent.logvar, posterior.logvar[i] + 2 * math.log(0.13025))


def test_a_sample_of_the_scaled_posterior_is_the_scaled_sample():
    vae = tiny_vae(16, shift=0.0609, scaling=1.5305).eval()
    pixels = pictures(1)
    latent = VaeEncoder(vae).encode(pixels, ["a"])[0]
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        raw = posterior.sample(torch.Generator().manual_seed(3))
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(3))[0]
    assert isinstance(latent, Latent)
    mine = latent.mean + (latent.logvar / 2).exp() * noise
    torch.testing.assert_close(mine, ((raw - 0.0609) * 1.5305)[0], atol=1e-5, rtol=1e-5)


def test_channel_wise_means_and_stds_of_a_vae_are_applied():
    vae = tiny_vae().eval()
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    plain = VaeEncoder(tiny_vae_like(vae)).encode(pictures(1), ["a"])[0]
    found = VaeEncoder(vae).encode(pictures(1), ["a"])[0]
    assert isinstance(plain, Latent)
    assert isinstance(found, Latent)
    raw = plain.mean / 0.13025
    for z, (mean, std) in enumerate([(1, 1), (2, 2), (3, 4), (4, 8)]):
        torch.testing.assert_close(found.mean[z], (raw[z] - mean) * 0.13025 / std)
        torch.testing.assert_close(found.logvar[z], plain.logvar[z] - 2 * math.log(std))


def tiny_vae_like(vae):
    other = tiny_vae().eval()
    other.load_state_dict(vae.state_dict())
    return other


def test_decoding_is_the_pipelines_and_batches_do_not_change_it():
    pipe = tiny_sdxl()
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mine = VaeEncoder(pipe.vae)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.13025).sample
    theirs = pipe.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(mine.decode(latents, batch_size=2, dtype=torch.float32), theirs)
    shown = mine.decode(latents, batch_size=2)
    assert shown.dtype == torch.uint8
    as_pil = pipe.image_processor.postprocess(decoded, output_type="pil")
    difference = shown[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(as_pil[0])).int()
    assert difference.abs().max() <= 1


def test_decoding_undoes_the_scaling_of_encoding():
    vae = tiny_vae(16, shift=0.0609, scaling=1.5305).eval()
    raw = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        direct = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    mine = VaeEncoder(vae).decode((raw - 0.0609) * 1.5305, batch_size=2, dtype=torch.float32)
    torch.testing.assert_close(mine, direct, atol=1e-5, rtol=1e-5)


def test_a_vae_in_float16_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="float16 overflows"):
        VaeEncoder(tiny_vae().half())


def test_autocast_around_does_not_reach_the_vae():
    mine = VaeEncoder(tiny_vae().eval())
    plain = mine.encode(pictures(1), ["a"])[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = mine.decode(latents, batch_size=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mine.encode(pictures(1), ["a"])[0]
        shown_inside = mine.decode(latents, batch_size=1, dtype=torch.float32)
    assert isinstance(plain, Latent)
    assert isinstance(inside, Latent)
    assert torch.equal(inside.mean, plain.mean)
    assert torch.equal(shown_inside, shown)


def test_a_bfloat16_vae_scales_in_float32():
    vae = tiny_vae(16, shift=0.0609, scaling=1.5305).eval().to(torch.bfloat16)
    latent = VaeEncoder(vae).encode(pictures(1), ["a"])[0]
    with torch.no_grad():
        raw = vae.encode(pictures(1).bfloat16()).latent_dist.mean[0]
    assert isinstance(latent, Latent)
    assert latent.mean.dtype == torch.float32
    assert torch.equal(latent.mean, (raw.float() - 0.0609) * 1.5305)


def test_an_image_that_becomes_nan_is_named_and_the_others_are_kept():
    pixels = pictures()
    pixels[1, 0, 0, 0] = math.nan
    found = VaeEncoder(tiny_vae().eval()).encode(pixels, ["a.png", "b.png", "c.png"])
    assert [type(x) for x in found] == [Latent, DataError, Latent]
    assert isinstance(found[1], DataError)
    assert found[1].source == "b.png"
    assert "b.png: became inf or nan in the VAE" in str(found[1])
