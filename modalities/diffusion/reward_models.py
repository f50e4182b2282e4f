"""Reward models of single denoising steps, loaded from the folders that their training wrote.

Shapes: N pictures [3, H, W] or latents [Z, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from triptych.modalities.diffusion.latent_reward import LatentReward, load_latent_reward
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.step_scorer import StepScorer, clip_pixels, load_step_scorer


class StepReward(Protocol):
    """What a path's picture or latent is worth at a step of it."""

    def __call__(
        self,
        x: Tensor,
        texts: Sequence[str],
        times: Tensor,
        conditions: Conditions,
        empty: Conditions | None,
    ) -> Tensor:
        """Scores [N], higher is better, of pictures in [-1, 1] or latents [N, *] at times [N].

        conditions, empty: of the prompts, and of the empty one in one row, where the sampler is guided.
        """
        ...


@dataclass(frozen=True, slots=True)
class _OnPictures:
    """A step-aware preference model on decoded pictures."""

    scorer: StepScorer
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, x: Tensor, texts: Sequence[str], times: Tensor, conditions: Conditions, empty: Conditions | None
    ) -> Tensor:
        pixels = clip_pixels(x.to(self.device), self.scorer.image_size)
        return self.scorer.score(pixels, texts, times.to(self.device))


@dataclass(frozen=True, slots=True)
class _OnLatents:
    """A latent reward model."""

    model: LatentReward
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, x: Tensor, texts: Sequence[str], times: Tensor, conditions: Conditions, empty: Conditions | None
    ) -> Tensor:
        guided = self.model.guidance > 1
        if guided and empty is None:
            raise ValueError(
                "the latent reward is guided, and the sampler has no empty prompt: guide it, too"
            )
        own = empty.to(self.device) if guided and empty is not None else None
        on = (x.to(self.device), times.to(self.device), conditions.to(self.device))
        return self.model.score(*on, own)


def load_reward(kind: Literal["step", "latent"], folder: Path, *, device: torch.device) -> StepReward:
    """The reward model of a folder, on the device; ValueError where it holds none of this kind."""
    if kind == "step":
        return _OnPictures(load_step_scorer(folder).to(device), device)
    return _OnLatents(load_latent_reward(folder).to(device), device)
