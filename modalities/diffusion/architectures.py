"""Published architectures as configurations, for planning and for tests without weights.

Everything is built on the meta device: shapes and dtypes, no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.folders import Family, check_index

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD3_MEDIUM_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD3_VAE = SD_VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A text encoder: its class in transformers, its configuration and how many tokens it is given."""

    kind: str
    config: dict[str, Any]
    tokens: int = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a pipeline is made of. resolution: its own, in pixels."""

    family: Family
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[TextEncoder, ...]
    resolution: int

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae["latent_channels"])

    @property
    def tokens(self) -> int:
        """Prompt tokens that the denoiser attends to: CLIP's, and behind them T5's."""
        of_clip = max(t.tokens for t in self.text if t.kind != "T5EncoderModel")
        return of_clip + sum(t.tokens for t in self.text if t.kind == "T5EncoderModel")


_L, _G = TextEncoder(kind="CLIPTextModel", config=CLIP_L), "CLIPTextModelWithProjection"
PUBLISHED = {
    "sdxl": Architecture(
        family="sdxl",
        denoiser=SDXL_UNET,
        vae=SD_VAE,
        text=(_L, TextEncoder(kind=_G, config=CLIP_BIG_G)),
        resolution=1024,
    ),
    "sd15": Architecture(family="sd15", denoiser=SD15_UNET, vae=SD_VAE, text=(_L,), resolution=512),
    "sd3-medium": Architecture(
        family="sd3",
        denoiser=SD3_MEDIUM_TRANSFORMER,
        vae=SD3_VAE,
        text=(
            TextEncoder(kind=_G, config=CLIP_L),
            TextEncoder(kind=_G, config=CLIP_BIG_G),
            TextEncoder(kind="T5EncoderModel", config=T5_XXL, tokens=256),
        ),
        resolution=1024,
    ),
}


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a pipeline's folder; its configurations are read, not its weights."""

    def read(*names: str) -> dict[str, Any]:
        path = folder.joinpath(*names)
        if not path.is_file():
            raise ValueError(f"--model={folder}: no {'/'.join(names)}")
        found = json.loads(path.read_text("utf-8"))
        return {key: value for key, value in found.items() if not key.startswith("_") or key == "_class_name"}

    index = read("model_index.json")
    kind = check_index(index, where=str(folder))
    denoiser = read("transformer" if kind == "sd3" else "unet", "config.json")
    vae = read("vae", "config.json")
    parts = (name for name, value in index.items() if name.startswith("text_encoder") and value[0])
    encoders = []
    for name in parts:
        config = read(name, "config.json")
        tokens = config.get("max_position_embeddings", 256)
        encoders.append(TextEncoder(kind=index[name][1], config=config, tokens=tokens))
    side = denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return Architecture(family=kind, denoiser=denoiser, vae=vae, text=tuple(encoders), resolution=side)


def build_denoiser(made: Architecture, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet or transformer on the meta device."""
    import diffusers

    kind: Any = diffusers.SD3Transformer2DModel if made.family == "sd3" else diffusers.UNet2DConditionModel
    with torch.device("meta"), _default(dtype):
        return kind.from_config(made.denoiser)


def build_vae(made: Architecture, dtype: torch.dtype = torch.float32) -> Any:
    """The VAE on the meta device."""
    import diffusers

    kind: Any = diffusers.AutoencoderKL
    with torch.device("meta"), _default(dtype):
        return kind.from_config(made.vae)


def build_text_encoder(encoder: TextEncoder, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The text encoder on the meta device."""
    import transformers

    configs = {"T5EncoderModel": transformers.T5Config}
    config = configs.get(encoder.kind, transformers.CLIPTextConfig)(**encoder.config)
    with torch.device("meta"), _default(dtype):
        return getattr(transformers, encoder.kind)(config)


def inputs_of(
    made: Architecture,
    *,
    rows: int,
    resolution: int,
    dtype: torch.dtype = torch.float32,
    device: str = "meta",
) -> dict[str, Any]:
    """Arguments of a call of the denoiser, without meaningful values."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=kind, device=device)

    if resolution % made.factor:
        raise ValueError(f"--resolution={resolution} is not a multiple of {made.factor}, the VAE's factor")
    side = resolution // made.factor
    latents = empty(made.latent_channels, side, side)
    times = empty(kind=torch.float32)
    config = made.denoiser
    if made.family == "sd3":
        return {
            "hidden_states": latents,
            "timestep": times,
            "encoder_hidden_states": empty(made.tokens, config["joint_attention_dim"]),
            "pooled_projections": empty(config["pooled_projection_dim"]),
        }
    found: dict[str, Any] = {"sample": latents, "timestep": times}
    found["encoder_hidden_states"] = empty(made.tokens, config["cross_attention_dim"])
    if made.family == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        ids = empty(6, kind=torch.float32)
        found["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": ids}
    return found


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
