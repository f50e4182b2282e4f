"""Pictures from a diffusion model: diffusers' own pipeline, with one source of noise a picture.

Shapes: P prompts, K pictures a prompt, N = P K pictures prompt by prompt, Z latent channels, H x W.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.modalities.diffusion.measures import measure_of
from triptych.training.order import key
from triptych.training.plugs import PlugConfig
from triptych.training.references import unchanged

# Decoding an SDXL picture takes several GB of activations, so few pixels are decoded at a time.
_PIXELS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How pictures are drawn.

    guidance: scale of classifier-free guidance (Ho & Salimans 2022); at most 1 is without, at half the cost.
    batch_size: pictures at a time; it changes speed and memory, not the noise. height, width: pixels; None
    is what the model was made for. scheduler: the pipeline's own, or 'ddim' without noise (Song et al. 2021).
    """

    num_steps: int = 30
    guidance: float = 5.0
    num_per_prompt: int = 1
    batch_size: int = 8
    height: int | None = None
    width: int | None = None
    seed: int = 0
    scheduler: Literal["default", "ddim"] = "default"

    def __post_init__(self) -> None:
        _check(self, "")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures of the base and of the aligned model on held-out prompts, from the same noise.

    num_prompts: 0 makes none. every: also during training, at the held-out evaluations whose step it divides
    (1: at each of them, 0: at none). measures: what is measured of the pictures, by name; see `measures`.
    scorers: name -> image scorer, which judge the pictures, too; best some that no label came from.
    height, width: null is the resolution of the encoded data. seed: of the noise, so that runs that differ in
    run.seed alone can be compared picture by picture. For the rest see `Sampling`.
    """

    num_prompts: int = 8
    num_per_prompt: int = 2
    num_steps: int = 30
    guidance: float = 5.0
    every: int = 1
    measures: list[str] = field(default_factory=lambda: ["colourfulness", "brightness", "sharpness"])
    scorers: dict[str, PlugConfig] = field(default_factory=dict)
    batch_size: int = 8
    height: int | None = None
    width: int | None = None
    seed: int = 0
    scheduler: Literal["default", "ddim"] = "default"

    def __post_init__(self) -> None:
        _check(self, "sample.")
        for name in ("num_prompts", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"sample.{name}={getattr(self, name)} must be 0 or positive")
        for name in self.measures:
            measure_of(name)
        if twice := sorted(self.scorers.keys() & set(self.measures)):
            raise ValueError(f"sample.scorers: {', '.join(twice)} is the name of a measure, too")

    def sampling(self) -> Sampling:
        """How the pictures are drawn."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.__slots__})


def _check(settings: Sampling | SampleConfig, prefix: str) -> None:
    for name in ("num_steps", "num_per_prompt", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{prefix}{name}={getattr(settings, name)} must be at least 1")
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"{prefix}{name}={value} must be a positive multiple of 8, or null")
    if not settings.guidance >= 0:
        raise ValueError(f"{prefix}guidance={settings.guidance} must be 0 or positive")
    if settings.scheduler not in ("default", "ddim"):
        raise ValueError(f"{prefix}scheduler={settings.scheduler} is not one of default, ddim")


@dataclass(frozen=True, slots=True)
class Embedded:
    """Prompts as a pipeline's denoiser takes them, so that sampling needs no text encoder.

    tensors: argument of the pipeline -> [P, L, D], or [P, D] of pooled prompts, on the CPU.
    """

    prompts: tuple[str, ...]
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.prompts)


@torch.no_grad()
def embed(pipeline: Any, prompts: Sequence[str], *, batch_size: int = 16) -> Embedded:
    """Every prompt, and the empty one beside it for guidance, through the pipeline's text encoders."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
    names += ("negative_pooled_prompt_embeds",)
    takes = inspect.signature(pipeline.encode_prompt).parameters
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        others = {name: None for name in ("prompt_2", "prompt_3") if name in takes}
        with _full_precision(pipeline.device):
            found = pipeline.encode_prompt(
                prompt=batch,
                device=pipeline._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                **others,
            )
        parts.append({n: t.cpu() for n, t in zip(names, found, strict=False) if t is not None})
    tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return Embedded(tuple(prompts), tensors)


def generate(
    pipeline: Any,
    prompts: Sequence[str] | Embedded,
    sampling: Sampling,
    *,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """K pictures of every prompt, [N] in the order of the prompts.

    The noise of picture k of prompt i comes from (seed, first + i, k) alone: whatever model the pipeline
    holds starts from bitwise the same, and the batch size changes no more than the rounding of its kernels.
    first: number of the first prompt, for a list that is sampled in parts. progress: is told how many are
    done. ValueError for pictures that are not finite.
    """
    images: list[Image.Image] = []
    for latents in _sample(pipeline, prompts, sampling, first):
        images += decode(pipeline, latents)
        if progress is not None:
            progress(len(images))
    return images


def generate_latents(
    pipeline: Any,
    prompts: Sequence[str] | Embedded,
    sampling: Sampling,
    *,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """As `generate`, before decoding: [N, Z, H, W] float32 on the CPU, scaled as the model takes them."""
    found: list[Tensor] = []
    done = 0
    for latents in _sample(pipeline, prompts, sampling, first):
        found.append(latents.float().cpu())
        done += len(latents)
        if progress is not None:
            progress(done)
    return torch.cat(found)


def decode(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents [N, Z, H, W] that are scaled as the model takes them; see `decoded`."""
    images: list[Image.Image] = []
    for part in _decoded(pipeline, latents):
        images += pipeline.image_processor.postprocess(part, output_type="pil")
    return images


