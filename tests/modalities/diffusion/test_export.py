import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_diffusion import TINY, denoiser_inputs, write_pipeline

from triptych.modalities.diffusion.export import (
    KOHYA_FILE,
    LORA_FILE,
    export_full,
    export_kohya,
    export_lora,
    load_exported,
    part_of,
)
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig, adapt, load_denoiser
from triptych.training import atomic

RANK, ALPHA = 3, 7.5
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]


@pytest.fixture(scope="module", params=list(TINY))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(write_pipeline(make(), root / name)) for name, make in TINY.items()}


def configuration(source, *, targets=ATTENTION, dtype="float32", alpha=ALPHA, rank=RANK):
    lora = LoraConfig(r=rank, alpha=alpha, targets=list(targets))
    return ModelConfig(name_or_path=source, dtype=dtype, lora=lora)


def adapted(source, **options):
    config = configuration(source, **options)
    return adapt(load_denoiser(source, config), config)


def trained(source, **options):
    """An adapted model whose adapters, B included, are no longer what they were at the start."""
    denoiser = adapted(source, **options)
    draw = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return denoiser


@torch.no_grad()
def predict(denoiser, family):
    inputs = denoiser_inputs(family)
    cast = {k: v.to(denoiser.dtype) for k, v in inputs.items() if torch.is_tensor(v)}
    return denoiser.eval()(**{**inputs, **cast, "timestep": inputs["timestep"]}).sample


