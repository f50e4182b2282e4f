import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import LATENT, TINY, denoiser_inputs, tiny_sd15, tiny_sdxl, write_pipeline

from triptych.modalities.diffusion import model as subject
from triptych.modalities.diffusion.model import (
    LoraConfig,
    ModelConfig,
    adapt,
    family,
    load_denoiser,
    load_pipeline,
    load_scheduler,
    load_text_encoders,
    load_vae,
    locate,
    pipeline_class,
)
from triptych.modalities.diffusion.schedule import schedule_of

FAMILIES = list(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    made = {name: write_pipeline(make(), root / name) for name, make in TINY.items()}
    return made | {"euler": write_pipeline(tiny_sdxl(euler=True), root / "euler")}


@pytest.fixture
def copied(folders, tmp_path):
    return shutil.copytree(folders["sdxl"], tmp_path / "model")


def configuration(folder, **options):
    return ModelConfig(name_or_path=str(folder), **options)


def whole(folder, **options):
    return configuration(folder, lora=None, reference="frozen_copy", **options)


def edit(path, **changes):
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def predict(denoiser, name):
    return denoiser(**denoiser_inputs(name)).sample


# -- what a configuration and a folder may say


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, r"model\.reference=adapter_off needs model\.lora"),
        (
            {"lora": None, "reference": "frozen_copy", "dtype": "float16"},
            r"model\.dtype=float16 has too few bits",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(name_or_path="x", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"model\.lora\.r=0 must be at least 1"),
        ({"alpha": 0.0}, r"model\.lora\.alpha=0\.0 must be positive"),
        ({"dropout": 1.0}, r"model\.lora\.dropout=1\.0 must be in \[0, 1\)"),
        ({"targets": []}, r"model\.lora\.targets=\[\] names no module"),
    ],
)
def test_lora_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_name_is_a_hub_name_a_folder_or_an_asset(folders, tmp_path):
    assert locate(ModelConfig(name_or_path="someone/sdxl"), root=tmp_path) == "someone/sdxl"
    assert locate(configuration(folders["sdxl"]), root=tmp_path) == str(folders["sdxl"])
    shutil.copytree(folders["sdxl"], tmp_path / "assets" / "small")
    assert locate(ModelConfig(name_or_path="asset:small"), root=tmp_path) == str(
        tmp_path / "assets" / "small"
    )
    for name in ("asset:other", "asset:../assets/small", "asset:..", "asset:"):
        with pytest.raises(ValueError, match="no such asset; known: small"):
            locate(ModelConfig(name_or_path=name), root=tmp_path)
    with pytest.raises(ValueError, match=r"model\.name_or_path=\./nowhere: no such folder"):
        locate(ModelConfig(name_or_path="./nowhere"), root=tmp_path)


def _without_index(folder):
    (folder / "model_index.json").unlink()


def _other_class(folder):
    edit(folder / "model_index.json", _class_name="KandinskyPipeline")


def _custom_pipeline(folder):
    edit(folder / "model_index.json", custom_pipeline="pipeline.py")


def _own_module(folder):
    edit(folder / "model_index.json", unet=["my_unet", "UNet"])


def _without_part(folder):
    shutil.rmtree(folder / "vae")


def _auto_map(folder):
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "code.Model"})


def _remote(folder):
    edit(folder / "unet" / "config.json", trust_remote_code=True)


def _internal(folder):
    edit(folder / "text_encoder_2" / "config.json", _attn_implementation_internal="someone/kernel")


def _pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "model.bin")


