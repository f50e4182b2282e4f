"""What a diffusion run leaves: LoRA files that other tools load, or the whole denoiser. safetensors only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from triptych.modalities.diffusion.persons import add_persons, switch_of, user_attentions
from triptych.training.atomic import delete, make_temporary, publish, sync

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
PERSONS_FILE = "persons.safetensors"
ADAPTER = "default"
_METADATA = "lora_adapter_metadata"
State = Mapping[str, Tensor]


def part_of(denoiser: nn.Module) -> str:
    """The name that a pipeline gives to this model: unet or transformer."""
    return "unet" if hasattr(denoiser, "conv_in") else "transformer"


def export_lora(denoiser: Any, folder: Path, pipeline_class: Any, *, state: State | None = None) -> Path:
    """Write the adapter as `pipe.load_lora_weights(folder)` reads it, its rank and alpha in the header.

    The file has the adapter's own dtype, float32; a pipeline in half precision rounds it as it loads.
    state: the model's gathered state dict where its own tensors are sharded.
    """
    part = part_of(denoiser)
    weights = _adapter(denoiser, state)
    if part == "unet":
        from diffusers.utils import convert_state_dict_to_diffusers

        weights = convert_state_dict_to_diffusers(weights)
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in _settings(denoiser).to_dict().items()}

    def write(temporary: Path) -> None:
        options = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": settings}
        pipeline_class.save_lora_weights(temporary, weight_name=LORA_FILE, safe_serialization=True, **options)

    return _write(folder, LORA_FILE, write)


def export_kohya(denoiser: Any, folder: Path, pipeline_class: Any, *, state: State | None = None) -> Path:
    """Write the adapter under kohya's names, with an alpha a module, for A1111, ComfyUI and others.

    ValueError for transformers, whose kohya files diffusers cannot read, and for modules whose names do not
    survive the renaming.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    if part_of(denoiser) != "unet":
        raise ValueError(f"kohya's format is for UNets; {type(denoiser).__name__} has {LORA_FILE} alone")
    settings = _settings(denoiser)
    found = {f"unet.{name}": value for name, value in _adapter(denoiser, state).items()}
    named = convert_state_dict_to_kohya(found)
    # diffusers writes the rank as alpha, which is another scale unless the two are equal.
    alpha = torch.tensor(float(settings.lora_alpha))
    named = {k: alpha.clone() if k.endswith(".alpha") else v for k, v in named.items()}
    _check_readable(named, found, pipeline_class)
    about = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": str(settings.lora_alpha),
    }
    return _write(folder, KOHYA_FILE, lambda temporary: save_file(named, temporary / KOHYA_FILE, about))


