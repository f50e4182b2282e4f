from dataclasses import replace

import diffusers
import pytest
import torch
from tiny_diffusion import TINY, denoiser_inputs, write_pipeline
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from triptych.modalities.diffusion.architectures import (
    PUBLISHED,
    SD_VAE,
    SDXL_UNET,
    Architecture,
    build_denoiser,
    build_text_encoder,
    build_vae,
    inputs_of,
    read_architecture,
)
from triptych.modalities.diffusion.model import DTYPES, LoraConfig, ModelConfig, adapt
from triptych.modalities.diffusion.planning import (
    Job,
    alternatives,
    days_of,
    disk_of,
    find_method,
    flops_before,
    flops_of,
    memory_of,
)
from triptych.modalities.diffusion.simulation import (
    Setup,
    Watch,
    encode_flops,
    encode_peak,
    encoder_bytes,
    forward_flops,
    simulate,
    text_flops,
)

SDXL = PUBLISHED["sdxl"]
# One level less than SDXL and narrow, with the same kinds of layers.
SMALL = Architecture(
    family="sdxl",
    denoiser=SDXL_UNET
    | {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 32,
    },
    vae=SD_VAE | {"block_out_channels": [8, 8, 8, 16], "norm_num_groups": 4},
    text=SDXL.text[:1],
    resolution=256,
)
LORA = LoraConfig(r=8, alpha=8)


def setup(**options):
    return Setup(
        **{"lora": LORA, "dtype": "float32", "rows": 4, "resolution": 256, "foreach": False} | options
    )


def job(**options):
    made = {
        "setup": setup(),
        "method": find_method("dpo", 4),
        "reference": "adapter_off",
        "offline": True,
        "contexts": 10,
        "images": 20,
        "prompts": 5,
        "epochs": 1.0,
        "gpu": "a100",
        "gpus": 1,
        "utilisation": 0.5,
    }
    return Job(**made | options)


def shapes(inputs):
    return {k: shapes(v) if isinstance(v, dict) else v.shape for k, v in inputs.items()}


def count(module):
    return sum(p.numel() for p in module.parameters())


# -- architectures


