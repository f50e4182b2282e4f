"""How long a run takes and what memory it needs, from what one step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from triptych.modalities.diffusion.architectures import Architecture
from triptych.modalities.diffusion.simulation import (
    Setup,
    encode_flops,
    encode_peak,
    encoder_bytes,
    forward_flops,
    simulate,
    text_flops,
)
from triptych.objectives import ListLogLik, LogLik, PairLogLik, names, spec

Reference = Literal["none", "adapter_off", "frozen_copy", "cached"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """An accelerator: dense bfloat16 TFLOP/s of its data sheet, and memory in GB (1e9 bytes)."""

    teraflops: float
    gigabytes: float


GPUS = {
    "a100": Gpu(teraflops=312, gigabytes=80),
    "a100-40": Gpu(teraflops=312, gigabytes=40),
    "h100": Gpu(teraflops=989, gigabytes=80),
    "h200": Gpu(teraflops=989, gigabytes=141),
    "b200": Gpu(teraflops=2250, gigabytes=180),
    "l40s": Gpu(teraflops=362, gigabytes=48),
    "a6000": Gpu(teraflops=155, gigabytes=48),
    "4090": Gpu(teraflops=165, gigabytes=24),
    "3090": Gpu(teraflops=71, gigabytes=24),
    "mi250x": Gpu(teraflops=383, gigabytes=128),
    "mi300x": Gpu(teraflops=1307, gigabytes=192),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What an objective asks for: candidates of a context, and a reference or none."""

    candidates: int
    needs_reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one context: a prompt with all of its images."""

    policy: float
    reference: float
    vae: float
    text: float

    @property
    def total(self) -> float:
        """Of the run's own steps."""
        return self.policy + self.reference + self.vae + self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device. peak: the most at once; activations are gone when the update takes place.

    buckets: what DistributedDataParallel gathers gradients in.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    reference: int
    buckets: int
    encoders: int
    peak: int


def find_method(name: str, candidates: int) -> Method:
    """Candidates of a context and the reference that a method needs; candidates counts for lists only.

    ValueError for a name that is unknown or has no offline form for images.
    """
    found = spec(name)
    if "diffusion" not in found.modalities or found.on_policy:
        valid = [n for n in names() if "diffusion" in spec(n).modalities and not spec(n).on_policy]
        raise ValueError(f"--method={name} does not train on recorded images; valid: {', '.join(valid)}")
    takes = found.takes
    if ListLogLik in takes and LogLik not in takes:
        number = candidates
    elif PairLogLik in takes and LogLik not in takes:
        number = 2
    else:
        number = 1
    return Method(candidates=number, needs_reference=found.needs_reference)


def check_reference(reference: str, method: Method, setup: Setup) -> Reference:
    """A reference that fits; ValueError for one that cannot be had or that would not be read."""
    if reference not in get_args(Reference):
        raise ValueError(f"--reference={reference}; valid: {', '.join(get_args(Reference))}")
    if not method.needs_reference and reference != "none":
        raise ValueError(f"--reference={reference}: the method reads none")
    if method.needs_reference and reference == "none":
        raise ValueError("--reference=none, but the method needs one: adapter_off, frozen_copy or cached")
    if reference == "adapter_off" and setup.lora is None:
        raise ValueError("--reference=adapter_off needs LoRA; use frozen_copy or cached")
    return reference  # type: ignore[return-value]


def flops_of(
    made: Architecture, setup: Setup, method: Method, *, reference: Reference, offline: bool
) -> Flops:
    """FLOPs of one context. A cached reference and offline encoding cost nothing in the steps."""
    k = method.candidates
    live = reference in ("adapter_off", "frozen_copy")
    return Flops(
        policy=k * simulate(made, setup).policy,
        reference=k * forward_flops(made, setup.resolution) if live else 0.0,
        vae=0.0 if offline else k * encode_flops(made, setup.resolution),
        text=0.0 if offline else text_flops(made),
    )


def memory_of(made: Architecture, setup: Setup, *, reference: Reference, offline: bool, gpus: int) -> Memory:
    """Peak memory of one device. Encoders in the process are a float32 VAE and bfloat16 text encoders."""
    step = simulate(made, setup)
    vae, text = torch.float32, torch.bfloat16
    sizes = {"rows": setup.rows, "resolution": setup.resolution}
    copy = step.weights if reference == "frozen_copy" else 0
    buckets = step.gradients if gpus > 1 else 0
    encoders = 0 if offline else encoder_bytes(made, vae=vae, text=text)
    # Images are encoded while there are neither gradients nor activations.
    encoding = 0 if offline else step.weights + step.moments + encode_peak(made, **sizes, dtype=vae)
    return Memory(
        weights=step.weights,
        gradients=step.gradients,
        moments=step.moments,
        activations=step.activations,
        reference=copy,
        buckets=buckets,
        encoders=encoders,
        peak=max(step.peak, encoding) + copy + buckets + encoders,
    )


def days_of(flops: float, gpu: Gpu, *, gpus: int, utilisation: float, float32: bool = False) -> float:
    """Days for so many FLOPs at a share of the data sheet's rate; float32 (TF32) runs at half of it."""
    rate = gpu.teraflops * 1e12 * utilisation * gpus / (2 if float32 else 1)
    return flops / rate / 86400
