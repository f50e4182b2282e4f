"""How long a run takes and what memory it needs, from what one step costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from triptych.modalities.diffusion.architectures import Architecture, inputs_of
from triptych.modalities.diffusion.model import LoraConfig
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
class Job:
    """A run. contexts: pairs, lists or single images of the data set; images and prompts: distinct ones.

    reference 'cached' keeps its values from one pass before the run. offline: images and prompts are encoded
    before the run, not in every step. utilisation: share of the data sheet's rate that is reached.
    """

    setup: Setup
    method: Method
    reference: Reference
    offline: bool
    contexts: int
    images: int
    prompts: int
    epochs: float
    gpu: str
    gpus: int
    utilisation: float

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu={self.gpu}; valid: {', '.join(GPUS)}")
        flags = {"contexts": "num_pairs", "images": "num_images", "prompts": "num_prompts", "gpus": "gpus"}
        for name, flag in flags.items():
            if getattr(self, name) < 1:
                raise ValueError(f"--{flag}={getattr(self, name)} must be at least 1")
        if self.reference not in get_args(Reference):
            raise ValueError(f"--reference={self.reference}; valid: {', '.join(get_args(Reference))}")
        if not 0 < self.utilisation <= 1 or not self.epochs > 0:
            raise ValueError(
                f"--utilisation={self.utilisation} must be in (0, 1] and --epochs={self.epochs} positive"
            )
        if not self.method.needs_reference and self.reference != "none":
            raise ValueError(f"--reference={self.reference}: the method reads none")
        if self.method.needs_reference and self.reference == "none":
            raise ValueError("--reference=none: the method needs adapter_off, frozen_copy or cached")
        if self.reference == "adapter_off" and self.setup.lora is None:
            raise ValueError("--reference=adapter_off needs LoRA; use frozen_copy or cached")


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


def flops_of(made: Architecture, job: Job) -> Flops:
    """FLOPs of one context. A cached reference and offline encoding cost nothing in the steps."""
    k, resolution = job.method.candidates, job.setup.resolution
    live = job.reference in ("adapter_off", "frozen_copy")
    return Flops(
        policy=k * simulate(made, job.setup).policy,
        reference=k * forward_flops(made, resolution) if live else 0.0,
        vae=0.0 if job.offline else k * encode_flops(made, resolution),
        text=0.0 if job.offline else text_flops(made),
    )


def flops_before(made: Architecture, job: Job) -> float:
    """FLOPs before the first step, of the whole data set: encoding, and the reference's values of each epoch.

    Both are kept: the next run over the same data, seeds and base does without them.
    """
    resolution = job.setup.resolution
    total = 0.0
    if job.offline:
        total += job.images * encode_flops(made, resolution) + job.prompts * text_flops(made)
    if job.reference == "cached":
        total += job.epochs * job.contexts * job.method.candidates * forward_flops(made, resolution)
    return total


def memory_of(made: Architecture, job: Job) -> Memory:
    """Peak memory of one device. Encoders in the process are a float32 VAE and bfloat16 text encoders."""
    setup, step = job.setup, simulate(made, job.setup)
    vae, text = torch.float32, torch.bfloat16
    copy = step.weights if job.reference == "frozen_copy" else 0
    buckets = step.gradients if job.gpus > 1 else 0
    encoders = encoding = 0
    if not job.offline:
        encoders = encoder_bytes(made, vae=vae, text=text)
        # Images are encoded while there are neither gradients nor activations.
        sizes = {"rows": setup.rows, "resolution": setup.resolution}
        encoding = step.weights + step.moments + encode_peak(made, **sizes, dtype=vae)
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


def disk_of(made: Architecture, job: Job) -> int:
    """Bytes of what offline encoding writes in half precision: latents, and embeddings once a prompt."""
    shapes = inputs_of(made, rows=1, resolution=job.setup.resolution)
    latent = shapes["hidden_states" if made.family == "sd3" else "sample"]
    return 2 * (job.images * latent.numel() + job.prompts * shapes["encoder_hidden_states"].numel())


def days_of(flops: float, job: Job) -> float:
    """Days for so many FLOPs. Without bfloat16 anywhere, arithmetic is TF32 at half of the rate."""
    float32 = job.setup.dtype == "float32" and not job.setup.autocast
    rate = GPUS[job.gpu].teraflops * 1e12 * job.utilisation * job.gpus / (2 if float32 else 1)
    return flops / rate / 86400


def alternatives(job: Job, lora: LoraConfig) -> dict[str, Job]:
    """The same run with one thing otherwise. lora: what a run without it would take."""
    setup = job.setup
    found: dict[str, Job] = {}
    without = "frozen_copy" if job.reference == "adapter_off" else job.reference
    if setup.lora is None:
        found["with LoRA"] = replace(job, setup=replace(setup, lora=lora))
    else:
        full = replace(setup, lora=None)
        found["every weight instead of LoRA"] = replace(job, setup=full, reference=without)
    turned = replace(setup, gradient_checkpointing=not setup.gradient_checkpointing)
    label = "without" if setup.gradient_checkpointing else "with"
    found[f"{label} gradient checkpointing"] = replace(job, setup=turned)
    if job.reference == "cached":
        live: Reference = "frozen_copy" if setup.lora is None else "adapter_off"
        found[f"reference live ({live})"] = replace(job, reference=live)
    elif job.reference != "none":
        found["reference from the cache"] = replace(job, reference="cached")
    encoding = "encoding in every step" if job.offline else "encoding beforehand"
    found[encoding] = replace(job, offline=not job.offline)
    return found
