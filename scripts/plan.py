"""What a diffusion run costs before it is run: FLOPs, memory of each device, days.

    python scripts/plan.py --model sdxl --method dpo --num_pairs 851293 --gpus 8 --gpu h100
    triptych plan --model sdxl --method rank_dpo --candidates 4 --num_pairs 58000 --lora_r 0 --dtype float32

The step is simulated operation by operation on tensors without values, so a large model takes some ten
seconds for each line of the last table; --alone leaves that table out. Memory is what the program asks for:
the CUDA context, libraries and fragmentation come on top, often 1 to 3 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from triptych.modalities.diffusion.architectures import (
    PUBLISHED,
    Architecture,
    inputs_of,
    read_architecture,
)
from triptych.modalities.diffusion.model import ASSET, LoraConfig
from triptych.modalities.diffusion.planning import (
    GPUS,
    Job,
    alternatives,
    days_of,
    disk_of,
    find_method,
    flops_before,
    flops_of,
    memory_of,
)
from triptych.modalities.diffusion.simulation import Setup, simulate
from triptych.scripts.common import errors_in_one_line

UNIT = {1: "image", 2: "pair"}
GB = 1e9


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parser().parse_args(args)
    with errors_in_one_line():
        made = _architecture(options.model)
        job = _job(options, made)
        for line in _lines(made, job, options):
            print(line, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plan", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="sdxl", help=f"{', '.join(PUBLISHED)}, asset:NAME or a pipeline's folder")
    add("--method", default="dpo", help="an objective; `triptych objectives` lists them")
    add("--candidates", type=int, default=4, help="images of a context, for methods that take lists")
    add("--num_pairs", type=int, default=851293, help="pairs, lists or single images of the data set")
    add("--num_images", type=int, help="distinct images, if they occur in several pairs")
    add("--num_prompts", type=int, help="distinct prompts")
    add("--epochs", type=float, default=1.0)
    add("--resolution", type=int, help="pixels of a side; the model's own if not given")
    add("--micro_batch_size", type=int, default=1, help="pairs or lists of one forward pass on one device")
    add("--lora_r", type=int, default=64, help="rank of the adapters; 0 trains every weight")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the base's weights")
    add("--precision", default="bf16", choices=["float32", "bf16"], help="optim.precision: bf16 is autocast")
    add("--gradient_checkpointing", action="store_true")
    add("--reference", help="adapter_off, frozen_copy, cached or none; by default as the method needs it")
    add("--encode_every_step", action="store_true", help="VAE and text encoders in the loop, not beforehand")
    add("--gpus", type=int, default=8)
    add("--gpu", default="h100", help=", ".join(GPUS))
    add("--utilisation", type=float, default=0.4, help="share of the data sheet's bfloat16 rate")
    add("--alone", action="store_true", help="leave out the table of alternatives")
    return parser


def _architecture(name: str) -> Architecture:
    if name in PUBLISHED:
        return PUBLISHED[name]
    root = Path(__file__).resolve().parent.parent
    folder = root / "assets" / name.removeprefix(ASSET) if name.startswith(ASSET) else Path(name)
    if not folder.is_dir():
        raise ValueError(f"--model={name}; valid: {', '.join(PUBLISHED)}, or a pipeline's folder")
    return read_architecture(folder)


def _job(options: argparse.Namespace, made: Architecture) -> Job:
    method = find_method(options.method, options.candidates)
    lora = LoraConfig(r=options.lora_r, alpha=options.lora_r) if options.lora_r else None
    live = "adapter_off" if lora else "frozen_copy"
    resolution = options.resolution or made.resolution
    inputs_of(made, rows=1, resolution=resolution)
    return Job(
        setup=Setup(
            lora=lora,
            dtype=options.dtype,
            rows=options.micro_batch_size * method.candidates,
            resolution=resolution,
            autocast=options.precision == "bf16",
            gradient_checkpointing=options.gradient_checkpointing,
        ),
        method=method,
        reference=options.reference or (live if method.needs_reference else "none"),
        offline=not options.encode_every_step,
        contexts=options.num_pairs,
        images=options.num_images or options.num_pairs * method.candidates,
        prompts=options.num_prompts or options.num_pairs,
        epochs=options.epochs,
        gpu=options.gpu,
        gpus=options.gpus,
        utilisation=options.utilisation,
    )


def _lines(made: Architecture, job: Job, options: argparse.Namespace) -> Iterator[str]:
    setup, k = job.setup, job.method.candidates
    unit = UNIT.get(k, f"list of {k}")
    step, flops, memory = simulate(made, setup), flops_of(made, job), memory_of(made, job)
    kind = f"LoRA of rank {setup.lora.r}" if setup.lora else "every weight"
    yield f"{options.model}, {options.method}: {setup.resolution} x {setup.resolution} pixels, {kind}"
    yield f"  trained: {step.trained / 1e6:,.1f} M weights; a micro-batch: {setup.rows} images"
    yield ""
    yield f"TFLOP of one {unit}"
    yield f"  {'policy, forward and backward':<34}{flops.policy / 1e12:10.2f}"
    yield f"  {f'reference, {job.reference}':<34}{flops.reference / 1e12:10.2f}"
    yield f"  {'VAE encoder':<34}{flops.vae / 1e12:10.2f}"
    yield f"  {'text encoders':<34}{flops.text / 1e12:10.2f}"
    yield f"  {'together':<34}{flops.total / 1e12:10.2f}"
    yield ""
    limit = GPUS[job.gpu].gigabytes
    yield "GB of memory on one device (activations and gradients are not there all at once)"
    parts = ("weights", "gradients", "moments", "activations", "reference", "buckets", "encoders")
    names = {"moments": "AdamW's moments", "reference": "copy of the reference", "buckets": "DDP's buckets"}
    for name in parts:
        yield f"  {names.get(name, name):<34}{getattr(memory, name) / GB:10.2f}"
    fits = "fits" if memory.peak / GB < limit else "does not fit"
    yield f"  {'peak':<34}{memory.peak / GB:10.2f}  {fits} {job.gpu} ({limit:g} GB)"
    yield ""
    total = flops.total * job.contexts * job.epochs
    rate = f"{job.gpus} x {job.gpu} at {job.utilisation:.0%} of {GPUS[job.gpu].teraflops:g} TFLOP/s"
    yield f"{job.contexts:,} of a {unit}, {job.epochs:g} times over, on {rate}"
    days = days_of(total, job)
    yield f"  {'the run':<34}{days:10.2f} days, {days * job.gpus * 24:,.0f} GPU hours"
    yield f"  {'before it, once for all runs':<34}{days_of(flops_before(made, job), job):10.2f} days"
    if job.offline:
        yield f"  {'encoded images and prompts':<34}{disk_of(made, job) / GB:10.2f} GB of disk"
    if not options.alone:
        yield from _alternatives(made, job, f"TFLOP/{unit}")


def _alternatives(made: Architecture, job: Job, unit: str) -> Iterator[str]:
    yield ""
    yield f"{'otherwise':<34}{unit:>18}{'peak GB':>10}{'days':>10}{'before':>10}"
    for name, other in {"as above": job, **alternatives(job, LoraConfig())}.items():
        flops, memory = flops_of(made, other), memory_of(made, other)
        days = days_of(flops.total * job.contexts * job.epochs, other)
        before = days_of(flops_before(made, other), other)
        numbers = f"{flops.total / 1e12:18.2f}{memory.peak / GB:10.2f}{days:10.2f}{before:10.2f}"
        yield f"{name:<34}{numbers}"


if __name__ == "__main__":
    raise SystemExit(main())
