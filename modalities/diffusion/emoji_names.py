"""Naming emojis: a small classifier over the captions, to see whether generated pictures show what was asked.

It learns from the real drawings alone, moved, blurred, noised, recoloured and sent through the autoencoder;
it never sees a generated picture, so the rate at which it names those is a measurement.

Shapes: N pictures, 3 colours, H x W = 64 x 64 pixels in [-1, 1], L captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.modalities.diffusion.openmoji import SIZE, Emoji, pixels_of
from triptych.training.atomic import write_json

WIDTHS = (24, 48, 96, 128)
FORMAT = "emoji-names-1"
_POOL = 4  # reconstructions kept of every emoji


@dataclass(frozen=True, slots=True, eq=False)
class Namer:
    """A trained classifier; `captions[i]` belongs to its output i."""

    model: nn.Module
    captions: tuple[str, ...]

    def name(self, images: Sequence[Image.Image], top: int = 5) -> list[list[str]]:
        """The `top` most likely captions of every picture, best first; pictures are resized to 64 x 64."""
        if not 1 <= top <= len(self.captions):
            raise ValueError(f"top={top} must be 1 to {len(self.captions)}, the number of captions")
        if not images:
            return []
        sized = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
        best = self.scores(pixels_of(sized)).topk(top).indices
        return [[self.captions[i] for i in row] for row in best.tolist()]

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> Tensor:
        """Logits [N, L] of pixels [N, 3, 64, 64]."""
        return torch.cat([self.model(part) for part in pixels.split(256)])


def make_net(num_captions: int, *, seed: int) -> nn.Sequential:
    """Untrained classifier: [N, 3, 64, 64] to logits [N, L]; four strided convolutions and one more."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    layers += [nn.Conv2d(before, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Flatten()]
    side = SIZE // 2 ** len(WIDTHS)
    layers += [nn.Dropout(0.2), nn.Linear(48 * side * side, 96), nn.ReLU(), nn.Linear(96, num_captions)]
    return nn.Sequential(*layers)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved (6 pixels), scaled, turned by 12 degrees, mirrored, blurred, noised, recoloured."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), *shape, generator=generator)

    angle, scale = draw(-0.21, 0.21), draw(0.87, 1.18)
    mirror = torch.where(draw(0, 1) < 0.25, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    x, y = draw(-6, 6) * 2 / SIZE, draw(-6, 6) * 2 / SIZE
    rows = torch.stack((cos * mirror, -sin, x, sin * mirror, cos, y), 1).view(-1, 2, 3)
    where = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pixels, where, align_corners=False)  # white comes in at the edges
    share = draw(-1, 1, 1, 1, 1).clamp(min=0)
    moved = moved + share * (_blurred(moved) - moved)
    moved = moved * draw(0.88, 1.08, 3, 1, 1) + draw(-0.1, 0.1, 1, 1, 1)
    level = draw(-0.1, 0.15, 1, 1, 1).clamp(min=0)
    return (moved + level * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)


def _blurred(pixels: Tensor) -> Tensor:
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


@torch.no_grad()
def reconstruct(autoencoder: Any, pixels: Tensor, *, noise: float, generator: torch.Generator) -> Tensor:
    """Pictures through the autoencoder, with noise of `noise` standard deviations on their latents."""
    parts = []
    for part in pixels.split(32):
        latents = autoencoder.encode(part).latent_dist.mean
        step = noise / autoencoder.config.scaling_factor
        latents = latents + step * torch.randn(latents.shape, generator=generator)
        parts.append(autoencoder.decode(latents).sample.clamp(-1, 1))
    return torch.cat(parts)


def train_namer(
    emojis: Sequence[Emoji],
    autoencoder: Any,
    *,
    num_steps: int,
    seed: int,
    batch_size: int = 64,
    lr: float = 3e-3,
    report: Callable[[str], None] = print,
) -> Namer:
    """Train a classifier of the emojis from nothing; every second picture was through the autoencoder."""
    if num_steps < 10:
        raise ValueError(f"num_steps={num_steps} must be at least 10, for its schedule of learning rates")
    generator = torch.Generator().manual_seed(seed)
    real = pixels_of([emoji.image for emoji in emojis])
    again = [reconstruct(autoencoder, real, noise=0.0, generator=generator)]
    for _ in range(_POOL - 1):
        again.append(reconstruct(autoencoder, augment(real, generator), noise=0.15, generator=generator))
    pool = torch.stack(again)
    net = make_net(len(emojis), seed=seed).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=num_steps, pct_start=min(0.5, 2 / num_steps + 0.1)
    )
    for step in range(num_steps):
        labels = torch.randint(len(emojis), (batch_size,), generator=generator)
        which = torch.randint(len(pool), (batch_size,), generator=generator)
        fresh = torch.rand(batch_size, generator=generator) < 0.5
        pixels = torch.where(fresh[:, None, None, None], real[labels], pool[which, labels])
        loss = F.cross_entropy(net(augment(pixels, generator)), labels, label_smoothing=0.05)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            report(f"classifier: step {step + 1} of {num_steps}, loss {loss.item():.3f}")
    return Namer(net.eval().requires_grad_(False), tuple(emoji.caption for emoji in emojis))


def accuracy(
    namer: Namer, emojis: Sequence[Emoji], autoencoder: Any, *, seed: int, draws: int = 4
) -> dict[str, float]:
    """Share of emojis named right: as drawn, freshly moved and noised, reconstructed, and both."""
    generator = torch.Generator().manual_seed(seed)
    real = pixels_of([emoji.image for emoji in emojis])
    moved = torch.cat([augment(real, generator) for _ in range(draws)])
    kinds = {
        "drawn": real,
        "augmented": moved,
        "reconstructed": reconstruct(autoencoder, real, noise=0.0, generator=generator),
        "augmented and reconstructed": reconstruct(autoencoder, moved, noise=0.0, generator=generator),
    }
    index = {caption: i for i, caption in enumerate(namer.captions)}
    labels = torch.tensor([index[emoji.caption] for emoji in emojis])
    out = {}
    for kind, pixels in kinds.items():
        right = (
            namer.scores(pixels).topk(min(5, len(index))).indices
            == labels.repeat(len(pixels) // len(real))[:, None]
        )
        out[f"{kind}, top 1"] = right[:, 0].float().mean().item()
        out[f"{kind}, top 5"] = right.any(1).float().mean().item()
    return out


def save_namer(namer: Namer, folder: Path) -> None:
    """Write model.safetensors (float16) and config.json with the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.half() if t.is_floating_point() else t for name, t in namer.model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"format": FORMAT, "captions": list(namer.captions)})


def load_namer(folder: Path) -> Namer:
    """Read a classifier that `save_namer` wrote; ValueError for another kind of folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format={config.get('format')!r}; valid: {FORMAT!r}")
    net = make_net(len(config["captions"]), seed=0)
    net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return Namer(net.eval().requires_grad_(False), tuple(config["captions"]))
