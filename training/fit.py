"""A whole training run: resume, steps, logs, held-out metrics, checkpoints, and a clean stop on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from triptych.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    clean_temporary,
    flatten_optimizer,
    latest_checkpoint,
    refuse_changed,
    save_checkpoint,
    unflatten_optimizer,
)
from triptych.training.config import OptimConfig, RunConfig, learning_rate
from triptych.training.fused import Fused
from triptych.training.logs import MetricsLog, Progress
from triptych.training.loop import Learner, Task, train_step
from triptych.training.meters import Meter
from triptych.training.order import num_steps_of
from triptych.training.references import Snapshot, trained
from triptych.training.sharding import laid_out_like, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a run asks of its surroundings.

    evaluate: held-out metrics of a policy. stop: whether to save and leave now (a signal came). report: one
    line for the user. progress: makes the progress bar from (total, start).
    """

    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    stop: Callable[[], bool]
    report: Callable[[str], None]
    progress: Callable[[int, int], Progress]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: steps done, steps planned, and windows left out as non-finite."""

    step: int
    num_steps: int
    skipped: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether every planned step was done."""
        return self.step >= self.num_steps


def planned_steps(config: OptimConfig, num_samples: int) -> int:
    """num_steps, or as many as num_epochs take."""
    if config.num_steps is not None:
        return config.num_steps
    return num_steps_of(num_samples=num_samples, batch_size=config.batch_size, num_epochs=config.num_epochs)


@dataclass(slots=True, kw_only=True)
class Session:
    """One run on its way: steps, logs, held-out metrics and checkpoints, for `fit` and for rounds.

    extra: what a checkpoint keeps besides the learner, as (group -> name -> tensor, JSON values).
    after_step: called after every optimizer step, before anything is saved.
    """

    learner: Learner
    config: OptimConfig
    run: RunConfig
    accelerator: Accelerator
    identity: Mapping[str, Any]
    hooks: Hooks
    num_steps: int
    extra: Callable[[], tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]] = lambda: ({}, {})
    after_step: Callable[[], None] = lambda: None
    _log: MetricsLog | None = None
    _progress: Progress | None = None
    _meter: Meter | None = None

    def __post_init__(self) -> None:
        if self.config.batch_size < self.accelerator.num_processes:
            raise ValueError(
                f"optim.batch_size={self.config.batch_size} is less than the "
                f"{self.accelerator.num_processes} processes"
            )

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.output_dir)

    def start(self) -> Checkpoint | None:
        """Go on from the newest good checkpoint, or begin: open the log, draw the bar, evaluate at step 0."""
        root = self.folder / "checkpoints"
        found = _resume(self.learner, root, self.run, self.accelerator, self.identity, self.hooks.report)
        if self.accelerator.is_main_process:
            # A run that starts anew drops every line of an interrupted one that had not come to a checkpoint.
            self._log = MetricsLog(self.folder / "metrics.jsonl", -1 if found is None else found.step)
        self._progress = self.hooks.progress(self.num_steps, self.learner.step)
        self._meter = Meter(self.accelerator.device)
        if found is None:
            _evaluate(self.learner, self.hooks, self._log, self.accelerator)
        return found

    def advance(self, task: Task, until: int, *, seed: int, start: int = 0) -> bool:
        """Optimizer steps on windows of the task up to step `until`; False when asked to stop before it.

        seed: of the order of samples; start: the step of the task's first window.
        """
        assert self._meter is not None
        while self.learner.step < until:
            before = self.learner.step
            norm = train_step(
                task,
                self.learner,
                self.config,
                self.accelerator,
                seed=seed,
                num_steps=self.num_steps,
                meter=self._meter,
                start=start,
            )
            if norm is None:
                self.hooks.report(f"skipped a window: {self.learner.skipped[-1]}")
            self.after_step()
            if not self._record(before, norm):
                return False
        return True

    def pass_over(self, until: int) -> bool:
        """Go to step `until` without updates: a round had fewer samples than planned. False as `advance`."""
        before, self.learner.step = self.learner.step, max(until, self.learner.step)
        return before == self.learner.step or self._record(before, None)

    def write(self, split: str, values: Mapping[str, float], *, step: int | None = None) -> None:
        """One event, at the present step unless another is given."""
        _write(self._log, self.accelerator, self.learner.step if step is None else step, split, values)

    def close(self) -> None:
        """End the bar and the log."""
        if self._progress is not None:
            self._progress.close()
        if self._log is not None:
            self._log.close()

    def _record(self, before: int, norm: Tensor | None) -> bool:
        """Log, evaluate and save what falls due between two steps; False when the run is to stop."""
        assert self._meter is not None
        assert self._progress is not None
        step, run = self.learner.step, self.run
        last = step == self.num_steps
        stop = _any(self.hooks.stop(), self.accelerator)
        save = last or stop or _due(run.save_every, before, step)
        values: dict[str, float] = {}
        if save or _due(run.log_every, before, step):
            values = self._meter.read(lambda t: self.accelerator.reduce(t, "sum"))  # type: ignore[arg-type, return-value]
            values["learning_rate"] = learning_rate(self.config, step=step - 1, num_steps=self.num_steps)
            if norm is not None:
                values["grad_norm"] = float(norm)
            self.write("train", values)
        shown = {k: v for k, v in values.items() if k in ("loss", "rewards/accuracies")}
        self._progress.update(step, **shown)
        if last or _due(run.eval_every, before, step):
            _evaluate(self.learner, self.hooks, self._log, self.accelerator)
        if save:
            tensors, state = self.extra()
            save_learner(
                self.learner,
                self.folder / "checkpoints",
                self.accelerator,
                self.identity,
                self._log,
                run.keep_checkpoints,
                tensors=tensors,
                state=state,
            )
        return not stop


