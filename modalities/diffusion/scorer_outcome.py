"""What the training of an image scorer leaves behind: held-out accuracy, also by time, and the model itself.

Shapes: n held-out pairs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from triptych.modalities.diffusion.draws import NoiseConfig, draw
from triptych.modalities.diffusion.schedule import Schedule
from triptych.training.evaluation import estimate, evaluate
from triptych.training.loop import Task
from triptych.training.order import Draw, key
from triptych.training.report import Figure, Table
from triptych.training.reward_run import Results
from triptych.training.stats import Estimate

# Of the times and noise of held-out pairs: runs that differ in their seed are asked the same.
EVAL_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBin:
    """The held-out pairs again, noised at times of one part of the range; times: [n], of each pair."""

    task: Task
    times: Tensor


def parts_of(noise: NoiseConfig, num: int) -> list[NoiseConfig]:
    """The noise's range in `num` equal parts; fewer where it has fewer times."""
    num = min(num, len(noise.values)) if noise.values else num
    edges = [noise.low + (noise.high - noise.low) * k / num for k in range(num)] + [noise.high]
    return [replace(noise, low=a, high=b) for a, b in pairwise(edges)]


def eval_times(noise: NoiseConfig, schedule: Schedule, num: int) -> Tensor:
    """The times that `evaluate` gives to each of `num` samples, [num] float64."""
    draws = [Draw(i, -1, key("eval", EVAL_SEED, i)) for i in range(num)]
    return torch.cat([draw(noise, schedule, at, (1,), 1).times for at in draws])


def accuracy_by_time(
    bins: Sequence[TimeBin],
    policy: nn.Module,
    accelerator: Accelerator,
    *,
    clusters: Sequence[str],
    micro_batch_size: int,
) -> tuple[list[Estimate], list[float]]:
    """Accuracy at the times of each bin, and the mean gap of scores there. Every rank calls it."""
    accuracies: list[Estimate] = []
    gaps: list[float] = []
    for one in bins:
        rows = evaluate(one.task, policy, accelerator, micro_batch_size=micro_batch_size, seed=EVAL_SEED)
        accuracies.append(estimate(rows["rewards/accuracies"], clusters=clusters))
        gaps.append(float(rows["rewards/margins"].mean()))
    return accuracies, gaps


def time_results(
    bins: Sequence[TimeBin], accuracies: Sequence[Estimate], gaps: Sequence[float]
) -> tuple[Table, Figure, dict[str, Estimate]]:
    """A table, a curve and names for the accuracy of each bin."""
    names = [f"{float(b.times.min()):.0f} to {float(b.times.max()):.0f}" for b in bins]
    lines = [
        [name, len(b.times), a, gap] for name, b, a, gap in zip(names, bins, accuracies, gaps, strict=True)
    ]
    note = "The same held-out pairs in every row, noised at times of it. 0 is the clean picture."
    table = Table("Accuracy by time", ["times", "pairs", "accuracy", "gap of scores"], lines, note)
    means = [float(b.times.mean()) for b in bins]
    shown = Figure("Accuracy by time", curve(means, accuracies), "With 95 % intervals; one half is a guess.")
    return table, shown, {f"accuracy, times {n}": a for n, a in zip(names, accuracies, strict=True)}


def curve(times: Sequence[float], accuracies: Sequence[Estimate]) -> bytes:
    """Accuracy against time with its intervals, PNG bytes."""
    made = Drawing(figsize=(7.0, 3.6), layout="constrained")
    axes = made.subplots()
    mean = [a.mean for a in accuracies]
    # Of a single prompt an interval is not bounded.
    low, high = [max(0.0, a.low) for a in accuracies], [min(1.0, a.high) for a in accuracies]
    axes.fill_between(times, low, high, color="#2a78d6", alpha=0.2, linewidth=0)
    axes.plot(times, mean, color="#2a78d6", marker="o")
    axes.axhline(0.5, color="#777777", linewidth=0.9, linestyle="--")
    axes.set_ylim(min(0.4, *low), 1.02)
    axes.set_xlabel("time (noise grows to the right)")
    axes.set_ylabel("pairs ranked rightly")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def shown_by_time(
    bins: Sequence[TimeBin],
    accelerator: Accelerator,
    *,
    clusters: Sequence[str],
    micro_batch_size: int,
) -> Callable[[nn.Module], tuple[Results, list[Figure]]] | None:
    """What `reward_run.finish` is to show besides: accuracy by time; None of clean pictures."""
    if not bins:
        return None

    def further(policy: nn.Module) -> tuple[Results, list[Figure]]:
        accuracies, gaps = accuracy_by_time(
            bins, policy, accelerator, clusters=clusters, micro_batch_size=micro_batch_size
        )
        table, figure, found = time_results(bins, accuracies, gaps)
        return ([table], found), [figure]

    return further