def fresh_pipeline(family):
    pipe = TINY[family]()
    return pipe, getattr(pipe, "transformer" if family == "sd3" else "unet")


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD], ids=["attention", "feed_forward"])
def test_diffusers_loads_the_adapter_to_the_same_prediction_bit_by_bit(family, folders, targets, tmp_path):
    if family == "sd3" and targets is FEED_FORWARD:
        targets = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.2", "add_q_proj"]
    policy = trained(folders[family], targets=targets)
    pipe, fresh = fresh_pipeline(family)
    base = predict(fresh, family)
    path = export_lora(policy, tmp_path, type(pipe))
    assert path == tmp_path / LORA_FILE
    pipe.load_lora_weights(str(tmp_path))
    expected = predict(policy, family)
    assert torch.equal(predict(fresh, family), expected)
    assert not torch.allclose(expected, base, atol=1e-3)


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD], ids=["attention", "feed_forward"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_loads_the_kohya_file_to_the_same_prediction_bit_by_bit(family, folders, targets, tmp_path):
    policy = trained(folders[family], targets=targets)
    pipe, fresh = fresh_pipeline(family)
    path = export_kohya(policy, tmp_path, type(pipe))
    assert path == tmp_path / KOHYA_FILE
    assert {k.split("_")[1] for k in load_file(path)} == {"unet"}
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    assert torch.equal(predict(fresh, family), predict(policy, family))


def test_rank_and_alpha_stand_in_the_headers_and_in_every_module_of_the_kohya_file(folders, tmp_path):
    policy = trained(folders["sdxl"])
    pipeline = type(TINY["sdxl"]())
    export_lora(policy, tmp_path, pipeline)
    export_kohya(policy, tmp_path, pipeline)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (about["unet.r"], about["unet.lora_alpha"]) == (RANK, ALPHA)
    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        assert file.metadata()["ss_network_alpha"] == str(ALPHA)
        assert file.metadata()["ss_network_dim"] == str(RANK)
    alphas = [v.item() for k, v in load_file(tmp_path / KOHYA_FILE).items() if k.endswith(".alpha")]
    assert alphas == [ALPHA] * len(policy_modules(policy))


def policy_modules(policy):
    return [name for name, module in policy.named_modules() if hasattr(module, "lora_A")]


def test_both_files_live_in_one_folder_and_the_folder_alone_loads_the_first(folders, tmp_path):
    policy = trained(folders["sd15"])
    pipe, fresh = fresh_pipeline("sd15")
    export_kohya(policy, tmp_path, type(pipe))
    export_lora(policy, tmp_path, type(pipe))
    assert sorted(p.name for p in tmp_path.iterdir()) == [LORA_FILE, KOHYA_FILE]
    pipe.load_lora_weights(str(tmp_path))
    assert torch.equal(predict(fresh, "sd15"), predict(policy, "sd15"))


def test_kohya_is_refused_for_transformers_and_for_names_that_it_cannot_say(folders, tmp_path):
    with pytest.raises(ValueError, match="for UNets; SD3Transformer2DModel has pytorch_lora"):
        export_kohya(trained(folders["sd3"]), tmp_path, type(TINY["sd3"]()))
    policy = trained(folders["sdxl"], targets=["to_q", "add_embedding.linear_1"])
    with pytest.raises(ValueError, match=r"kohya's format cannot name .*add_embedding"):
        export_kohya(policy, tmp_path, type(TINY["sdxl"]()))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_half_precision_base_is_kept_in_float32(folders, tmp_path):
    policy = trained(folders["sdxl"], dtype="bfloat16")
    assert policy.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    path = export_lora(policy, tmp_path, type(TINY["sdxl"]()))
    assert {v.dtype for v in load_file(path).values()} == {torch.float32}
    again = adapted(folders["sdxl"], dtype="bfloat16")
    load_exported(again, tmp_path)
    assert torch.equal(predict(again, "sdxl"), predict(policy, "sdxl"))


def test_a_half_precision_pipeline_of_diffusers_rounds_the_adapter_and_nothing_else(folders, tmp_path):
    policy = trained(folders["sdxl"], dtype="bfloat16")
    pipeline = type(TINY["sdxl"]())
    export_lora(policy, tmp_path, pipeline)
    pipe = pipeline.from_pretrained(folders["sdxl"], dtype=torch.bfloat16, use_safetensors=True)
    pipe.load_lora_weights(str(tmp_path))
    assert torch.equal(predict(pipe.unet, "sdxl"), predict(policy.to(torch.bfloat16), "sdxl"))


def test_loading_into_an_adapted_model_keeps_the_tensors_that_its_optimizer_holds(family, folders, tmp_path):
    policy = trained(folders[family])
    export_lora(policy, tmp_path, type(TINY[family]()))
    again = adapted(folders[family])
    held = [p for p in again.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(held, lr=1.0)
    load_exported(again, tmp_path)
    assert list(again.peft_config) == ["default"]
    now = [p for p in again.parameters() if p.requires_grad]
    assert len(now) == len(held)
    assert all(a is b for a, b in zip(now, held, strict=True))
    assert torch.equal(predict(again, family), predict(policy, family))
    again(**denoiser_inputs(family)).sample.sum().backward()
    optimizer.step()
    assert not torch.equal(predict(again, family), predict(policy, family))


def test_a_whole_model_comes_back_bit_by_bit_here_and_in_diffusers(family, folders, tmp_path):
    config = ModelConfig(name_or_path=folders[family], lora=None, reference="frozen_copy")
    policy = adapt(load_denoiser(folders[family], config), config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    target = export_full(policy, tmp_path)
    assert target == tmp_path / part_of(policy)
    again = load_denoiser(folders[family], config)
    load_exported(again, tmp_path)
    expected = predict(policy, family)
    assert torch.equal(predict(again, family), expected)
    read = type(policy).from_pretrained(tmp_path, subfolder=part_of(policy), use_safetensors=True)
    assert torch.equal(predict(read, family), expected)
    assert folders[family] not in (target / "config.json").read_text("utf-8")


def test_gathered_weights_are_exported_instead_of_the_models_own(folders, tmp_path):
    policy = trained(folders["sdxl"])
    gathered = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = predict(policy, "sdxl")
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    export_lora(policy, tmp_path, type(TINY["sdxl"]()), state=gathered)
    again = adapted(folders["sdxl"])
    load_exported(again, tmp_path)
    assert torch.equal(predict(again, "sdxl"), expected)


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    policy = trained(folders["sdxl"])
    export_lora(policy, tmp_path, type(TINY["sdxl"]()))
    with pytest.raises(ValueError, match=r"has lora_alpha=7\.5, model\.lora of the configuration 8\.0"):
        load_exported(adapted(folders["sdxl"], alpha=8.0), tmp_path)
    with pytest.raises(ValueError, match=r"has r=3, model\.lora of the configuration 4"):
        load_exported(adapted(folders["sdxl"], rank=4), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: .*ff\.net\.0.* is missing"):
        load_exported(adapted(folders["sdxl"], targets=FEED_FORWARD), tmp_path)
    with pytest.raises(ValueError, match=r"does not hold a whole model, which model\.lora=null asks for"):
        load_exported(TINY["sdxl"]().unet, tmp_path)
    with pytest.raises(ValueError, match=r"does not hold pytorch_lora_weights\.safetensors, which"):
        load_exported(policy, tmp_path / "nowhere")
    weights = load_file(tmp_path / LORA_FILE)
    save_file(weights, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"has lora_alpha=3, model\.lora of the configuration 7\.5"):
        load_exported(policy, tmp_path)
    policy = trained(folders["sdxl"], alpha=RANK)
    load_exported(policy, tmp_path)
    first = next(iter(weights))
    save_file({**weights, first: weights[first][:, :2].contiguous()}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"does not fit the model: .* is \(3, 2\), the model's is \(3, "):
        load_exported(policy, tmp_path)
    (tmp_path / LORA_FILE).write_bytes((tmp_path / LORA_FILE).read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_exported(policy, tmp_path)


def test_only_what_there_is_can_be_exported(folders, tmp_path):
    pipe = TINY["sdxl"]()
    with pytest.raises(ValueError, match="the model has no adapter 'default' to export"):
        export_lora(pipe.unet, tmp_path, type(pipe))
    with pytest.raises(ValueError, match="the model has adapters: export them"):
        export_full(trained(folders["sdxl"]), tmp_path)


@pytest.mark.parametrize("point", ["fsync-folder", "set-aside", "rename"])
def test_an_export_that_is_cut_off_leaves_the_one_before(point, folders, tmp_path, monkeypatch):
    config = ModelConfig(name_or_path=folders["sd15"], lora=None, reference="frozen_copy")
    policy = load_denoiser(folders["sd15"], config)
    target = export_full(policy, tmp_path)
    before = (target / "diffusion_pytorch_model.safetensors").read_bytes()

    def crash(name):
        if name == point:
            raise KeyboardInterrupt

    with torch.no_grad():
        policy.conv_in.weight.zero_()
    monkeypatch.setattr(atomic, "fault_point", crash)
    with pytest.raises(KeyboardInterrupt):
        export_full(policy, tmp_path)
    monkeypatch.undo()
    atomic.clean_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["unet"]
    assert (target / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_file_that_cannot_be_written_leaves_the_one_before(folders, tmp_path, monkeypatch):
    policy = trained(folders["sd15"])
    pipeline = type(TINY["sd15"]())
    before = export_lora(policy, tmp_path, pipeline).read_bytes()

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "save_lora_weights", fail)
    with pytest.raises(OSError, match="No space"):
        export_lora(policy, tmp_path, pipeline)
    atomic.clean_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [LORA_FILE]
    assert (tmp_path / LORA_FILE).read_bytes() == before
