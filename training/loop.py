"""The one optimizer loop: windows of micro-batches, one global division, nothing non-finite into the weights.

A step's loss is sum_i loss_i / batch_size over the window's samples, however they are cut into ranks and
micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from triptych.objectives import Input, Objective, Terms, with_reference
from triptych.objectives.metrics import input_metrics
from triptych.training.config import OptimConfig, learning_rate
from triptych.training.fused import Fused, check_fused
from triptych.training.meters import Meter
from triptych.training.order import Draw, key, micro_batches, window
from triptych.training.references import Batch, Cached, Comparable, Likelihood, Reference, trained


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the update did not happen. The message names the records."""


def _rows_are_samples(rows: Tensor, batch: Any) -> Tensor:
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learnt: samples, how likely the policy finds them, and what to make of that.

    lengths[i]: cost of sample i, for batches of similar length. sources[i]: where it came from, for messages.
    fold: rows of the objective -> samples of the batch, where a sample has several rows. also: tasks whose
    loss, times their weight, is added at every step; batch_size: their samples a step (None:
    optim.batch_size). name: put before their metrics.
    """

    likelihood: Likelihood
    terms: Terms
    references: Mapping[str, Reference]
    collate: Callable[[Sequence[Any], Sequence[Draw]], Batch]
    examples: Sequence[Any]
    lengths: Sequence[int]
    sources: Sequence[str]
    fold: Callable[[Tensor, Any], Tensor] = _rows_are_samples
    also: tuple[Task, ...] = ()
    weight: float = 1.0
    batch_size: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if missing := [s for s in self.terms.slots() if s not in self.references]:
            raise ValueError(
                f"the objective reads reference {', '.join(missing)}, which the task does not have"
            )
        if not len(self.examples):
            raise ValueError("there is no sample to train on")


@dataclass(slots=True)
class Learner:
    """What changes during training: weights, optimizer, and how far it is.

    step: optimizer steps done, which is the next one's index. skips: windows in a row left out as non-finite.
    fused: weights that backward updates, where there are any; the optimizer has the others.
    """

    policy: nn.Module
    optimizer: Any
    step: int = 0
    skips: int = 0
    skipped: list[str] = field(default_factory=list)
    fused: Fused | None = None

    @property
    def named(self) -> Mapping[str, nn.Parameter]:
        """What the optimizer updates, by name, in its order."""
        return trained(self.policy) if self.fused is None else self.fused.dense


def make_learner(
    policy: nn.Module,
    config: OptimConfig,
    accelerator: Accelerator,
    *,
    share: Callable[[nn.Module], Fused] | None = None,
) -> Learner:
    """The policy on its device and wrapped for its ranks, with AdamW over what requires a gradient.

    share: wraps it instead, with weights that backward updates; AdamW is then of the others.
    ValueError for an accelerator that would scale gradients a second time, or settings that `share` forbids.
    """
    if accelerator.gradient_accumulation_steps != 1 or accelerator.scaler is not None:
        raise ValueError(
            f"accelerate has gradient_accumulation_steps={accelerator.gradient_accumulation_steps} and "
            f"mixed_precision={accelerator.mixed_precision}; use 1, as optim.batch_size and "
            "optim.micro_batch_size decide on accumulation, and 'no' or 'bf16'"
        )
    fused = None
    if share is not None:
        check_fused(config, accelerator)
        fused = share(policy)
    parameters = [*(trained(policy) if fused is None else fused.dense).values()]
    if not parameters:
        raise ValueError("nothing to train: no parameter of the policy requires a gradient")
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    if fused is not None:
        return Learner(fused.policy, optimizer, fused=fused)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return Learner(policy, optimizer)


def referenced(
    task: Task, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
) -> dict[str, Input]:
    """The batch's input once for every reference slot in use, and 'none' for the one without.

    The policy is computed once and each slot once, from one draw of randomness. References go first, while
    no activations of the policy are kept. A likelihood that can compare (`Comparable`) computes the policy
    and one live reference together.
    """
    likelihood, slots = task.likelihood, task.terms.slots()
    live = [s for s in slots if not isinstance(task.references[s], Cached)]
    compared = live[0] if len(live) == 1 and isinstance(likelihood, Comparable) else None
    theirs = {
        s: task.references[s](likelihood, policy, batch, _again(generator)) for s in slots if s != compared
    }
    if compared is not None and isinstance(likelihood, Comparable):
        with task.references[compared].active(policy) as module:
            said = likelihood.predict(module, batch)
        terms, theirs[compared] = likelihood.beside(policy, said, batch)
        plain = task.likelihood.assemble(terms, batch)
    else:
        plain = task.likelihood(policy, batch, _again(generator))
    inputs: dict[str, Input] = {"none": plain}
    for slot in slots:
        inputs[slot] = with_reference(plain, likelihood.assemble(theirs[slot], batch))
    return inputs


def train_step(
    task: Task,
    learner: Learner,
    config: OptimConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    num_steps: int,
    meter: Meter,
    start: int = 0,
) -> Tensor | None:
    """One optimizer step on window `learner.step - start`; the gradient norm, or None for a skipped window.

    seed: of the order of samples. start: the step at which the task began (a round does not begin at 0).
    Raises NonFiniteError, before the weights change, when a loss or the norm is not finite and
    config.on_nonfinite is 'stop' or the limit of skips is reached. Weights that backward updates (`Fused`)
    see no loss that is not finite; the gradient's norm, and its clipping, are of the others.
    """
    step = learner.step
    rate = learning_rate(config, step=step, num_steps=num_steps)
    if learner.fused is not None:
        learner.fused.follow(rate / config.lr)
    seen = _accumulate(task, learner, config, accelerator, seed, start)
    parameters = [p for g in learner.optimizer.param_groups for p in g["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if not _all_finite(norm, [s.rows["loss"] for s in seen], accelerator):
        learner.optimizer.zero_grad()
        _handle_nonfinite(learner, config, accelerator, seen, float(norm))
        learner.step += 1
        return None
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.step += 1
    learner.skips = 0
    for part in seen:
        prefix = f"{part.task.name}/" if part.task is not task else ""
        meter.add({f"{prefix}{name}": rows for name, rows in part.rows.items()})
    return norm


@dataclass(frozen=True, slots=True)
class _Seen:
    """A micro-batch that went through: its task, draws, and metrics a sample."""

    task: Task
    draws: list[Draw]
    rows: dict[str, Tensor]


def _accumulate(
    task: Task, learner: Learner, config: OptimConfig, accelerator: Accelerator, seed: int, start: int
) -> list[_Seen]:
    """Gradient of the window's mean loss, micro-batch by micro-batch; what this rank went through."""
    step = learner.step
    work = [
        (t, cut, weight)
        for t in (task, *task.also)
        for cut, weight in _cuts(t, config, accelerator, step - start, seed)
    ]
    seen: list[_Seen] = []
    for i, (t, cut, weight) in enumerate(work):
        last = i == len(work) - 1
        with nullcontext() if last else accelerator.no_sync(learner.policy):
            # Dropout depends on step, rank and micro-batch alone, so resuming needs no generator state.
            torch.manual_seed(key("dropout", seed, step, accelerator.process_index, i))
            loss_B, rows = _forward(t, learner.policy, cut, accelerator, seed)
            if learner.fused is not None:
                _refuse_nonfinite(learner, config, accelerator, _Seen(t, cut, rows))
            accelerator.backward(loss_B.sum() * weight)
        if weight:
            seen.append(_Seen(t, cut, rows))
    return seen


