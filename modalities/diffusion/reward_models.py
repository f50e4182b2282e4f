"""Reward models of single denoising steps, loaded from the folders that their training wrote.

Shapes: N pictures [3, H, W] or latents [Z, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from triptych.modalities.diffusion.policy import Conditions


class StepReward(Protocol):
    """What a path's picture or latent is worth at a step of it."""

    def __call__(self, x: Tensor, texts: Sequence[str], times: Tensor, conditions: Conditions) -> Tensor:
        """Scores [N], higher is better, of pictures in [-1, 1] or latents [N, *] at times [N]."""
        ...


def load_reward(kind: Literal["step", "latent"], folder: Path, *, device: torch.device) -> StepReward:
    """The reward model of a folder: `StepScorer` for pictures, `LatentReward` for latents."""
    raise NotImplementedError
