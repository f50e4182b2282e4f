"""Align a language model with preference data.

    python scripts/train_llm.py --config scripts/recipes/llm/smollm2_dpo_reviews.yaml --optim.lr 1e-5
    accelerate launch --config_file scripts/recipes/accelerate/ddp.yaml scripts/train_llm.py --config ...

Run the same command again after an interruption and it goes on where it was. The run folder holds the
configuration, metrics.jsonl, checkpoints, quarantine.jsonl, samples, the exported model and report.html.
"""

from __future__ import annotations

from collections.abc import Sequence

from triptych.modalities.llm.outcome import finish, sample_base
from triptych.modalities.llm.setup import TextConfig, fill_references, set_up
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
from triptych.training.evaluation import evaluate, identity_of, summary
from triptych.training.fit import Hooks, fit
from triptych.training.loop import make_learner


def run(config: TextConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    terms = config.objective.terms()
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report, quarantine = place.accelerator, place.folder, place.report, place.quarantine
    with accelerator.local_main_process_first():
        text = set_up(
            config,
            terms,
            device=accelerator.device,
            cache_dir=cache_dir(),
            quarantine=quarantine,
            report=report,
        )
    place.keep_first_config(config)

    fill_references(text, config, accelerator, report=report, bar=place.bar)
    samples = sample_base(text, config, folder, report=report, bar=place.bar) if place.main else None
    place.start_trackers(config)
    learner = make_learner(text.policy, config.optim, accelerator)

    def held_out(policy):
        assert text.eval_task is not None
        size = config.evaluation.micro_batch_size
        return summary(
            evaluate(text.eval_task, policy, accelerator, micro_batch_size=size, seed=config.run.seed)
        )

    identity = identity_of(
        flat(as_dict(config)),
        data_fingerprint=text.data.fingerprint,
        base_model_hash=text.base_hash,
        num_ranks=accelerator.num_processes,
    )
    hooks = Hooks(
        evaluate=held_out if text.eval_task else None,
        stop=stop,
        report=report,
        progress=progress("train", enabled=place.main),
    )
    outcome = fit(text.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    if place.main:
        save_config(config, folder)
    if not outcome.finished:
        accelerator.end_training()
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
        return 128 + stop.number
    finish(
        text,
        learner,
        config,
        accelerator,
        quarantine=quarantine,
        base_samples=samples,
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
        config = parse(TextConfig, args, prog="train_llm", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
