"""Align a trained recommender in rounds: Iterative Preference Alignment, or any other objective.

    python scripts/train_recsys_online.py --config scripts/recipes/recsys/online/movielens_ipa.yaml
    python scripts/train_recsys_online.py --config ... --objective.name simpo --objective.reference none

Run the same command again after an interruption, in the middle of a round too, and it goes on where it was.
The run folder holds the configuration, metrics.jsonl, checkpoints, the sessions that the policy recommended
to users it never learns from (answers/), the exported model and report.html. It stops, and says so, when the
reward goes up and a held-out judge down. `judge_recsys.py` asks judges that training never asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from triptych.modalities.recsys.online import OnlineConfig, set_up_online, stages_of
from triptych.modalities.recsys.online_look import HackingAlarm, Looker
from triptych.modalities.recsys.online_outcome import finish_online
from triptych.scripts.common import (
    StopSignal,
    as_dict,
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

ALARMED = 3


def run(config: OnlineConfig) -> int:
    """Train, write down, export and report; returns the exit code, 3 after an alarm."""
    stop = StopSignal()
    stages = stages_of(config)
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report = place.accelerator, place.folder, place.report
    online = set_up_online(
        config, stages, device=accelerator.device, quarantine=place.quarantine, report=report
    )
    place.keep_first_config(config)
    looker = Looker(online, config, device=accelerator.device)
    place.start_trackers(config)
    learner = make_learner(online.policy, config.optim, accelerator)

    def look(policy: nn.Module) -> Mapping[str, float]:
        return looker.metrics(policy, folder, learner.step, main=place.main)

    alarm = None
    try:
        outcome, _ = run_rounds(
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
                evaluate=look,
                stop=stop,
                report=report,
                progress=progress("rounds", enabled=place.main),
            ),
        )
    except HackingAlarm as error:
        alarm, outcome = str(error), None
        report(f"ALARM: {alarm}")
    if place.main:
        save_config(config, folder)
    if outcome is not None and not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    if place.main:
        finish_online(
            online,
            config,
            looker,
            step=learner.step,
            alarm=alarm,
            quarantine=place.quarantine,
            settings=as_dict(config),
            command=command_line(),
            versions=versions(),
            report=report,
            bar=place.bar,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return ALARMED if alarm else 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(OnlineConfig, args, prog="train_recsys_online", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
