"""What a scorer of pictures is, and the registry of them.

scorer = build_scorer({"name": "measure", "options": {"measure": "redness"}})
scores = scorer(images, prompts)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from triptych.modalities.diffusion.measures import measure_of
from triptych.training.plugs import PlugConfig, Registry


class ImageScorer(Protocol):
    """Scores of N pictures for the prompts they were drawn of: [N] float32 on the CPU, higher is better."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]; one prompt a picture."""
        ...


SCORERS: Registry[ImageScorer] = Registry("image scorer")


def build_scorer(config: PlugConfig | Mapping[str, Any]) -> ImageScorer:
    """A scorer from its name and options; ValueError naming the valid ones."""
    # They register themselves, and import the registry from here.
    from triptych.modalities.diffusion import image_scorers  # noqa: F401

    if isinstance(config, Mapping):
        if "name" not in config or set(config) - {"name", "options"}:
            raise ValueError(f"an image scorer is {{name, options}}, not {{{', '.join(map(str, config))}}}")
        config = PlugConfig(name=config["name"], options=dict(config.get("options") or {}))
    return SCORERS.build(config.name, config.options)


def scores_of_images(
    scorer: ImageScorer, images: Sequence[Image.Image], prompts: Sequence[str], name: str
) -> Tensor:
    """What a scorer says, checked: ValueError naming it unless it gives a finite number for every picture."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures need as many prompts, not {len(prompts)}")
    if not images:
        return torch.zeros(0)
    found = scorer(images, prompts).detach().to("cpu", torch.float32)
    if found.shape != (len(images),) or not found.isfinite().all():
        raise ValueError(f"{name} gave scores {found.tolist()[:8]}; expected {len(images)} finite numbers")
    return found


@SCORERS.register("measure")
@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureScorer:
    """A property that is measured, not learnt, whatever the prompt. measure: a name of `measures`."""

    measure: str

    def __post_init__(self) -> None:
        measure_of(self.measure)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]."""
        return torch.tensor(measure_of(self.measure)(images), dtype=torch.float32)


@SCORERS.register("measures")
@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuresScorer:
    """sum_m weights_m measure_m of several measures, by name, each in its own units."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights must name at least one measure")
        for name in self.weights:
            measure_of(name)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]."""
        parts = [weight * torch.tensor(measure_of(name)(images)) for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True, slots=True)
class CallableScorer:
    """Any function of pictures and prompts that gives one number each."""

    score: Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float] | Tensor]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]."""
        return torch.as_tensor(self.score(images, prompts), dtype=torch.float32)