def _cuts(
    task: Task, config: OptimConfig, accelerator: Accelerator, place: int, seed: int
) -> list[tuple[list[Draw], float]]:
    """This rank's micro-batches of the task's window and the factor of each one's summed loss."""
    num_ranks = accelerator.num_processes
    size = task.batch_size or config.batch_size
    draws = window(seed=seed, step=place, num_samples=len(task.examples), batch_size=size)
    cuts = micro_batches(
        draws,
        task.lengths,
        rank=accelerator.process_index,
        num_ranks=num_ranks,
        micro_batch_size=config.micro_batch_size,
    )
    most = math.ceil(math.ceil(size / num_ranks) / config.micro_batch_size)
    scale = task.weight * num_ranks / size
    # A rank with one micro-batch less repeats one at weight 0: collectives stay in step.
    spare = cuts[-1] if cuts else draws[:1]
    return [(cuts[i], scale) if i < len(cuts) else (spare, 0.0) for i in range(most)]


def _all_finite(norm: Tensor, losses: Sequence[Tensor], accelerator: Accelerator) -> bool:
    """Whether the norm and every loss of every rank is finite: the step's one wait for the device.

    An infinite loss can have a finite gradient (-log sigmoid at minus infinity), so the norm is not enough.
    """
    bad = ~(torch.isfinite(norm) & torch.isfinite(torch.cat(list(losses))).all())
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad.float(), "sum")
    return not bool(bad)  # type: ignore[arg-type]


