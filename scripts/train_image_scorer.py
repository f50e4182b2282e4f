"""Train a scorer of pictures on pairs: a CLIP score, a step-aware preference model, or a latent reward.

    python scripts/train_image_scorer.py --config scripts/recipes/diffusion/pickscore_train.yaml
    accelerate launch scripts/train_image_scorer.py --config scripts/recipes/diffusion/spm_sd15.yaml

Run the same command again after an interruption and it goes on where it was. The run folder holds the
configuration, metrics.jsonl, checkpoints, quarantine.jsonl, results.json, report.html with the accuracy by
time, and model: for scorer.type=clip what the image scorer 'pickscore' reads, for step and latent what the
judges 'step_scores' and 'latent_scores' of scripts/train_diffusion_online.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from triptych.modalities.diffusion.scorer_config import ScorerTrainingConfig
from triptych.modalities.diffusion.scorer_outcome import EVAL_SEED, shown_by_time
from triptych.modalities.diffusion.scorer_setup import set_up
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
from triptych.training.reward_run import finish
from triptych.training.sharding import is_sharded

ROOT = Path(__file__).resolve().parent.parent


def run(config: ScorerTrainingConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    terms = config.chosen_objective().terms()
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report = place.accelerator, place.folder, place.report
    with accelerator.local_main_process_first():
        scorer = set_up(
            config,
            terms,
            device=accelerator.device,
            cache_dir=cache_dir(),
            root=ROOT,
            quarantine=place.quarantine,
            report=report,
            bar=place.bar,
        )
    place.keep_first_config(config)
    place.start_trackers(config)
    reward, size = scorer.reward, config.evaluation.micro_batch_size
    learner = make_learner(reward.policy, config.optim, accelerator)
    if is_sharded(learner.policy):
        raise ValueError("a scorer is not sharded over processes; launch with DDP, without FSDP")

    def held_out(policy: torch.nn.Module) -> dict[str, float]:
        assert reward.eval_task is not None
        return summary(evaluate(reward.eval_task, policy, accelerator, micro_batch_size=size, seed=EVAL_SEED))

    identity = identity_of(
        flat(as_dict(config)),
        data_fingerprint=reward.fingerprint,
        base_model_hash=reward.base_hash,
        num_ranks=accelerator.num_processes,
    )
    hooks = Hooks(
        evaluate=held_out if reward.eval_task else None,
        stop=stop,
        report=report,
        progress=progress("train", enabled=place.main),
    )
    outcome = fit(reward.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    if place.main:
        save_config(config, folder)
    if outcome.finished:
        sources = [g.source for g in (config.pictures, config.data) if g is not None]
        finish(
            reward,
            learner,
            accelerator,
            folder=folder,
            micro_batch_size=size,
            title=f"{config.scorer.type} scorer of pictures on {sources[0]}",
            tags=["image-scorer", config.scorer.type, config.chosen_objective().name],
            datasets=sources,
            settings=as_dict(config),
            quarantine=place.quarantine,
            command=command_line(),
            versions=versions(),
            report=report,
            further=shown_by_time(scorer.bins, accelerator, clusters=reward.clusters, micro_batch_size=size),
        )
    else:
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
    accelerator.end_training()
    return 0 if outcome.finished else 128 + stop.number


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(ScorerTrainingConfig, args, prog="train_image_scorer", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
