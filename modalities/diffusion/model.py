"""Loading and adapting diffusion models. Weights are read from safetensors only, code never."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from triptych.modalities.diffusion.folders import FAMILIES, SAFETY, Family, check_folder, check_index
from triptych.modalities.diffusion.persons import PersonsConfig, add_persons

logger = logging.getLogger(__name__)

ASSET = "asset:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DENOISER = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer"}
_TEXT_CLASSES = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "T5EncoderModel",
)
_ENCODERS = {"sd15": ("",), "sdxl": ("", "_2"), "sd3": ("", "_2", "_3")}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + alpha / r * B A on the target modules, B zero at the start.

    targets: ends of module names. Add ff.net.0.proj and ff.net.2 for the feed-forward layers.
    """

    r: int = 64
    alpha: float = 64.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"model.lora.r={self.r} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"model.lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ValueError("model.lora.targets=[] names no module; model.lora=null trains every weight")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model and how it is adapted.

    name_or_path: a hub name, a folder, or 'asset:NAME' for a model that the project ships. variant: 'fp16'
    reads the files of that name. lora: null trains every weight. persons: attention to the user, which alone
    is trained; with lora null and reference 'user_off', the base that sees none. reference 'adapter_off' is
    the base under the adapters; 'frozen_copy' a snapshot. cache_reference computes the reference's values
    once, before training, and keeps them. prediction: what the model predicts, 'auto' as its scheduler says.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    persons: PersonsConfig | None = None
    reference: Literal["adapter_off", "frozen_copy", "user_off"] = "adapter_off"
    cache_reference: bool = False
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    prediction: Literal["auto", "epsilon", "v", "flow"] = "auto"
    kernel: Literal["auto", "reference", "fused", "triton"] = "auto"

    def __post_init__(self) -> None:
        if (self.persons is not None) != (self.reference == "user_off"):
            raise ValueError(f"model.reference={self.reference}: user_off goes with model.persons alone")
        if self.persons is not None and self.lora is not None:
            raise ValueError("model.persons trains the attention to the user alone: set model.lora=null")
        if self.reference == "adapter_off" and self.lora is None:
            raise ValueError("model.reference=adapter_off needs model.lora; without it use frozen_copy")
        if self.dtype == "float16" and self.lora is None and self.persons is None:
            raise ValueError(
                "model.dtype=float16 has too few bits to train every weight in; use float32 or bfloat16, "
                "or model.lora, whose weights stay in float32"
            )


def locate(config: ModelConfig, *, root: Path) -> str:
    """The folder or hub name that config.name_or_path means; what a folder holds is checked.

    root: the folder whose `assets` hold the models that the project ships.
    """
    source = config.name_or_path
    if source.startswith(ASSET):
        name = source.removeprefix(ASSET)
        have = sorted(p.parent.name for p in root.glob("assets/*/model_index.json"))
        if name not in have:
            raise ValueError(
                f"model.name_or_path={source}: no such asset; known: {', '.join(have) or 'none'}"
            )
        source = str(root / "assets" / name)
    if os.path.isdir(source):
        check_folder(Path(source), variant=config.variant)
    elif os.path.exists(source) or source.startswith((".", "/", "~")):
        raise ValueError(f"model.name_or_path={config.name_or_path}: no such folder")
    return source


def family(source: str, *, revision: str | None = None) -> Family:
    """The family of a pipeline: 'sd15' (also SD 2), 'sdxl' or 'sd3' (also 3.5)."""
    return check_index(_index(source, revision), where=source)


def _index(source: str, revision: str | None = None) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    with _loading(source):
        return dict(DiffusionPipeline.load_config(source, revision=revision))  # type: ignore[arg-type]


def pipeline_class(kind: Family) -> Any:
    """The diffusers pipeline of a family."""
    import diffusers

    names = {value: name for name, value in FAMILIES.items()}
    return getattr(diffusers, names[kind])


def load_denoiser(source: str, config: ModelConfig) -> nn.Module:
    """The UNet or transformer of a pipeline on the CPU, and nothing else of it."""
    import diffusers

    kind = family(source, revision=config.revision)
    made: Any = diffusers.SD3Transformer2DModel if kind == "sd3" else diffusers.UNet2DConditionModel
    with _loading(source):
        model, info = made.from_pretrained(
            source,
            subfolder=_DENOISER[kind],
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
            **_files(config.revision, config.variant),
        )
    _check_complete(info, f"{source}/{_DENOISER[kind]}")
    return model