def fit(
    task: Task,
    learner: Learner,
    config: OptimConfig,
    run: RunConfig,
    accelerator: Accelerator,
    *,
    identity: Mapping[str, Any],
    hooks: Hooks,
) -> Outcome:
    """Train to the planned number of steps, from the newest good checkpoint in run.output_dir if any.

    identity: settings and hashes that a checkpoint must share (data, seed, batch, base model). Killed at any
    moment and started again, the run ends with bitwise the same weights and losses (same device and ranks).
    With config.average the policy ends with the averaged weights, which every held-out metric is of; the
    checkpoints keep both.
    Raises CheckpointError when the checkpoint belongs to other settings, NonFiniteError as `train_step` does.
    """
    average = Snapshot.of(learner.policy) if config.average else None
    session = Session(
        learner=learner,
        config=config,
        run=run,
        accelerator=accelerator,
        identity=identity,
        hooks=hooks if average is None else replace(hooks, evaluate=_under(average, hooks.evaluate)),
        num_steps=planned_steps(config, len(task.examples)),
    )
    if average is not None:
        session.extra = lambda: ({"average": average.values}, {})
        session.after_step = lambda: average.follow(learner.policy, _decay(config.average, learner.step))
    try:
        found = session.start()
        if found is not None and average is not None:
            if "average" in found.tensors:
                average.load(learner.policy, found.tensors["average"])
            else:
                # The checkpoint is of a run without one, which resume_override allows.
                average.take(learner.policy)
        if session.advance(task, session.num_steps, seed=run.seed) and average is not None:
            average.put(learner.policy)
    finally:
        session.close()
    return Outcome(step=learner.step, num_steps=session.num_steps, skipped=tuple(learner.skipped))


def _decay(decay: float, step: int) -> float:
    """Decay of the average after `step` steps: a shorter memory while there is little to remember."""
    return min(decay, (1 + step) / (10 + step))