def decoded(pipeline: Any, latents: Tensor) -> Tensor:
    """Pictures of latents [N, Z, H, W] as tensors [N, 3, H', W'] about in [-1, 1], on the VAE's device.

    As the pipelines do it, but never in float16 (SDXL's VAE overflows there) and never under autocast.
    ValueError for pictures that are not finite.
    """
    return torch.cat(list(_decoded(pipeline, latents)))


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures [N, 3, H, W] in [-1, 1] as 8-bit images, rounded as diffusers does it."""
    pixels = (pictures / 2 + 0.5).clamp(0, 1).cpu().float().permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in (pixels * 255).round().to(torch.uint8).numpy()]


def _decoded(pipeline: Any, latents: Tensor) -> Iterator[Tensor]:
    """Few pictures at a time."""
    vae, settings = pipeline.vae, pipeline.vae.config
    dtype = vae.dtype
    least = len(settings.block_out_channels) - 1
    pixels = latents.shape[-2] * latents.shape[-1] * 4**least
    size = max(1, _PIXELS_AT_ONCE // pixels)
    if dtype == torch.float16:
        vae.to(torch.float32)
    try:
        for part in latents.split(size):
            with torch.no_grad(), _full_precision(vae.device):
                found = vae.decode(_unscaled(part.to(vae.device), settings).to(vae.dtype)).sample
            if not bool(torch.isfinite(found).all()):
                where = "latents" if not bool(torch.isfinite(part).all()) else f"decoding in {vae.dtype}"
                raise ValueError(f"pictures are not finite: the {where} gave inf or nan")
            yield found
    finally:
        if dtype == torch.float16:
            vae.to(dtype)


def denoiser_of(pipeline: Any) -> nn.Module:
    """The pipeline's UNet or transformer."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def _unscaled(latents: Tensor, settings: Any) -> Tensor:
    """Latents as the VAE made them; the inverse of what the encoding step does."""
    mean, std = (getattr(settings, name, None) for name in ("latents_mean", "latents_std"))
    latents = latents.float()
    if mean is not None and std is not None:
        mean, std = (torch.tensor(x, device=latents.device).reshape(1, -1, 1, 1) for x in (mean, std))
        return latents * std / settings.scaling_factor + mean
    return latents / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0.0)


def _sample(
    pipeline: Any, prompts: Sequence[str] | Embedded, sampling: Sampling, first: int
) -> Iterator[Tensor]:
    """Latents of the pictures, batch by batch; between batches the pipeline is as it was."""
    known = prompts if isinstance(prompts, Embedded) else embed(pipeline, prompts)
    pictures = [(i, k) for i in range(len(known)) for k in range(sampling.num_per_prompt)]
    for start in range(0, len(pictures), sampling.batch_size):
        batch = pictures[start : start + sampling.batch_size]
        with _prepared(pipeline, sampling), torch.no_grad():
            yield _latents(pipeline, known, batch, sampling, first)


def _latents(
    pipeline: Any, known: Embedded, batch: Sequence[tuple[int, int]], sampling: Sampling, first: int
) -> Tensor:
    dtype = next(denoiser_of(pipeline).parameters()).dtype
    device = pipeline._execution_device
    index = torch.tensor([i for i, _ in batch])
    return pipeline(
        **{name: values[index].to(device, dtype) for name, values in known.tensors.items()},
        num_inference_steps=sampling.num_steps,
        guidance_scale=sampling.guidance,
        height=sampling.height,
        width=sampling.width,
        generator=[_generator(sampling.seed, first + i, k) for i, k in batch],
        output_type="latent",
    ).images


def _generator(seed: int, prompt: int, repeat: int) -> torch.Generator:
    # On the CPU, so that the noise is the same on every device.
    return torch.Generator().manual_seed(key("picture", seed, prompt, repeat))


@contextlib.contextmanager
def _prepared(pipeline: Any, sampling: Sampling) -> Iterator[None]:
    """Inside, the pipeline has a new scheduler, no progress bar, and a denoiser in evaluation mode."""
    scheduler, shown = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    denoiser = denoiser_of(pipeline)
    pipeline.scheduler = _scheduler(scheduler, sampling.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with unchanged(denoiser), _eager(denoiser), warnings.catch_warnings():
            # diffusers' Euler schedulers convert tensors in a way that numpy 2 calls deprecated.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"diffusers\.")
            yield
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**shown)


def _scheduler(own: Any, name: str) -> Any:
    if name == "default":
        return type(own).from_config(own.config)
    from diffusers import DDIMScheduler

    if type(own).__name__.startswith("FlowMatch"):
        raise ValueError("scheduler=ddim steps through diffusion models; a flow model needs its own: default")
    # DDIM's defaults clip the latents to [-1, 1], which is meant for pixels.
    settings: dict[str, Any] = dict(own.config) | {"clip_sample": False, "thresholding": False}
    taken = inspect.signature(DDIMScheduler.__init__).parameters
    settings["set_alpha_to_one"] = own.config.get("set_alpha_to_one", False)
    return DDIMScheduler(**{k: v for k, v in settings.items() if k in taken})


def _eager(denoiser: Any) -> contextlib.AbstractContextManager[Any]:
    """A compiled denoiser would be compiled again for every shape of a batch that sampling has."""
    if getattr(denoiser, "_compiled_call_impl", None) is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False)
