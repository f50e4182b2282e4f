"""Train a generative recommender on users' events.

    python scripts/train_recsys.py --config scripts/recipes/recsys/movielens_onerec.yaml
    python scripts/train_recsys.py --config scripts/recipes/recsys/movielens_onerec.yaml --data.source my.csv

Run the same command again after an interruption and it goes on where it was. The run folder holds the
configuration, semantic ids, metrics.jsonl, checkpoints, quarantine.jsonl, rankings of the held-out items, the
exported model, from which `scripts/recommend.py` recommends, and report.html. Several ranks (torchrun) share
the embedding tables of model.tables=torchrec out among them; `tables` is of their optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from triptych.modalities.recsys.outcome import finish
from triptych.modalities.recsys.setup import RecsysConfig, set_up
from triptych.modalities.recsys.sharded_run import sharing, whole_run, whole_validation
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
from triptych.training.fit import Hooks, fit
from triptych.training.loop import make_learner


def run(config: RecsysConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    place = open_workplace(config.optim, config.run)
    accelerator, report = place.accelerator, place.report
    share = sharing(config, accelerator)
    made = set_up(
        config,
        config.objective.terms(),
        device=accelerator.device,
        quarantine=place.quarantine,
        report=report,
    )
    place.keep_first_config(config)
    place.start_trackers(config)
    learner = make_learner(made.policy, config.optim, accelerator, share=share)
    identity = identity_of(
        flat(as_dict(config)),
        data_fingerprint=made.events.fingerprint,
        base_model_hash=made.base_hash,
        num_ranks=accelerator.num_processes,
    )
    hooks = Hooks(
        evaluate=whole_validation(made, config, learner) if config.run.eval_every else None,
        stop=stop,
        report=report,
        progress=progress("train", enabled=place.main),
    )
    outcome = fit(made.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    if place.main:
        save_config(config, place.folder)
    if not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    whole = whole_run(made, config, learner)
    if place.main:
        finish(
            whole,
            whole.policy,
            config,
            quarantine=place.quarantine,
            settings=as_dict(config),
            command=command_line(),
            versions=versions(),
            report=report,
            bar=place.bar,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(RecsysConfig, args, prog="train_recsys", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
