"""The settings that every training run has; each modality adds its own.

These classes have no slots: jsonargparse reads the attributes of defaults through `vars`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from triptych.objectives import Term, Terms, build


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """A regulariser: an objective's name, its options, its weight and the reference it reads."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    reference: Literal["frozen", "stage", "ema", "sibling", "none"] = "frozen"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The main objective and its regularisers (`triptych objectives` lists the names)."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: Literal["frozen", "stage", "ema", "sibling", "none"] = "frozen"
    regularizers: list[TermConfig] = field(default_factory=list)

    def terms(self) -> Terms:
        """The built objective; ValueError for anything that it cannot mean."""
        main = Term(build(self.name, **self.options), 1.0, self.reference)
        rest = (Term(build(r.name, **r.options), r.weight, r.reference) for r in self.regularizers)
        return Terms((main, *rest))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    batch_size: samples of one optimizer step over all ranks; micro_batch_size: samples of one forward pass
    on one rank. warmup: share of the steps with rising learning rate. num_steps, if given, replaces
    num_epochs. precision 'bf16' runs the forward pass in bfloat16 autocast. average: decay of an exponential
    moving average of the trained weights, which is then evaluated and exported in their place (0: none).
    """

    lr: float
    batch_size: int
    micro_batch_size: int
    num_epochs: float = 1.0
    num_steps: int | None = None
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.1
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = 3
    average: float = 0.0

    def __post_init__(self) -> None:
        positive = {
            k: getattr(self, k) for k in ("lr", "batch_size", "micro_batch_size", "eps", "max_grad_norm")
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"optim.{name}={value} must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup={self.warmup} is a share of the steps and must be in [0, 1)")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"optim.num_steps={self.num_steps} must be at least 1")
        if not 0 < self.num_epochs < math.inf:
            raise ValueError(f"optim.num_epochs={self.num_epochs} must be positive and finite")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio={self.min_lr_ratio} is a share of lr and must be in [0, 1]")
        if not 0 <= self.average < 1:
            raise ValueError(f"optim.average={self.average} is a decay and must be in [0, 1); 0 is none")
        for name in ("weight_decay", "max_skips"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be 0 or positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how often, and what it starts from.

    resume: continue from the newest checkpoint in output_dir that verifies. resume_override: names of
    settings that may differ from the checkpoint's ('all' for any).
    """

    output_dir: str
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    resume: bool = True
    resume_override: list[str] = field(default_factory=list)
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name}={getattr(self, name)} must be 0 (never) or positive")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation. micro_batch_size changes speed and memory, not results.

    Objectives with a statistic of the batch, such as kto's baseline, take it over a micro-batch.
    """

    micro_batch_size: int = 8

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"evaluation.micro_batch_size={self.micro_batch_size} must be at least 1")


def learning_rate(config: OptimConfig, *, step: int, num_steps: int) -> float:
    """Rate of step 0 <= step < num_steps: linear rise over the warm-up, then the schedule to min_lr_ratio.

    The first step of a warm-up of w steps has lr / w, its last one lr. Step num_steps would have the ratio.
    """
    warmup = math.ceil(round(config.warmup * num_steps, 9))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * shape[config.schedule])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names: {'optim': {'lr': 1}} -> {'optim.lr': 1}."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