def _check_readable(named: State, found: State, pipeline_class: Any) -> None:
    """Kohya's names have one separator; diffusers must make the same modules of them again."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        back = convert_unet_state_dict_to_peft(pipeline_class.lora_state_dict(dict(named))[0])
    except ValueError as error:
        back, reason = {}, f": {' '.join(str(error).split())[:200]}"
    else:
        reason = ""
    if set(back) != set(found):
        odd = ", ".join(sorted(set(found) - set(back))[:2])
        raise ValueError(f"model.lora.targets: kohya's format cannot name {odd}{reason}")


def export_full(denoiser: Any, folder: Path, *, state: State | None = None) -> Path:
    """Write the whole model to `folder/unet` or `folder/transformer`, as `from_pretrained` reads it.

    state: the model's gathered state dict where its own tensors are sharded.
    """
    from huggingface_hub import save_torch_state_dict

    if getattr(denoiser, "peft_config", None):
        raise ValueError("the model has adapters: export them, or merge them first")
    if user_attentions(denoiser):
        raise ValueError("the model attends to users: export that attention, its base is as it was")
    target = folder / part_of(denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(target)
    denoiser.save_config(temporary)
    config = temporary / "config.json"
    content = json.loads(config.read_text("utf-8"))
    # A path of this machine means nothing elsewhere.
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    save_torch_state_dict(
        {k: v.detach() for k, v in (denoiser.state_dict() if state is None else state).items()},
        str(temporary),
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",
        safe_serialization=True,
    )
    for path in temporary.iterdir():
        sync(path)
    publish(temporary, target)
    return target


def export_persons(denoiser: nn.Module, folder: Path, *, state: State | None = None) -> Path:
    """Write W'_k and W'_v of every cross-attention, with what `load_persons` needs to know in the header.

    state: the model's gathered state dict where its own tensors are sharded.
    """
    from safetensors.torch import save_file

    weights = _persons(denoiser, state)
    width = next(iter(weights.values())).shape[1]
    about = {"format": "pt", "width": str(width), "scale": repr(switch_of(denoiser).scale)}
    return _write(folder, PERSONS_FILE, lambda temporary: save_file(weights, temporary / PERSONS_FILE, about))


def load_persons(denoiser: Any, folder: Path | str) -> None:
    """Give a UNet the attention to users that `export_persons` wrote, or its weights if it has one.

    ValueError when the folder has none, or one of another UNet, width or scale.
    """
    path = Path(folder) / PERSONS_FILE
    weights, about = _read(path, "load_persons")
    try:
        width, scale = int(about["width"]), float(about["scale"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not say its width and scale") from error
    if not user_attentions(denoiser):
        add_persons(denoiser, width=width, scale=scale)
    elif switch_of(denoiser).scale != scale:
        raise ValueError(f"{path} has scale={scale:g}, the model's is {switch_of(denoiser).scale:g}")
    mine = _persons(denoiser, None)
    _check_fit(weights, mine, path)
    with torch.no_grad():
        for name, value in weights.items():
            mine[name].copy_(value)


def _persons(denoiser: nn.Module, state: State | None) -> dict[str, Tensor]:
    """The weights of attention to users: down_blocks ... attn2.to_k.weight."""
    names = [
        f"{name}.processor.{part}.weight" for name in user_attentions(denoiser) for part in ("to_k", "to_v")
    ]
    if not names:
        raise ValueError("the model attends to no user, so there is nothing of it to export")
    given = denoiser.state_dict() if state is None else state
    return {name.replace(".processor.", "."): given[name].detach().contiguous() for name in names}


def load_exported(denoiser: Any, folder: Path) -> None:
    """Put exported weights, an adapter, attention to users or a whole model, into one set up as for training.

    The adapter's tensors are replaced in place, so that an optimizer made before still trains them; loading
    through the pipeline would add a second adapter and leave the first one, untrained, to the optimizer.
    ValueError when the folder has neither, or when rank, alpha, names or shapes do not fit.
    """
    if getattr(denoiser, "peft_config", None):
        _load_adapter(denoiser, folder / LORA_FILE)
    elif user_attentions(denoiser):
        load_persons(denoiser, folder)
    else:
        _load_whole(denoiser, folder / part_of(denoiser))


def _load_adapter(denoiser: Any, path: Path) -> None:
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import set_peft_model_state_dict

    prefix = f"{part_of(denoiser)}."
    weights, about = _read(path, "model.lora")
    found = json.loads(about.get(_METADATA, "{}"))
    settings = _settings(denoiser)
    for name in ("r", "lora_alpha"):
        # Without a header, as other tools write, alpha is the rank.
        value, mine = found.get(prefix + name, settings.r), getattr(settings, name)
        if value != mine:
            raise ValueError(f"{path} has {name}={value}, model.lora of the configuration {mine}")
    weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    if part_of(denoiser) == "unet":
        weights = convert_unet_state_dict_to_peft(weights)
    _check_fit(weights, _adapter(denoiser, None), path)
    set_peft_model_state_dict(denoiser, weights, adapter_name=ADAPTER)


def _load_whole(denoiser: nn.Module, folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} does not hold a whole model, which model.lora=null asks for")
    weights = {name: value for path in files for name, value in _read(path, "model.lora=null")[0].items()}
    _check_fit(weights, denoiser.state_dict(), folder)
    denoiser.load_state_dict(weights)


def _read(path: Path, wanted: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path.parent} does not hold {path.name}, which {wanted} asks for")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _check_fit(weights: State, mine: State, where: Path) -> None:
    """Names and shapes must be the model's own; nothing is left as it was drawn."""
    missing, odd = sorted(set(mine) - set(weights)), sorted(set(weights) - set(mine))
    if missing or odd:
        shown = [f"{n} is missing" for n in missing[:2]] + [f"{n} is unknown" for n in odd[:2]]
        raise ValueError(f"{where} does not fit the model: {', '.join(shown)}")
    for name, value in weights.items():
        if value.shape != mine[name].shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(mine[name].shape)}"
            raise ValueError(f"{where} does not fit the model: {name} is {shapes}")


def _settings(denoiser: Any) -> Any:
    found = getattr(denoiser, "peft_config", None) or {}
    if ADAPTER not in found:
        raise ValueError(f"the model has no adapter '{ADAPTER}' to export")
    return found[ADAPTER]


def _adapter(denoiser: Any, state: State | None) -> dict[str, Tensor]:
    """The adapter's tensors, without its name: down_blocks ... to_q.lora_A.weight."""
    from peft import get_peft_model_state_dict

    _settings(denoiser)
    given = None if state is None else dict(state)
    found = get_peft_model_state_dict(denoiser, state_dict=given, adapter_name=ADAPTER)
    return {name: value.detach().contiguous() for name, value in found.items()}


def _write(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    """A file that appears whole or not at all; the folder's others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(folder / name)
    write(temporary)
    sync(temporary / name)
    os.replace(temporary / name, folder / name)
    sync(folder)
    delete(temporary)
    return folder / name