def _outside(folder):
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index), "utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_index, "has no model_index.json"),
        (_other_class, "is a KandinskyPipeline; supported are StableDiffusionPipeline, StableDiffusionXL"),
        (_custom_pipeline, "has 'custom_pipeline'; a model's own code is never run"),
        (_own_module, "takes 'unet' from 'my_unet'; a model's own code is never run"),
        (_without_part, "lacks the folder 'vae' of its model_index.json"),
        (_auto_map, "config.json has 'auto_map'"),
        (_remote, "config.json has 'trust_remote_code'"),
        (_internal, "has '_attn_implementation_internal'"),
        (_pickled, "has no .safetensors file; model.bin would need pickle"),
        (_outside, "weight_map names '../vae/diffusion_pytorch_model.safetensors', which is not a file"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_refused_before_anything_is_loaded(
    spoil, message, copied, tmp_path
):
    locate(configuration(copied), root=tmp_path)
    spoil(copied)
    with pytest.raises(ValueError, match="model") as caught:
        locate(configuration(copied), root=tmp_path)
    assert message in str(caught.value)


def test_a_variant_reads_its_own_files(tmp_path):
    folder = write_pipeline(tiny_sd15(), tmp_path / "half", variant="fp16")
    config = whole(folder, variant="fp16")
    assert load_denoiser(locate(config, root=tmp_path), config).conv_in.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"model\.variant=ema: .*half/.* has only"):
        locate(whole(folder, variant="ema"), root=tmp_path)


# -- loading


@pytest.mark.parametrize("name", FAMILIES)
def test_a_denoiser_is_loaded_alone_and_predicts_as_the_pipelines_does(name, folders, tmp_path):
    source = tmp_path / "alone"
    source.mkdir()
    shutil.copy(folders[name] / "model_index.json", source)
    part = "transformer" if name == "sd3" else "unet"
    shutil.copytree(folders[name] / part, source / part)
    assert family(str(source)) == name
    denoiser = load_denoiser(str(source), configuration(source))
    assert torch.equal(predict(denoiser, name), predict(getattr(TINY[name](), part), name))


@pytest.mark.parametrize(("name", "prediction"), [("sd15", "epsilon"), ("euler", "epsilon"), ("sd3", "flow")])
def test_a_scheduler_is_the_pipelines_own(name, prediction, folders):
    made = load_scheduler(str(folders[name]), configuration(folders[name]))
    kind = {
        "sd15": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "sd3": "FlowMatchEulerDiscreteScheduler",
    }
    assert type(made).__name__ == kind[name]
    found = schedule_of(made)
    assert found.prediction == prediction
    assert found.shift == (3.0 if name == "sd3" else 1.0)


def test_the_prediction_that_is_asked_for_reaches_the_scheduler(folders):
    config = configuration(folders["sdxl"], prediction="v")
    assert load_scheduler(str(folders["sdxl"]), config).config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"model\.prediction=flow, but the model's scheduler is a DDIMSched"):
        load_scheduler(str(folders["sdxl"]), replace(config, prediction="flow"))
    with pytest.raises(
        ValueError, match=r"model\.prediction=v, but the model's scheduler is a FlowMatchEuler"
    ):
        load_scheduler(str(folders["sd3"]), configuration(folders["sd3"], prediction="v"))


def test_a_scheduler_of_any_other_class_is_refused(copied):
    edit(copied / "scheduler" / "scheduler_config.json", _class_name="DiffusionPipeline")
    with pytest.raises(ValueError, match="its scheduler 'DiffusionPipeline' is none of diffusers'"):
        load_scheduler(str(copied), configuration(copied))


