"""Align a diffusion or flow model online: draw, judge, shape, step, keep, round after round.

    python scripts/train_diffusion_online.py --config scripts/recipes/diffusion/online/spo_sdxl.yaml
    accelerate launch --config_file scripts/recipes/accelerate/ddp.yaml \
        scripts/train_diffusion_online.py --config ...

Pictures are drawn by the model itself and judged by scorers; no preference data is needed, only prompts. Run
the same command again after an interruption, in the middle of a round too, and it goes on where it was. The
run folder is that of `train_diffusion.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from triptych.modalities.diffusion.gallery import Gallery, sample_base
from triptych.modalities.diffusion.online import OnlineConfig, set_up_online, stages_of
from triptych.modalities.diffusion.online_outcome import PathDrift, finish_online
from triptych.scripts.common import (
    StopSignal,
    as_dict,
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
from triptych.training.evaluation import identity_of
from triptych.training.fit import Hooks
from triptych.training.loop import make_learner
from triptych.training.rounds import run_rounds

ROOT = Path(__file__).resolve().parent.parent


def run(config: OnlineConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    stages = stages_of(config)
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report = place.accelerator, place.folder, place.report
    with accelerator.local_main_process_first():
        online = set_up_online(config, stages, device=accelerator.device, root=ROOT, report=report)
    place.keep_first_config(config)

    studio = online.studio
    base = sample_base(studio, folder, report=report, bar=place.bar) if place.main else None
    place.start_trackers(config)
    learner = make_learner(online.policy, config.optim, accelerator)
    drift = PathDrift(online, batch_size=config.sample.batch_size, seed=config.run.seed)
    gallery = Gallery(studio, folder, base, place.bar, drift)

    def held_out(policy):
        return gallery.look(policy, learner.step) if place.main else {}

    outcome, state = run_rounds(
        online.rounds,
        learner,
        config.optim,
        config.run,
        accelerator,
        identity=identity_of(
            flat(as_dict(config)),
            data_fingerprint=online.fingerprint,
            base_model_hash=online.base_hash,
            num_ranks=accelerator.num_processes,
        ),
        hooks=Hooks(
            evaluate=held_out if studio.scene.wanted else None,
            stop=stop,
            report=report,
            progress=progress("rounds", enabled=place.main),
        ),
    )
    if place.main:
        save_config(config, folder)
    if not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    if place.main:
        finish_online(
            online,
            config,
            base=base,
            drift=drift,
            step=learner.step,
            average=state.average,
            quarantine=place.quarantine,
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
        config = parse(OnlineConfig, args, prog="train_diffusion_online", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
