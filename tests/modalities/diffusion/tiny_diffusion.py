"""Tiny diffusion pipelines of the real diffusers and transformers classes, seeded, with their own tokenizer.

VAE factor 4: images of 32 pixels are latents of 4 x 8 x 8 (SD3: 16 x 8 x 8). Under 0.3M parameters each.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PIXELS = 32
LATENT = 8
MAX_TOKENS = 16
FIRST_WIDTH, SECOND_WIDTH = 16, 24  # of the text encoders; an SDXL-class UNet attends to both, 40 wide
PROJECTION = 24
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = ("r e", "re d</w>", "b l", "c a", "ca t</w>", "d o", "do g</w>")
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def tokenizer_files() -> Path:
    """A folder with vocab.json and merges.txt of a small CLIP vocabulary: letters, digits, a few merges."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-clip-"))
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{c}</w>" for c in letters] + ["".join(m.split(" ")) for m in _MERGES]
    vocab = {word: index for index, word in enumerate([*words, _START, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES]) + "\n", "utf-8")
    return folder


def tokenizer(pad: str = _END) -> CLIPTokenizer:
    """A CLIPTokenizer of 16 tokens at most; SDXL's second one pads with '!', like OpenCLIP's."""
    files = tokenizer_files()
    return CLIPTokenizer(
        str(files / "vocab.json"),
        str(files / "merges.txt"),
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=pad,
        model_max_length=MAX_TOKENS,
    )


def text_config(width: int, *, projection: int = PROJECTION) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def tiny_vae(channels: int = 4, *, shift: float | None = None, scaling: float = 0.13025) -> AutoencoderKL:
    """An AutoencoderKL of factor 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def tiny_unet(cross_attention: int, **options: Any) -> UNet2DConditionModel:
    """A UNet of two levels, attention in the second, as both SD1.5 and SDXL have it."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=cross_attention,
        attention_head_dim=2,
        **options,
    )


def tiny_sdxl(seed: int = 0, *, euler: bool = False) -> StableDiffusionXLPipeline:
    """Two text encoders, time ids, linear projections.

    euler: SDXL's own scheduler, which warns under numpy 2 when it samples; otherwise DDIM.
    """
    made = EulerDiscreteScheduler if euler else DDIMScheduler
    options = {} if euler else {"clip_sample": False, "set_alpha_to_one": False}
    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config(FIRST_WIDTH)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH)).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad="!"),
        unet=tiny_unet(
            FIRST_WIDTH + SECOND_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + PROJECTION,
        ),
        scheduler=made(**_BETAS, **options, timestep_spacing="leading", steps_offset=1),
    )


def tiny_sd15(seed: int = 0) -> StableDiffusionPipeline:
    """One text encoder, no added conditions, DDIM scheduler, no safety checker."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=tiny_vae(scaling=0.18215),
        text_encoder=CLIPTextModel(text_config(FIRST_WIDTH)).eval(),
        tokenizer=tokenizer(),
        unet=tiny_unet(FIRST_WIDTH),
        scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Two CLIP encoders, no T5; a flow-matching transformer that attends to 48 wide embeddings."""
    torch.manual_seed(seed)
    joint = 48  # at least the two CLIP widths together: the pipeline pads up to it
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=LATENT,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=joint,
            caption_projection_dim=32,
            pooled_projection_dim=2 * PROJECTION,
            out_channels=16,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(16, shift=0.0609, scaling=1.5305),
        text_encoder=CLIPTextModelWithProjection(text_config(FIRST_WIDTH)).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH)).eval(),
        tokenizer_2=tokenizer(pad="!"),
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


TINY = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "sd3": tiny_sd3}


def write_pipeline(pipe: Any, folder: Path, **options: Any) -> Path:
    """The pipeline as a folder of safetensors, as `from_pretrained` reads it."""
    pipe.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def denoiser_inputs(family: str, *, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Random arguments for a call of the tiny UNet or transformer of a family."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=draw)

    if family == "sd3":
        return {
            "hidden_states": normal(16, LATENT, LATENT),
            "timestep": torch.tensor([400.0] * batch),
            "encoder_hidden_states": normal(MAX_TOKENS, 48),
            "pooled_projections": normal(2 * PROJECTION),
        }
    width = FIRST_WIDTH + SECOND_WIDTH if family == "sdxl" else FIRST_WIDTH
    found: dict[str, Any] = {
        "sample": normal(4, LATENT, LATENT),
        "timestep": torch.tensor([400] * batch),
        "encoder_hidden_states": normal(MAX_TOKENS, width),
    }
    if family == "sdxl":
        ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]] * batch, dtype=torch.float32)
        found["added_cond_kwargs"] = {"text_embeds": normal(PROJECTION), "time_ids": ids}
    return found