def _under(
    average: Snapshot, evaluate: Callable[[nn.Module], Mapping[str, float]] | None
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    if evaluate is None:
        return None

    def held_out(policy: nn.Module) -> Mapping[str, float]:
        with average.active(policy) as module:
            return evaluate(module)

    return held_out


def save_learner(
    learner: Learner,
    root: Path,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
    log: MetricsLog | None,
    keep: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write the trained weights, the optimizer and the step as one checkpoint; the first rank writes.

    tensors, state: what else it keeps.
    """
    named = learner.named
    weights = {name: whole(p.detach()) for name, p in named.items()}
    moments = {
        index: {k: whole(v) for k, v in entry.items()}
        for index, entry in learner.optimizer.state_dict()["state"].items()
    }
    more = {group: {k: whole(v) for k, v in entry.items()} for group, entry in (tensors or {}).items()}
    groups = learner.optimizer.state_dict()["param_groups"]
    facts = dict(state or {})
    if learner.fused is not None:
        weights |= learner.fused.weights()
        facts["fused"] = sorted(learner.fused.shapes)
        if remembered := learner.fused.moments():
            more["fused"] = dict(remembered)
    if accelerator.is_main_process:
        if log is not None:
            log.sync()
        optimizer, flat = flatten_optimizer({"state": moments, "param_groups": groups}, list(named))
        saved = facts | {
            "identity": plain(identity),
            "optimizer": flat,
            "skips": learner.skips,
            "skipped": learner.skipped,
        }
        groups_of_tensors = more | {"policy": weights, "optimizer": optimizer}
        save_checkpoint(root, learner.step, groups_of_tensors, saved, keep=keep)
    accelerator.wait_for_everyone()


def load_learner(learner: Learner, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, optimizer state and step into a learner, or raise CheckpointError.

    Of weights that backward updated then and the optimizer does now, or the other way round, the optimizer's
    state begins anew.
    """
    named = learner.named
    if learner.fused is None:
        load_weights(learner.policy, checkpoint)
    else:
        _load_fused(learner.fused, checkpoint)
    state = _optimizer_state(learner, checkpoint, list(named))
    for index, parameter in enumerate(named.values()):
        entry = state["state"].get(index, {})
        state["state"][index] = {k: laid_out_like(v, parameter) for k, v in entry.items()}
    # Settings are those of this run: they equal the checkpoint's, or the user asked for others.
    for group, now in zip(state["param_groups"], learner.optimizer.param_groups, strict=True):
        group |= {k: v for k, v in now.items() if k != "params"}
    learner.optimizer.load_state_dict(state)
    learner.step, learner.skips = checkpoint.step, checkpoint.state["skips"]
    learner.skipped = list(checkpoint.state["skipped"])


def load_weights(policy: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's trained weights into a policy; CheckpointError when names or shapes differ."""
    named, saved = trained(policy), checkpoint.tensors["policy"]
    _check_weights({name: tuple(p.shape) for name, p in named.items()}, saved)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(laid_out_like(saved[name], parameter))


def _check_weights(shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Tensor]) -> None:
    if odd := sorted(shapes.keys() ^ saved.keys()):
        raise CheckpointError(
            f"the checkpoint's trained weights differ from the policy's: {', '.join(odd[:5])}"
        )
    for name, shape in shapes.items():
        if saved[name].shape != shape:
            shown = f"{tuple(saved[name].shape)}, the policy's {shape}"
            raise CheckpointError(f"the checkpoint's weight {name} has shape {shown}")


def _load_fused(fused: Fused, checkpoint: Checkpoint) -> None:
    saved = checkpoint.tensors["policy"]
    _check_weights({n: tuple(p.shape) for n, p in fused.dense.items()} | dict(fused.shapes), saved)
    moments = checkpoint.tensors.get("fused", {}) if "fused" in checkpoint.state else None
    try:
        fused.load(saved, moments)
    except ValueError as error:
        raise CheckpointError(f"what the checkpoint's optimizer of tables remembers: {error}") from None


def _optimizer_state(learner: Learner, checkpoint: Checkpoint, names: list[str]) -> dict[str, Any]:
    """The optimizer's state for the parameters of these names.

    Those that backward updated then, or does now, need not be in both.
    """
    tensors, flat = checkpoint.tensors.get("optimizer", {}), checkpoint.state["optimizer"]
    either = {*checkpoint.state.get("fused", ()), *(learner.fused.shapes if learner.fused else ())}
    if not either:
        return unflatten_optimizer(tensors, flat, names)
    before = [name for group in flat["param_groups"] for name in group["params"]]
    if odd := sorted(({*before} ^ {*names}) - either):
        raise CheckpointError(f"the optimizer's parameters are other ones now: {', '.join(odd[:5])}")
    state = unflatten_optimizer(tensors, flat, before)
    entries = {before[index]: entry for index, entry in state["state"].items()}
    (group,) = state["param_groups"]
    return {
        "state": {i: entries[name] for i, name in enumerate(names) if name in entries},
        "param_groups": [group | {"params": [*range(len(names))]}],
    }


def _resume(
    learner: Learner,
    root: Path,
    run: RunConfig,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
    report: Callable[[str], None],
) -> Checkpoint | None:
    if accelerator.is_main_process:
        for line in clean_temporary(root):
            report(line)
    accelerator.wait_for_everyone()
    found = latest_checkpoint(root, report=report)
    steps = set(gather_object([-1 if found is None else found.step]))
    if len(steps) > 1:
        raise CheckpointError(
            f"the processes see different newest checkpoints in {root} (steps {sorted(steps)}, -1 for none): "
            "run.output_dir must be on storage that all machines share"
        )
    if found is None and any(root.glob("step-*")):
        raise CheckpointError(
            f"every checkpoint in {root} is damaged; move the folder away to start from nothing"
        )
    if found is None:
        return None
    if not run.resume:
        raise CheckpointError(
            f"run.resume=false, but {root} holds checkpoints; choose another run.output_dir"
        )
    override: bool | Collection[str] = "all" in run.resume_override or run.resume_override
    refuse_changed(found.state["identity"], plain(identity), override=override)
    load_learner(learner, found)
    if ("fused" in found.state) != (learner.fused is not None):
        report("the tables have another optimizer than in the checkpoint: what it remembers begins anew")
    report(f"resumed from {root.name}/step-{found.step:08d}")
    return found


def _evaluate(learner: Learner, hooks: Hooks, log: MetricsLog | None, accelerator: Accelerator) -> None:
    if hooks.evaluate is None:
        return
    _write(log, accelerator, learner.step, "eval", hooks.evaluate(learner.policy))
    accelerator.wait_for_everyone()


def _write(
    log: MetricsLog | None, accelerator: Accelerator, step: int, split: str, values: Mapping[str, float]
) -> None:
    """One event for metrics.jsonl and for every tracker that the accelerator was given."""
    if log is not None:
        log.write(step, split, values)
    if accelerator.trackers:
        accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples as lists; paths and non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if value is None or (isinstance(value, (bool, int, float, str)) and finite) else str(value)


def _any(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total)  # type: ignore[arg-type]


def _due(every: int, before: int, step: int) -> bool:
    return every > 0 and step // every > before // every