def _refuse_nonfinite(learner: Learner, config: OptimConfig, accelerator: Accelerator, part: _Seen) -> None:
    """Raise NonFiniteError on every rank, before backward, unless the loss of each is finite."""
    losses = part.rows["loss"]
    if not _all_finite(losses.new_zeros(()), [losses], accelerator):
        _handle_nonfinite(learner, config, accelerator, [part], 0.0)


def _forward(
    task: Task, policy: nn.Module, draws: list[Draw], accelerator: Accelerator, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    batch = task.collate([task.examples[d.index] for d in draws], draws).to(accelerator.device)
    generator = torch.Generator().manual_seed(key("batch", seed, *(d.seed for d in draws)))
    # A reference without accelerate's wrapper (a copy) computes in the policy's precision, too.
    with accelerator.autocast():
        inputs = referenced(task, policy, batch, generator)
    loss_B, parts = task.terms(inputs)
    rows = row_metrics(task.terms, inputs, loss_B.detach(), parts)
    return task.fold(loss_B, batch), {name: task.fold(values, batch) for name, values in rows.items()}


def row_metrics(
    terms: Terms, inputs: Mapping[str, Input], loss_B: Tensor, parts: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Loss, each term's loss where there are several, and the main input's metrics, [B] each.

    An objective's second term is called `loss/<name>_2`, and so on.
    """
    main = terms.main
    values = {"loss": loss_B}
    if len(parts) > 1:
        names = [t.objective.spec.name for t in terms.terms]
        for i, (name, part) in enumerate(zip(names, parts, strict=True)):
            number = names[: i + 1].count(name)
            values[f"loss/{name}" if number == 1 else f"loss/{name}_{number}"] = part.detach()
    objective: Objective = main.objective
    return values | input_metrics(inputs[main.slot], beta=objective.beta)


def _handle_nonfinite(
    learner: Learner,
    config: OptimConfig,
    accelerator: Accelerator,
    seen: Sequence[_Seen],
    norm: float,
) -> None:
    """Name the records on all ranks, then raise or count; every rank takes the same decision."""
    bad: list[str] = []
    for part in seen:
        flags = (~torch.isfinite(part.rows["loss"])).tolist()
        bad += [part.task.sources[d.index] for d, flag in zip(part.draws, flags, strict=True) if flag]
    whole = [part.task.sources[d.index] for part in seen for d in part.draws]
    if accelerator.num_processes > 1:
        bad, whole = gather_object(bad), gather_object(whole)
    learner.skips += 1
    names = ", ".join(sorted(bad or whole))
    what = (
        "the loss is not finite for"
        if bad
        else f"the gradient norm is {norm} though every loss is finite; in"
    )
    kept = "The weights were not changed."
    if learner.fused is not None and not bad:
        kept = "Backward has changed the tables that ranks share out; the last checkpoint is from before."
    message = f"step {learner.step + 1}: {what} {names}. {kept}"
    if config.on_nonfinite == "stop":
        advice = ", or set optim.on_nonfinite=skip" if learner.fused is None else ""
        raise NonFiniteError(f"{message} Look at these records{advice}.")
    if learner.skips > config.max_skips:
        raise NonFiniteError(
            f"{message} {learner.skips} windows in a row, more than optim.max_skips={config.max_skips}."
        )
    learner.skipped.append(message)


def _again(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator in the same state, so that each likelihood call sees the same draws."""
    return None if generator is None else generator.clone_state()
