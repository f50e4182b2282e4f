"""What turns images into latents and prompts into embeddings, as the pipelines do it, bit for bit.

Shapes: N images of one size H x W, Z latent channels, h x w latent sizes; M prompts, L tokens, D and P widths
of the embeddings and of the pooled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.folders import FAMILIES, Family
from triptych.modalities.diffusion.model import (
    DTYPES,
    ModelConfig,
    family,
    load_text_encoders,
    load_vae,
    locate,
)
from triptych.modalities.diffusion.shards import EncodedPrompt
from triptych.training.quarantine import DataError
from triptych.training.references import content_hash

NOT_FINITE = "became inf or nan in the VAE"


@dataclass(frozen=True, slots=True)
class Latent:
    """One image's posterior, scaled as the denoiser takes it: mean and log variance, [Z, h, w] float32."""

    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True, slots=True)
class VaeEncoder:
    """An AutoencoderKL in float32 or bfloat16, never under autocast.

    ValueError for one in float16: activations of SDXL's VAE pass 65,504 there, and the images become NaN.
    """

    vae: Any

    def __post_init__(self) -> None:
        if self.vae.dtype == torch.float16:
            raise ValueError(
                "a VAE in float16 overflows (SDXL's gives NaN); use float32, or bfloat16 for half the memory"
            )

    @property
    def factor(self) -> int:
        """Pixels to a latent, in each direction."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels_N3HW: Tensor, sources: Sequence[str]) -> list[Latent | DataError]:
        """The posterior of each image; a DataError that names its source for one that is not finite.

        mean = (m - shift_factor) * scaling_factor, logvar = v + 2 log scaling_factor (with latents_mean and
        latents_std, (m - mean) * scaling_factor / std), in float32 from the VAE's own dtype.
        """
        with self._full_precision():
            posterior = self.vae.encode(pixels_N3HW.to(self.vae.device, self.vae.dtype)).latent_dist
        shift, gain = self._affine()
        mean_NZhw = ((posterior.mean.float() - shift) * gain).cpu()
        logvar_NZhw = (posterior.logvar.float() + 2 * gain.log()).cpu()
        found: list[Latent | DataError] = []
        for mean, logvar, source in zip(mean_NZhw, logvar_NZhw, sources, strict=True):
            if bool(mean.isfinite().all()) and bool(logvar.isfinite().all()):
                found.append(Latent(mean, logvar))
            else:
                remedy = "look at the image; if it looks right, use model.vae_dtype=float32"
                found.append(DataError(NOT_FINITE, source=source, remedy=remedy))
        return found

    @torch.no_grad()
    def decode(self, latents_NZhw: Tensor, *, batch_size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Images of scaled latents, [N, 3, H, W] on the CPU: uint8, or of a float dtype in [0, 1]."""
        shift, gain = self._affine()
        images: list[Tensor] = []
        for part in latents_NZhw.split(batch_size):
            raw = part.to(self.vae.device, torch.float32) / gain + shift
            with self._full_precision():
                decoded = self.vae.decode(raw.to(self.vae.dtype)).sample
            shown = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()
            images.append((shown * 255).round().to(dtype) if dtype == torch.uint8 else shown.to(dtype))
        return torch.cat(images)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Shift and gain of each channel, [1, Z or 1, 1, 1]: scaled = (raw - shift) * gain."""
        config = self.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
        pair = mean, [config.scaling_factor / s for s in std]
        on = {"dtype": torch.float32, "device": self.vae.device}
        first, second = (torch.tensor(values, **on).reshape(1, -1, 1, 1) for values in pair)
        return first, second

    def _full_precision(self) -> Any:
        # Autocast would take the convolutions of a float32 VAE back to float16.
        return torch.autocast(self.vae.device.type, enabled=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A pipeline's text encoders. __call__ equals its `encode_prompt` for prompts one by one.

    parts: tokenizers and encoders by the pipeline's names, as `model.load_text_encoders` gives them.
    joint: width of SD3's embeddings, which its CLIP embeddings are padded to; max_t5_tokens: length of its T5
    part, which is zeros where the pipeline has no T5.
    """

    family: Family
    parts: Mapping[str, Any]
    joint: int | None = None
    max_t5_tokens: int = 256

    def __post_init__(self) -> None:
        if self.family == "sd3" and self.joint is None:
            raise ValueError("an SD3 text encoder needs the width of the transformer's embeddings (joint)")

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The encoders that there are, by the pipeline's names."""
        return {k: v for k, v in self.parts.items() if k.startswith("text_encoder") and v is not None}

    def encode(self, prompts: Sequence[str], *, batch_size: int) -> dict[str, EncodedPrompt]:
        """Embeddings of each different prompt, in order of first appearance, on the CPU.

        ValueError where they are not finite, which is a matter of the encoders' dtype and not of a prompt.
        """
        found: dict[str, EncodedPrompt] = {}
        waiting = iter(dict.fromkeys(prompts))
        while batch := list(islice(waiting, batch_size)):
            embeds_MLD, pooled_MP = self(batch)
            for i, prompt in enumerate(batch):
                pooled = None if pooled_MP is None else pooled_MP[i].cpu()
                found[prompt] = EncodedPrompt(embeds_MLD[i].cpu(), pooled)
                if not all(bool(t.isfinite().all()) for t in (embeds_MLD[i], pooled) if t is not None):
                    raise ValueError(
                        f"the text encoders give inf or nan for the prompt {prompt[:80]!r}; "
                        "use model.text_dtype=float32 or bfloat16"
                    )
        return found

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(embeds [M, L, D], pooled [M, P] or None)."""
        first: Any = next(iter(self.modules.values()))
        with torch.autocast(first.device.type, enabled=False):
            return getattr(self, f"_{self.family}")(list(prompts))

    def num_cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than CLIP's tokenizer lets through."""
        tokenizer = self.parts["tokenizer"] or self.parts["tokenizer_2"]
        if not prompts:
            return 0
        lengths = (len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids)
        return sum(n > tokenizer.model_max_length for n in lengths)

    def _sd15(self, prompts: list[str]) -> tuple[Tensor, None]:
        """The last layer, after the final norm."""
        encoder, tokens = self.parts["text_encoder"], self._tokens(prompts, "")
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(tokens.input_ids, attention_mask=mask)[0], None

    def _sdxl(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The penultimate layers of both, side by side; pooled is the second's projection."""
        ends = [end for end in ("", "_2") if self.parts[f"text_encoder{end}"] is not None]
        layers, pooled = zip(*(self._clip(prompts, end) for end in ends), strict=True)
        return torch.cat(layers, dim=-1), pooled[-1]

    def _sd3(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Both CLIP embeddings side by side, padded with zeros, and then T5's tokens."""
        layers, pooled = zip(*(self._clip(prompts, end) for end in ("", "_2")), strict=True)
        clip_MLD = torch.cat(layers, dim=-1)
        t5_MLD = self._t5(prompts)
        padded = nn.functional.pad(clip_MLD, (0, t5_MLD.shape[-1] - clip_MLD.shape[-1]))
        return torch.cat([padded, t5_MLD], dim=-2), torch.cat(pooled, dim=-1)

    def _clip(self, prompts: list[str], end: str) -> tuple[Tensor, Tensor]:
        encoder = self.parts[f"text_encoder{end}"]
        # SD3's pipeline takes the first tokenizer's length for both.
        length = self.parts["tokenizer"].model_max_length if self.family == "sd3" else None
        ids = self._tokens(prompts, end, length).input_ids
        found = encoder(ids, output_hidden_states=True)
        return found.hidden_states[-2], found[0]

    def _t5(self, prompts: list[str]) -> Tensor:
        encoder = self.parts["text_encoder_3"]
        if encoder is None:
            first = self.parts["text_encoder"]
            shape = len(prompts), self.max_t5_tokens, self.joint or 0
            return torch.zeros(shape, device=first.device, dtype=first.dtype)
        return encoder(self._tokens(prompts, "_3", self.max_t5_tokens).input_ids)[0]

    def _tokens(self, prompts: list[str], end: str, length: int | None = None) -> Any:
        tokenizer, encoder = self.parts[f"tokenizer{end}"], self.parts[f"text_encoder{end}"]
        return tokenizer(
            prompts,
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which models encode.

    name_or_path, revision, variant: the pipeline, as for training. vae: a folder or hub name of another VAE
    for the same latents. text_dtype: of the text encoders; float16 halves their time on a GPU.
    max_t5_tokens: length of SD3's T5 part.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    text_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_t5_tokens: int = 256

    def __post_init__(self) -> None:
        if self.vae_dtype == "float16":
            raise ValueError(
                "model.vae_dtype=float16: SDXL's VAE overflows there and gives NaN; use float32 or bfloat16"
            )
        if not 1 <= self.max_t5_tokens <= 512:
            raise ValueError(f"model.max_t5_tokens={self.max_t5_tokens} must be between 1 and 512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """The models of one encoding. resolution: side in pixels of the images that the denoiser was made for.

    facts: family, classes, scaling and content hashes, which name them for good.
    """

    vae: VaeEncoder
    text: TextEncoder
    resolution: int
    facts: dict[str, Any]


def load_encoders(config: EncoderConfig, *, root: Path, device: torch.device) -> Encoders:
    """The VAE and the text encoders of a pipeline, and nothing else of it. root: see `model.locate`."""
    named = ModelConfig(name_or_path=config.name_or_path, revision=config.revision, variant=config.variant)
    source = locate(named, root=root)
    files = {"revision": config.revision, "variant": config.variant}
    kind = family(source, revision=config.revision)
    dtype = DTYPES[config.vae_dtype]
    vae = load_vae(source, dtype, **files) if config.vae is None else _other_vae(config.vae, dtype)
    parts = load_text_encoders(source, DTYPES[config.text_dtype], **files)
    denoiser = _denoiser_config(source, kind, config.revision)
    text = TextEncoder(
        family=kind,
        parts=parts,
        joint=denoiser.get("joint_attention_dim") if kind == "sd3" else None,
        max_t5_tokens=config.max_t5_tokens,
    )
    encoder = VaeEncoder(vae.to(device))
    _check_channels(encoder, denoiser["in_channels"], config)
    for module in text.modules.values():
        module.to(device)
    sample = denoiser["sample_size"]
    return Encoders(
        vae=encoder,
        text=text,
        resolution=encoder.factor * (sample if isinstance(sample, int) else max(sample)),
        facts=_facts(encoder, text),
    )


def _facts(encoder: VaeEncoder, text: TextEncoder) -> dict[str, Any]:
    settings = encoder.vae.config
    scaling = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {
        "family": text.family,
        "pipeline": next(name for name, value in FAMILIES.items() if value == text.family),
        "vae": {
            "class": type(encoder.vae).__name__,
            "hash": content_hash(encoder.vae),
            "factor": encoder.factor,
            "channels": settings.latent_channels,
            **{name: getattr(settings, name, None) for name in scaling},
        },
        "text_encoders": {
            name: {"class": type(module).__name__, "hash": content_hash(module)}
            for name, module in text.modules.items()
        },
    }


def _check_channels(encoder: VaeEncoder, wanted: int, config: EncoderConfig) -> None:
    found = encoder.vae.config.latent_channels
    if found != wanted:
        raise ValueError(
            f"model.vae={config.vae} makes latents of {found} channels, but the model takes {wanted}"
        )


def _denoiser_config(source: str, kind: Family, revision: str | None) -> dict[str, Any]:
    import diffusers

    made: Any = diffusers.SD3Transformer2DModel if kind == "sd3" else diffusers.UNet2DConditionModel
    part = "transformer" if kind == "sd3" else "unet"
    return dict(made.load_config(source, subfolder=part, revision=revision))


def _other_vae(source: str, dtype: torch.dtype) -> nn.Module:
    """A VAE that is its own folder or hub repository, frozen, from safetensors."""
    import diffusers

    made: Any = diffusers.AutoencoderKL
    try:
        model, info = made.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load model.vae={source}: {' '.join(str(error).split())[:300]}") from error
    if missing := [name for k in ("missing_keys", "mismatched_keys") for name in info.get(k, ())]:
        raise ValueError(f"model.vae={source}: its weights do not fit its configuration ({missing[0]})")
    return model.requires_grad_(False).eval()
