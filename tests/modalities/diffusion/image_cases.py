"""Contexts of a tiny SDXL-class model, made from numbers alone."""

import torch
from peft import LoraConfig
from tiny_diffusion import tiny_sdxl

from triptych.modalities.diffusion.likelihood import Example
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.schedule import schedule_of
from triptych.training.order import Draw


def sdxl(*, lora=True, trained=False):
    """A tiny SDXL UNet as a policy, and its noise schedule; `trained`: its adapter differs from zero."""
    pipeline = tiny_sdxl()
    if lora:
        pipeline.unet.requires_grad_(False)
        torch.manual_seed(7)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=not trained)
        pipeline.unet.add_adapter(config)
    return Denoiser(pipeline.unet), schedule_of(pipeline.scheduler)


def example(number=0, *, kind="pair", num=2, height=8, width=8, relevance=None, **fields):
    """A context with `num` images of its own numbers."""
    generator = torch.Generator().manual_seed(number)
    defaults = {
        "latents": torch.randn(num, 4, height, width, generator=generator),
        "embeds": torch.randn(7, 40, generator=generator),
        "pooled": torch.randn(24, generator=generator),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * num),
    }
    return Example(
        id=f"x{number}",
        source=f"data[{number}]",
        kind=kind,
        relevance=tuple(float(num - k) for k in range(num)) if relevance is None else relevance,
        keys=tuple(f"x{number} image {k}" for k in range(num)),
        **(defaults | fields),
    )


def draws(num, *, epoch=0):
    """One draw an example, as a run would make them."""
    return [Draw(i, epoch, 1000 * epoch + i, epoch * num + i) for i in range(num)]
