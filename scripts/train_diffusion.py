"""Align a diffusion or flow model with preferences between images.

    python scripts/train_diffusion.py --config scripts/recipes/diffusion/sdxl_dpo_lora.yaml --optim.lr 1e-5
    torchrun --nproc_per_node 8 scripts/train_diffusion.py --config ...

The images are encoded once, beforehand, by scripts/encode_images.py. Run the same command again after an
interruption and it goes on where it was. The run folder holds the configuration, metrics.jsonl, checkpoints,
sample grids, the exported LoRA (for diffusers and for kohya's tools) or model, and report.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from triptych.modalities.diffusion.gallery import Gallery, Studio, sample_base
from triptych.modalities.diffusion.outcome import HeldOutDrift, finish
from triptych.modalities.diffusion.setup import DiffusionConfig, fill_references, set_up
from triptych.scripts.common import (
    StopSignal,
    as_dict,
    cache_dir,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_diffusers,
    save_config,
    versions,
)
from triptych.scripts.workplace import open_workplace
from triptych.training.config import flat
from triptych.training.evaluation import evaluate, identity_of, summary
from triptych.training.fit import Hooks, fit
from triptych.training.loop import make_learner
from triptych.training.sharding import is_sharded

ROOT = Path(__file__).resolve().parent.parent


def run(config: DiffusionConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    terms = config.objective.terms()
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report = place.accelerator, place.folder, place.report
    with accelerator.local_main_process_first():
        images = set_up(
            config, terms, device=accelerator.device, cache_dir=cache_dir(), root=ROOT, report=report
        )
    place.keep_first_config(config)

    fill_references(images, accelerator, report=report, bar=place.bar)
    studio = Studio(images.scene())
    base = sample_base(studio, folder, report=report, bar=place.bar) if place.main else None
    place.start_trackers(config)
    learner = make_learner(images.policy, config.optim, accelerator)
    gallery = Gallery(studio, folder, base, place.bar, HeldOutDrift(images))

    def held_out(policy):
        values = gallery.look(policy, learner.step) if place.main or is_sharded(policy) else {}
        if images.eval_task is None:
            return values
        size = config.evaluation.micro_batch_size
        rows = evaluate(images.eval_task, policy, accelerator, micro_batch_size=size, seed=config.run.seed)
        return summary(rows) | values

    identity = identity_of(
        flat(as_dict(config)),
        data_fingerprint=images.data.fingerprint,
        base_model_hash=images.base_hash,
        num_ranks=accelerator.num_processes,
    )
    hooks = Hooks(
        evaluate=held_out,
        stop=stop,
        report=report,
        progress=progress("train", enabled=place.main),
    )
    outcome = fit(images.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    if place.main:
        save_config(config, folder)
    if not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    finish(
        images,
        learner,
        config,
        accelerator,
        quarantine=place.quarantine,
        studio=studio,
        base=base,
        settings=as_dict(config),
        command=command_line(),
        versions=versions(),
        report=report,
        bar=place.bar,
    )
    accelerator.end_training()
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(DiffusionConfig, args, prog="train_diffusion", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
