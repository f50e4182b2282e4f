"""Training the small autoencoder of the OpenMoji pipeline: reconstruction, a little KL, averaged weights.

Shapes: N pictures, 3 colours, H x W pixels in [-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from triptych.modalities.diffusion.openmoji import make_autoencoder, standardise_latents

_KL = 1e-4
_SHIFT = 4


def train_autoencoder(
    chosen: Tensor,
    others: Tensor,
    *,
    num_steps: int,
    seed: int,
    lr: float = 2e-3,
    report: Callable[[str], None] = print,
) -> AutoencoderKL:
    """Return an autoencoder trained from nothing, its latents standardised over `chosen`.

    chosen, others: pictures [N, 3, 64, 64]; a batch has five of the first and three of the second.
    """
    generator = torch.Generator().manual_seed(seed)
    model = make_autoencoder(seed=seed).train()
    average = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=max(2, num_steps), pct_start=0.05, final_div_factor=50
    )
    for step in range(num_steps):
        batch = torch.cat([_draw(chosen, 5, generator), _draw(others, 3, generator)])
        loss = autoencoder_loss(model, _vary(batch, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - min(0.99, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0:
            report(f"autoencoder: step {step + 1} of {num_steps}, loss {loss.item():.4f}")
    average.eval()
    report(f"autoencoder: {psnr(average, chosen):.2f} dB")
    standardise_latents(average, chosen)
    return average


def autoencoder_loss(model: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error, more where there is colour, of pixels and of 4 x 4 means, plus absolute error and KL.

    Without the weight on colour the small model learns white paper and black outlines first, and stays grey.
    """
    posterior = model.encode(pixels).latent_dist  # type: ignore[union-attr]
    wrong = model.decode(posterior.sample(generator)).sample - pixels  # type: ignore[union-attr]
    colour = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2
    squared = ((1 + 1.5 * colour) * wrong.square()).mean() + 0.5 * F.avg_pool2d(wrong, 4).square().mean()
    return squared + 0.05 * wrong.abs().mean() + _KL * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of -10 log10 of the squared error of pixels in [0, 1], without noise, in dB."""
    errors = []
    for part in pixels.split(32):
        again = model.decode(model.encode(part).latent_dist.mean).sample  # type: ignore[union-attr]
        errors.append(((again.clamp(-1, 1) - part) / 2).square().mean((1, 2, 3)))
    return (-10 * torch.cat(errors).log10()).mean().item()


def _draw(pixels: Tensor, num: int, generator: torch.Generator) -> Tensor:
    return pixels[torch.randint(len(pixels), (num,), generator=generator)]


def _vary(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Half mirrored, 3 of 5 shifted by up to 4 pixels of white, a quarter with colours permuted."""
    size = pixels.shape[-1]
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    out = []
    for row in F.pad(pixels, (_SHIFT,) * 4, value=1.0):
        x = y = _SHIFT
        if torch.rand((), generator=generator) < 0.6:
            y, x = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=generator).tolist()
        cut = row[:, y : y + size, x : x + size]
        if torch.rand((), generator=generator) < 0.25:
            cut = cut[torch.randperm(3, generator=generator)]
        out.append(cut)
    return torch.stack(out)
