"""Align a language model online: draw, judge, shape, step, keep, round after round.

    python scripts/train_llm_online.py --config scripts/recipes/llm/online/online_dpo.yaml --optim.lr 5e-5
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/train_llm_online.py --config ...

Run the same command again after an interruption, in the middle of a round too, and it goes on where it was.
The run folder is that of `train_llm.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from triptych.modalities.llm.online import OnlineConfig, set_up_online, stages_of
from triptych.modalities.llm.online_outcome import HeldOut, base_answers, finish_online
from triptych.scripts.common import (
    StopSignal,
    as_dict,
    cache_dir,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_libraries,
    save_config,
    versions,
)
from triptych.scripts.workplace import open_workplace
from triptych.training.config import flat
from triptych.training.evaluation import identity_of
from triptych.training.fit import Hooks
from triptych.training.loop import make_learner
from triptych.training.rounds import run_rounds


def run(config: OnlineConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    stages = stages_of(config)
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report, quarantine = place.accelerator, place.folder, place.report, place.quarantine
    with accelerator.local_main_process_first():
        online = set_up_online(
            config,
            stages,
            device=accelerator.device,
            cache_dir=cache_dir(),
            quarantine=quarantine,
            report=report,
        )
    place.keep_first_config(config)
    held_out = HeldOut(online, config, device=accelerator.device) if config.evaluation.num_prompts else None
    base = None
    if place.main and held_out is not None:
        identity = _identity(config, online.base_hash, online.data.fingerprint)
        base = base_answers(held_out, folder, identity=identity, report=report)
    place.start_trackers(config)
    learner = make_learner(online.policy, config.optim, accelerator)
    hooks = Hooks(
        evaluate=None if held_out is None else held_out.metrics,
        stop=stop,
        report=report,
        progress=progress("rounds", enabled=place.main),
    )
    outcome, state = run_rounds(
        online.rounds,
        learner,
        config.optim,
        config.run,
        accelerator,
        identity=identity_of(
            flat(as_dict(config)),
            data_fingerprint=online.data.fingerprint,
            base_model_hash=online.base_hash,
            num_ranks=accelerator.num_processes,
        ),
        hooks=hooks,
    )
    if place.main:
        save_config(config, folder)
    if not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    if place.main:
        finish_online(
            held_out,
            online,
            config,
            base=base,
            average=state.average,
            quarantine=quarantine,
            settings=as_dict(config),
            command=command_line(),
            versions=versions(),
            report=report,
        )
    accelerator.end_training()
    return 0


def _identity(config: OnlineConfig, base_hash: str, fingerprint: str) -> str:
    facts = [asdict(config.evaluation), asdict(config.data), config.run.seed, base_hash, fingerprint]
    # The judge is the last stage's, which may have one of its own.
    facts += [as_dict(config)["judge"], as_dict(config)["stages"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(OnlineConfig, args, prog="train_llm_online", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