@pytest.mark.parametrize(
    ("name", "denoiser", "vae", "text"),
    [
        ("sdxl", 2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
        ("sd15", 859_520_964, 83_653_863, [123_060_480]),
        ("sd3-medium", 2_028_328_000, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
    ],
)
def test_published_models_have_their_published_sizes(name, denoiser, vae, text):
    made = PUBLISHED[name]
    assert count(build_denoiser(made)) == denoiser
    assert count(build_vae(made)) == vae
    assert [count(build_text_encoder(e)) for e in made.text] == text


@pytest.mark.slow
def test_the_real_sdxl_unet_runs_forward_and_backward_on_a_pair():
    """Shapes of the published inputs, on the meta device; FLOPs against the numbers worked out for it."""
    unet = build_denoiser(SDXL, torch.bfloat16).train().requires_grad_(True)
    inputs = inputs_of(SDXL, rows=2, resolution=1024, dtype=torch.bfloat16)
    added = inputs["added_cond_kwargs"]
    assert inputs["sample"].shape == (2, 4, 128, 128)
    assert inputs["encoder_hidden_states"].shape == (2, 77, 2048)
    assert (added["text_embeds"].shape, added["time_ids"].shape) == ((2, 1280), (2, 6))
    with FlopCounterMode(display=False) as flops:
        prediction = unet(**inputs).sample
        assert prediction.shape == (2, 4, 128, 128)
        forward = flops.get_total_flops()
        prediction.float().square().mean().backward()
    assert forward / 2 == pytest.approx(6.76e12, rel=0.01)
    assert flops.get_total_flops() / 2 == pytest.approx(20.2e12, rel=0.01)
    for parameter in unet.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", list(TINY))
def test_a_folder_describes_the_pipeline_that_is_in_it(name, tmp_path):
    pipe = TINY[name]()
    made = read_architecture(write_pipeline(pipe, tmp_path / name))
    denoiser = pipe.transformer if name == "sd3" else pipe.unet
    assert (made.family, made.resolution, made.factor, made.tokens) == (name, 32, 4, 16)
    assert count(build_denoiser(made)) == count(denoiser)
    assert count(build_vae(made)) == count(pipe.vae)
    encoders = [pipe.text_encoder] if name == "sd15" else [pipe.text_encoder, pipe.text_encoder_2]
    assert [count(build_text_encoder(e)) for e in made.text] == [count(e) for e in encoders]
    given, expected = inputs_of(made, rows=2, resolution=32), denoiser_inputs(name)
    assert shapes(given) == shapes(expected)


def test_a_resolution_that_the_vae_cannot_halve_is_refused():
    with pytest.raises(ValueError, match="--resolution=1020 is not a multiple of 8"):
        inputs_of(SDXL, rows=1, resolution=1020)


# -- FLOPs


def test_flops_of_one_image_are_those_worked_out_for_the_published_models():
    assert encode_flops(SDXL, 1024) == pytest.approx(4.88e12, rel=0.01)
    assert text_flops(SDXL) == pytest.approx(0.11e12, rel=0.02)
    assert forward_flops(PUBLISHED["sd15"], 512) == pytest.approx(0.80e12, rel=0.01)
    assert encode_flops(PUBLISHED["sd15"], 512) == pytest.approx(1.12e12, rel=0.01)
    assert forward_flops(PUBLISHED["sd3-medium"], 1024) == pytest.approx(8.90e12, rel=0.01)


@pytest.mark.slow
def test_sdxl_with_lora_is_simulated_to_the_flops_and_weights_worked_out_for_it():
    step = simulate(SDXL, Setup(lora=LORA, dtype="bfloat16", rows=1, resolution=1024))
    assert step.policy == pytest.approx(14.1e12, rel=0.05)
    assert step.weights == 2 * 2_567_463_684 + 4 * step.trained
    assert step.gradients == 4 * step.trained
    assert step.moments == 2 * step.gradients
    # 70 blocks of two attentions, four adapted projections each.
    assert step.trained == sum(8 * (a + b) for a, b in _sdxl_projections())


def _sdxl_projections():
    """(in, out) of every adapted projection: 10 blocks of width 640 and 60 of width 1280, text 2048 wide."""
    for width, blocks in ((640, 10), (1280, 60)):
        for _ in range(blocks):
            yield from [(width, width)] * 6
            yield from [(2048, width)] * 2


def test_a_full_step_has_the_flops_that_pytorch_counts_on_the_model_itself():
    """PyTorch counts attention that keeps its matrix; the fused one computes it again, 5 products for 4."""
    unet = build_denoiser(SMALL).train()
    with FlopCounterMode(display=False) as flops:
        prediction = unet(**inputs_of(SMALL, rows=1, resolution=256)).sample
        forward = flops.get_total_flops()
        prediction.sum().backward()
    counted = flops.get_flop_counts()["Global"]
    attention = counted[torch.ops.aten.bmm]
    assert forward_flops(SMALL, 256) == forward
    step = simulate(SMALL, setup(lora=None))
    # bmm: 2 products forward, 4 backward; fused: 5 backward.
    assert step.policy == pytest.approx(flops.get_total_flops() + attention / 6, rel=1e-9)


def test_checkpointing_costs_most_of_another_forward_pass():
    plain, again = (simulate(SMALL, setup(gradient_checkpointing=c)).policy for c in (False, True))
    assert 0.6 * forward_flops(SMALL, 256) < again - plain < 1.1 * forward_flops(SMALL, 256)


# -- memory


def test_the_watch_counts_each_storage_once_and_forgets_it_when_it_is_freed():
    watch = Watch()
    kept = torch.zeros(100)
    watch.follow([kept, kept[:10]])
    assert watch.now == 400
    with watch:
        a = kept + 1
        b = a.view(10, 10)
        assert watch.now == 800
        del a
        assert watch.now == 800
        c = b @ b
        assert watch.now == 1200
        del b, c
        assert (watch.now, watch.peak) == (400, 1200)
    assert watch.flops == 2 * 10 * 10 * 10


def real_model(given):
    unet = diffusers.UNet2DConditionModel.from_config(SMALL.denoiser)
    config = ModelConfig(
        name_or_path="x",
        lora=given.lora,
        reference="frozen_copy",
        gradient_checkpointing=given.gradient_checkpointing,
    )
    return adapt(unet, config).train()


def real_inputs(given):
    inputs = inputs_of(
        SMALL, rows=given.rows, resolution=given.resolution, dtype=DTYPES[given.dtype], device="cpu"
    )
    for value in (*inputs.values(), *inputs["added_cond_kwargs"].values()):
        if torch.is_tensor(value):
            torch.nn.init.ones_(value)
    return inputs


def measured_peak(given):
    """What PyTorch's profiler saw allocated and freed in a real step, on top of what was there before."""
    unet, inputs = real_model(given), real_inputs(given)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=given.foreach)

    def step():
        if given.autocast:
            with torch.autocast("cpu", torch.bfloat16):
                prediction = unet(**inputs).sample
        else:
            prediction = unet(**inputs).sample
        prediction.float().square().mean().backward()
        del prediction
        optimizer.step()
        optimizer.zero_grad()

    if given.autocast:
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    there = [*unet.parameters(), *unet.buffers(), *moments, *inputs["added_cond_kwargs"].values()]
    there += [v for v in inputs.values() if torch.is_tensor(v)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(t.nbytes for t in there) + peak


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LORA},
        {"lora": LORA, "gradient_checkpointing": True},
        {"lora": None},
        {"lora": None, "gradient_checkpointing": True},
        {"lora": None, "rows": 1, "resolution": 64},
        {"lora": None, "rows": 1, "resolution": 64, "foreach": True},
        {"lora": None, "autocast": True},
    ],
    ids=["lora", "lora_checkpointed", "full", "full_checkpointed", "update", "update_foreach", "autocast"],
)
def test_predicted_memory_is_what_a_real_step_allocates(options):
    given = setup(**options)
    assert simulate(SMALL, given).peak == pytest.approx(measured_peak(given), rel=0.1)