@pytest.mark.parametrize("name", FAMILIES)
def test_vae_and_text_encoders_are_frozen_and_named_as_the_pipeline_names_them(name, folders):
    source = str(folders[name])
    vae = load_vae(source, torch.float32)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = TINY[name]().vae.encode(images).latent_dist.mean
        assert torch.equal(vae.encode(images).latent_dist.mean, expected)
    encoders = load_text_encoders(source, torch.bfloat16)
    assert (
        list(encoders)
        == {
            "sd15": ["tokenizer", "text_encoder"],
            "sdxl": ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"],
            "sd3": [
                *("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
                *("tokenizer_3", "text_encoder_3"),
            ],
        }[name]
    )
    modules = [vae, *(m for m in encoders.values() if isinstance(m, torch.nn.Module))]
    assert len(modules) == (2 if name == "sd15" else 3)
    assert not any(p.requires_grad or m.training for m in modules for p in m.parameters())
    assert {m.dtype for m in modules[1:]} == {torch.bfloat16}
    if name != "sd15":
        assert encoders["tokenizer_2"].pad_token == "!"
    if name == "sd3":
        assert encoders["tokenizer_3"] is None
        assert encoders["text_encoder_3"] is None


def test_a_text_encoder_of_another_class_is_refused(copied):
    edit(copied / "model_index.json", text_encoder=["transformers", "AutoModel"])
    with pytest.raises(ValueError, match="its text_encoder is a AutoModel; supported are CLIPTokenizer"):
        load_text_encoders(str(copied), torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_for_sampling_shares_the_denoiser_that_is_trained(name, folders):
    source = str(folders[name])
    config = configuration(folders[name], lora=LoraConfig(r=2))
    denoiser = adapt(load_denoiser(source, config), config)
    pipe = load_pipeline(source, config, denoiser)
    assert type(pipe) is pipeline_class(name)
    assert (pipe.transformer if name == "sd3" else pipe.unet) is denoiser
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}

    def sample(pipe):
        return pipe("red cat", generator=torch.Generator().manual_seed(0), **options).images[0]

    base = sample(load_pipeline(source, config))
    assert (sample(pipe) == base).all()
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 1
    assert not (sample(pipe) == base).all()


def test_leaving_out_the_safety_checker_is_said(folders, tmp_path, caplog):
    folder = shutil.copytree(folders["sd15"], tmp_path / "model")
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    config = configuration(folder)
    with caplog.at_level(logging.INFO, logger="triptych.modalities.diffusion.model"):
        pipe = load_pipeline(locate(config, root=tmp_path), config)
    assert pipe.safety_checker is None
    assert "its safety checker is left out" in caplog.text


def test_weights_that_are_missing_or_of_another_shape_are_never_drawn_at_random(copied):
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "conv_out.bias"}, path)
    with pytest.raises(ValueError, match=r"conv_out\.bias"):
        load_denoiser(str(copied), configuration(copied))
    save_file({**weights, "conv_out.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"cannot load model\.name_or_path=.*model: .*conv_out.bias"):
        load_denoiser(str(copied), configuration(copied))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load model\.name_or_path=.*model: "):
        load_denoiser(str(copied), configuration(copied))


# -- adapting


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_at_the_start_change_no_bit_and_alone_are_trained_in_float32(name, dtype, folders):
    config = configuration(folders[name], lora=LoraConfig(r=3, alpha=5.0), dtype=dtype)
    denoiser = load_denoiser(str(folders[name]), config)
    inputs = _cast(denoiser_inputs(name), denoiser.dtype)
    before = denoiser(**inputs).sample
    adapt(denoiser, config)
    assert torch.equal(denoiser(**inputs).sample, before)
    trained = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert next(denoiser.parameters()).dtype == subject.DTYPES[dtype]
    assert denoiser.peft_config["default"].lora_alpha == 5.0
    denoiser(**inputs).sample.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def _cast(inputs, dtype):
    cast = {k: v.to(dtype) for k, v in inputs.items() if torch.is_tensor(v) and k != "timestep"}
    return {**inputs, **cast}


def test_switching_adapters_off_and_on_restores_what_is_trained(folders):
    """diffusers' own switches unfreeze what was frozen, hence `unchanged` around them."""
    from triptych.training.references import unchanged

    config = configuration(folders["sdxl"], lora=LoraConfig(r=2))
    denoiser = adapt(load_denoiser(str(folders["sdxl"]), config), config)
    base = predict(denoiser, "sdxl")
    for name, parameter in denoiser.named_parameters():
        if ".lora_B." in name:
            parameter.data = parameter.data + 1
        parameter.requires_grad_(".lora_B." in name)
    flags = {n: p.requires_grad for n, p in denoiser.named_parameters()}
    tuned = predict(denoiser, "sdxl")
    with unchanged(denoiser):
        denoiser.disable_adapters()
        assert torch.equal(predict(denoiser, "sdxl"), base)
        denoiser.enable_adapters()
    assert torch.equal(predict(denoiser, "sdxl"), tuned)
    assert {n: p.requires_grad for n, p in denoiser.named_parameters()} == flags
    assert not torch.equal(tuned, base)


def test_without_lora_every_weight_is_trained(folders):
    config = whole(folders["sdxl"])
    denoiser = adapt(load_denoiser(str(folders["sdxl"]), config), config)
    assert all(p.requires_grad for p in denoiser.parameters())
    predict(denoiser, "sdxl").sum().backward()
    assert all(p.grad is not None for p in denoiser.parameters())


def test_a_target_that_no_module_has_is_named_with_the_nearest(folders):
    config = configuration(folders["sdxl"], lora=LoraConfig(targets=["to_q", "to_out"]))
    with pytest.raises(ValueError, match=r"no module's name ends with 'to_outt' \(did you mean to_out\?\)"):
        adapt(
            load_denoiser(str(folders["sdxl"]), config), replace(config, lora=LoraConfig(targets=["to_outt"]))
        )
    # to_out is there, but is a list of modules.
    with pytest.raises(ValueError, match=r"model\.lora: .*ModuleList"):
        adapt(load_denoiser(str(folders["sdxl"]), config), config)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [LoraConfig(r=2), None], ids=["lora", "full"])
def test_checkpointing_changes_no_gradient_and_keeps_less(name, lora, folders):
    kept, gradients = {}, {}
    for checkpointing in (False, True):
        config = ModelConfig(
            name_or_path=str(folders[name]),
            lora=lora,
            reference="frozen_copy",
            gradient_checkpointing=checkpointing,
        )
        denoiser = load_denoiser(str(folders[name]), config)
        torch.manual_seed(0)
        adapt(denoiser, config).train()
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = predict(denoiser, name).square().sum()
        loss.backward()
        kept[checkpointing] = sum(sizes)
        gradients[checkpointing] = {n: p.grad for n, p in denoiser.named_parameters() if p.requires_grad}
    assert kept[True] < 0.6 * kept[False]
    assert gradients[True].keys() == gradients[False].keys()
    assert all(torch.equal(gradients[True][n], g) for n, g in gradients[False].items())


def test_channels_last_is_a_layout_and_no_other_model(folders):
    config = configuration(folders["sdxl"], lora=LoraConfig(r=2))
    plain = adapt(load_denoiser(str(folders["sdxl"]), config), config)
    last = adapt(load_denoiser(str(folders["sdxl"]), config), replace(config, channels_last=True))
    weight = last.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(predict(last, "sdxl"), predict(plain, "sdxl"))


def test_compilation_compiles_for_fixed_shapes_and_leaves_names_alone(folders, monkeypatch):
    config = configuration(folders["sdxl"], lora=LoraConfig(r=2))
    denoiser = load_denoiser(str(folders["sdxl"]), config)
    asked = []
    monkeypatch.setattr(type(denoiser), "compile", lambda self, **options: asked.append(options))
    adapt(denoiser, config)
    assert asked == []
    denoiser = load_denoiser(str(folders["sdxl"]), config)
    adapt(denoiser, replace(config, compile=True))
    assert asked == [{"dynamic": False}]
    assert not any("_orig_mod" in name for name, _ in denoiser.named_parameters())


def test_the_tiny_pipelines_are_seeded_and_small():
    for make in TINY.values():
        pipe = make()
        modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
        assert sum(p.numel() for m in modules for p in m.parameters()) < 300_000
        again = make().vae.encoder.conv_in.weight
        assert torch.equal(again, pipe.vae.encoder.conv_in.weight)
        latents = pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
        assert latents.shape[2:] == (LATENT, LATENT)
