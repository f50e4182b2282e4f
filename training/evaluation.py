"""Held-out metrics, one row a sample, in the samples' own order: no number depends on the batch size."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from triptych.training.loop import Task, referenced, row_metrics
from triptych.training.order import Draw, key, longest_first
from triptych.training.references import unchanged, unwrapped
from triptych.training.stats import Estimate, bootstrap_interval


@torch.no_grad()
def evaluate(
    task: Task, policy: nn.Module, accelerator: Accelerator, *, micro_batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Loss and metrics of every sample of the task, [num_samples] float64 each, the same on every rank."""
    draws = [Draw(i, -1, key("eval", seed, i)) for i in range(len(task.examples))]
    by_length = longest_first(task.lengths)
    mine = [draws[i] for i in by_length[accelerator.process_index :: accelerator.num_processes]]
    most = math.ceil(math.ceil(len(draws) / accelerator.num_processes) / micro_batch_size)
    found: list[tuple[list[int], dict[str, Tensor]]] = []
    with unchanged(policy):
        for i in range(most):
            cut = mine[i * micro_batch_size : (i + 1) * micro_batch_size]
            # A rank with less to do goes through a batch it does not count: collectives stay in step.
            used = cut or draws[:1]
            batch = task.collate([task.examples[d.index] for d in used], used).to(accelerator.device)
            generator = torch.Generator().manual_seed(key("batch", seed, *(d.seed for d in used)))
            with accelerator.autocast():
                inputs = referenced(task, unwrapped(policy), batch, generator)
            loss_B, parts = task.terms(inputs)
            if cut:
                values = row_metrics(task.terms, inputs, loss_B, parts)
                folded = {name: task.fold(rows, batch) for name, rows in values.items()}
                found.append(([d.index for d in cut], folded))
    rows = [(i, {n: v.tolist() for n, v in values.items()}) for i, values in found]
    if accelerator.num_processes > 1:
        rows = gather_object(rows)
    return _in_order(rows, len(task.examples))


def _in_order(
    rows: Sequence[tuple[list[int], dict[str, list[float]]]], num_samples: int
) -> dict[str, Tensor]:
    names = rows[0][1]
    table = {n: torch.full((num_samples,), torch.nan, dtype=torch.float64) for n in names}
    for indices, values in rows:
        for name in names:
            table[name][indices] = torch.tensor(values[name], dtype=torch.float64)
    return table


def summary(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each metric over samples; of accuracies also the 95 % interval, <name>_low and <name>_high."""
    out: dict[str, float] = {name: float(values.mean()) for name, values in rows.items()}
    accuracy = rows.get("rewards/accuracies")
    if accuracy is not None and len(accuracy) > 1:
        found = estimate(accuracy)
        out |= {"rewards/accuracies_low": found.low, "rewards/accuracies_high": found.high}
    return out


def estimate(values: Tensor, *, clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """Mean with a 95 % bootstrap interval over samples, or over clusters (items, prompts, users)."""
    return bootstrap_interval(values, seed=seed, clusters=clusters)


def identity_of(config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint: every setting but where and how often it writes."""
    kept = {
        k: v
        for k, v in config.items()
        if not k.startswith(("run.", "sample.", "evaluation.")) or k == "run.seed"
    }
    return kept | facts