def test_activations_are_what_autograd_keeps_for_the_backward_pass():
    given = setup()
    unet = real_model(given)
    own = {p.untyped_storage().data_ptr() for p in (*unet.parameters(), *unet.buffers())}
    inputs = real_inputs(given)
    own |= {v.untyped_storage().data_ptr() for v in inputs.values() if torch.is_tensor(v)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = unet(**inputs).sample
    assert prediction.requires_grad
    assert simulate(SMALL, given).activations == pytest.approx(sum(saved.values()), rel=0.02)


def test_memory_adds_what_is_there_besides_the_step():
    alone = memory_of(SMALL, job())
    step = simulate(SMALL, setup())
    assert (alone.peak, alone.reference, alone.buckets, alone.encoders) == (step.peak, 0, 0, 0)
    copy = memory_of(SMALL, job(reference="frozen_copy", gpus=2))
    assert copy.peak == step.peak + step.weights + step.gradients
    assert memory_of(SMALL, job(reference="cached")).peak == step.peak


def test_encoders_in_the_loop_take_their_weights_and_for_a_moment_their_pictures():
    step = simulate(SMALL, setup())
    weights = 4 * count(build_vae(SMALL)) + 2 * 123_060_480
    assert encoder_bytes(SMALL, vae=torch.float32, text=torch.bfloat16) == weights
    given = memory_of(SMALL, job(offline=False))
    assert given.encoders == weights
    assert given.peak == step.peak + weights
    # 8 channels of four pictures, before and after the first normalisation at the least.
    pictures = encode_peak(SMALL, rows=4, resolution=256, dtype=torch.float32)
    assert pictures >= 2 * 4 * 8 * 256 * 256 * 4
    tight = setup(gradient_checkpointing=True)
    small = memory_of(SMALL, job(setup=tight, offline=False))
    base = simulate(SMALL, tight)
    assert small.peak - weights == max(base.peak, base.weights + base.moments + pictures)


# -- the run


def test_methods_tell_how_many_images_they_compare_and_what_with():
    assert (find_method("dpo", 4).candidates, find_method("dpo", 4).needs_reference) == (2, True)
    assert (find_method("rank_dpo", 4).candidates, find_method("rank_dpo", 4).needs_reference) == (4, True)
    assert (find_method("mapo", 4).candidates, find_method("mapo", 4).needs_reference) == (2, False)
    assert find_method("kto", 4).candidates == 1
    assert find_method("sft", 4).candidates == 1
    for name in ("grpo", "orpo"):
        with pytest.raises(
            ValueError, match=rf"--method={name} does not train on recorded images; valid: .*dpo"
        ):
            find_method(name, 4)


def test_flops_of_a_context_are_those_of_its_images():
    forward, policy = forward_flops(SMALL, 256), simulate(SMALL, setup()).policy
    live = flops_of(SMALL, job())
    assert (live.policy, live.reference, live.vae, live.text) == (2 * policy, 2 * forward, 0, 0)
    assert live.total == 2 * policy + 2 * forward
    listed = flops_of(SMALL, job(method=find_method("rank_dpo", 4), offline=False))
    assert (listed.policy, listed.reference) == (4 * policy, 4 * forward)
    assert (listed.vae, listed.text) == (4 * encode_flops(SMALL, 256), text_flops(SMALL))
    free = flops_of(SMALL, job(method=find_method("mapo", 4), reference="none"))
    assert (free.policy, free.reference) == (2 * policy, 0)


def test_a_cached_reference_and_encoding_are_paid_before_the_run():
    encoding = 20 * encode_flops(SMALL, 256) + 5 * text_flops(SMALL)
    assert flops_before(SMALL, job()) == encoding
    cached = job(reference="cached", epochs=3.0)
    assert flops_of(SMALL, cached).reference == 0
    assert flops_before(SMALL, cached) == encoding + 3 * 10 * 2 * forward_flops(SMALL, 256)
    assert flops_before(SMALL, job(offline=False)) == 0


def test_a_day_is_the_data_sheets_rate_times_the_share_that_is_reached():
    day = 312e12 * 0.5 * 8 * 86400
    half = setup(autocast=True)
    assert days_of(day, job(gpus=8, setup=half)) == pytest.approx(1)
    assert days_of(day, job(gpus=8, setup=setup(dtype="bfloat16"))) == pytest.approx(1)
    assert days_of(day, job(gpus=8)) == pytest.approx(2)


def test_encoded_data_are_latents_and_one_embedding_a_prompt():
    """SDXL at 1024: 4 x 128 x 128 and 77 x 2048 numbers of two bytes."""
    given = job(setup=Setup(lora=LORA, dtype="bfloat16", rows=2, resolution=1024))
    assert disk_of(SDXL, given) == 20 * 131_072 + 5 * 315_392


def test_alternatives_change_one_thing_each():
    given = job()
    found = alternatives(given, LORA)
    assert list(found) == [
        "every weight instead of LoRA",
        "with gradient checkpointing",
        "reference from the cache",
        "encoding in every step",
    ]
    full = found["every weight instead of LoRA"]
    assert (full.setup, full.reference) == (replace(given.setup, lora=None), "frozen_copy")
    assert found["with gradient checkpointing"].setup == setup(gradient_checkpointing=True)
    assert found["reference from the cache"] == replace(given, reference="cached")
    assert found["encoding in every step"] == replace(given, offline=False)
    back = alternatives(replace(full, reference="cached", offline=False), LORA)
    assert back["with LoRA"].setup == given.setup
    assert back["reference live (frozen_copy)"].reference == "frozen_copy"
    assert back["encoding beforehand"].offline
    assert "reference from the cache" not in alternatives(
        job(method=find_method("mapo", 4), reference="none"), LORA
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h101"}, r"--gpu=h101; valid: a100, .*mi300x"),
        ({"gpus": 0}, "--gpus=0 must be at least 1"),
        ({"contexts": 0}, "--num_pairs=0 must be at least 1"),
        ({"utilisation": 1.5}, r"--utilisation=1\.5 must be in \(0, 1\]"),
        ({"reference": "other"}, "--reference=other; valid: none, adapter_off, frozen_copy, cached"),
        ({"reference": "none"}, "--reference=none: the method needs adapter_off, frozen_copy or cached"),
        ({"method": find_method("mapo", 4)}, "--reference=adapter_off: the method reads none"),
        ({"setup": setup(lora=None)}, "--reference=adapter_off needs LoRA; use frozen_copy or cached"),
    ],
)
def test_a_run_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        job(**options)