def load_scheduler(source: str, config: ModelConfig) -> Any:
    """The pipeline's scheduler, with the prediction type that config.prediction asks for."""
    import diffusers

    with _loading(source):
        any_scheduler: Any = diffusers.DDPMScheduler
        found = dict(any_scheduler.load_config(source, subfolder="scheduler", revision=config.revision))
    name = str(found.get("_class_name"))
    made = getattr(diffusers, name, None)
    if not (isinstance(made, type) and issubclass(made, diffusers.SchedulerMixin)):
        raise ValueError(f"{source}: its scheduler '{name}' is none of diffusers'")
    flow = name.startswith("FlowMatch")
    if config.prediction != "auto":
        if flow != (config.prediction == "flow"):
            raise ValueError(f"model.prediction={config.prediction}, but the model's scheduler is a {name}")
        if not flow:
            found["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[config.prediction]
    return made.from_config(found)  # type: ignore[attr-defined]


def load_vae(
    source: str, dtype: torch.dtype, *, revision: str | None = None, variant: str | None = None
) -> nn.Module:
    """The pipeline's VAE, frozen. In float16 SDXL's own VAE overflows: use float32 or bfloat16."""
    import diffusers

    made: Any = diffusers.AutoencoderKL
    with _loading(source):
        model, info = made.from_pretrained(
            source, subfolder="vae", dtype=dtype, output_loading_info=True, **_files(revision, variant)
        )
    _check_complete(info, f"{source}/vae")
    return model.requires_grad_(False).eval()


def load_text_encoders(
    source: str, dtype: torch.dtype, *, revision: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Tokenizers and frozen text encoders by the pipeline's names: tokenizer, text_encoder, tokenizer_2 ...

    An SD3 pipeline without T5 has None for tokenizer_3 and text_encoder_3.
    """
    import transformers

    index = _index(source, revision)
    found: dict[str, Any] = {}
    for end in _ENCODERS[check_index(index, where=source)]:
        for part in (f"tokenizer{end}", f"text_encoder{end}"):
            library, name = index.get(part, (None, None))
            found[part] = None
            if library is None:
                continue
            if library != "transformers" or name not in _TEXT_CLASSES:
                raise ValueError(
                    f"{source}: its {part} is a {name}; supported are {', '.join(_TEXT_CLASSES)}"
                )
            made: Any = getattr(transformers, name)
            options: dict[str, Any] = {"subfolder": part, "revision": revision, "trust_remote_code": False}
            with _loading(source):
                if part.startswith("tokenizer"):
                    found[part] = made.from_pretrained(source, **options)
                    continue
                options |= {"dtype": dtype, "output_loading_info": True, **_files(revision, variant)}
                model, info = made.from_pretrained(source, **options)
            _check_complete(info, f"{source}/{part}")
            found[part] = model.requires_grad_(False).eval()
    return found


def load_pipeline(source: str, config: ModelConfig, denoiser: nn.Module | None = None) -> Any:
    """The whole pipeline, for sampling. A denoiser that is given is used as it is, adapters included."""
    index = _index(source, config.revision)
    kind = check_index(index, where=source)
    made: dict[str, Any] = {"scheduler": load_scheduler(source, config)}
    if kind == "sd15":
        if index.get("safety_checker", (None,))[0] is not None:
            logger.info("%s: its safety checker is left out; check what you publish yourself", source)
        made |= {**dict.fromkeys(SAFETY), "requires_safety_checker": False}
    # What a model_index does not list must be passed as None.
    listed = (f"{part}{end}" for end in _ENCODERS[kind] for part in ("tokenizer", "text_encoder"))
    made |= {name: None for name in listed if index.get(name, (None,))[0] is None}
    if denoiser is not None:
        made[_DENOISER[kind]] = denoiser
    with _loading(source):
        pipe = pipeline_class(kind).from_pretrained(
            source, dtype=DTYPES[config.dtype], **_files(config.revision, config.variant), **made
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _files(revision: str | None, variant: str | None) -> dict[str, Any]:
    return {"revision": revision, "variant": variant, "use_safetensors": True}


def _check_complete(info: Any, where: str) -> None:
    """Libraries only warn of weights that are missing, and draw them at random."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if names := list(info.get(problem, ())):
            shown = ", ".join(str(name) for name in names[:3])
            raise ValueError(f"{where}: its weights do not fit its configuration ({problem}: {shown})")


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """What the library says of a model that it cannot load, in one line that names the setting."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load model.name_or_path={source}: {reason}") from error


def adapt(denoiser: Any, config: ModelConfig, *, user_width: int | None = None) -> nn.Module:
    """The model as it is trained: LoRA on a frozen base, or every weight; checkpointing, layout, compilation.

    Adapters are diffusers' own (`add_adapter`, no wrapper) and in float32 whatever the base's dtype.
    user_width: of the users' vectors, if and only if config.persons asks for attention to them.
    """
    if (config.persons is None) != (user_width is None):
        raise ValueError("model.persons is for training on encoded preferences, whose records name persons")
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(_checkpointed)
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.persons is not None and user_width is not None:
        add_persons(denoiser, width=user_width, scale=config.persons.scale)
    elif config.lora is None:
        denoiser.requires_grad_(True)
    else:
        _add_lora(denoiser, config.lora)
    if config.compile:
        denoiser.compile(dynamic=False)
    return denoiser


def _add_lora(denoiser: Any, lora: LoraConfig) -> None:
    import peft

    names = [name for name, _ in denoiser.named_modules()]
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            ends = sorted({".".join(name.split(".")[-k:]) for name in names for k in (1, 2)})
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"model.lora.targets: no module's name ends with '{target}'{hint}")
    denoiser.requires_grad_(False)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        init_lora_weights=True,
    )
    try:
        denoiser.add_adapter(settings)
    except ValueError as error:
        raise ValueError(f"model.lora: {' '.join(str(error).split())[:300]}") from error
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _checkpointed(module: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(module.__call__, *inputs, use_reentrant=False)
