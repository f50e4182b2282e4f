"""What a reward model's training leaves behind: held-out accuracy, calibration and error, with intervals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from triptych.training.card import write_card
from triptych.training.evaluation import estimate, evaluate
from triptych.training.loop import Learner, Task
from triptych.training.quarantine import Quarantine
from triptych.training.references import unchanged, unwrapped
from triptych.training.report import Figure, Table, write_report
from triptych.training.scorers import Standardise
from triptych.training.sharding import whole_state
from triptych.training.stats import Estimate, bootstrap_interval, win_rate

Results = tuple[list[Table], dict[str, Estimate]]
_NUM_BINS = 5


def _nothing_more(policy: nn.Module) -> Results:
    return [], {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRun:
    """A reward model on its way to training, whatever it reads.

    names: of the objectives. clusters[i]: what held-out sample i shares with others. outputs: from scores to
    ratings. base_model, snippet (Python that loads it): for the card. export: writes the model to a folder,
    from its gathered state where it is sharded. more: further results of the trained policy.
    """

    policy: nn.Module
    task: Task
    eval_task: Task | None
    clusters: tuple[str, ...]
    names: tuple[str, ...]
    fingerprint: str
    base_hash: str
    base_model: str
    snippet: str
    export: Callable[[Path, Mapping[str, Tensor] | None], None]
    outputs: Standardise | None = None
    more: Callable[[nn.Module], Results] = _nothing_more


def calibration_error(gaps_N: Tensor) -> float:
    """Expected calibration error of Bradley-Terry: mean over bins of |confidence - accuracy|, by their size.

    gaps: s_w - s_l of pairs. confidence = sigmoid(|gap|), from one half to 1, in bins of equal width; right
    where the gap is positive, half right at 0. Guo et al. 2017, eq. 3.
    """
    confidence_N, right_N, bin_N = _confidence(gaps_N)
    count_K = torch.zeros(_NUM_BINS, dtype=torch.float64).index_add(0, bin_N, torch.ones_like(right_N))
    excess_K = torch.zeros_like(count_K).index_add(0, bin_N, confidence_N - right_N)
    return float(excess_K.abs().sum() / count_K.sum())


def _confidence(gaps_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gaps_N = gaps_N.double()
    confidence_N = torch.sigmoid(gaps_N.abs())
    bin_N = ((confidence_N - 0.5) * 2 * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    return confidence_N, 0.5 * (torch.sign(gaps_N) + 1), bin_N


def pair_results(rows: Mapping[str, Tensor], clusters: Sequence[str], *, pairs: bool = True) -> Results:
    """Accuracy, log-loss and calibration of held-out pairs; of lists, what `evaluate` says of them.

    rows: as `evaluate` gives them. The log-loss and calibration are of P(chosen) = sigmoid(s_w - s_l),
    without the margins of training.
    """
    labels = {
        "rewards/accuracies": "accuracy",
        "rewards/margins": "gap of scores",
        "ranking/top1": "best first",
        "ranking/ndcg": "NDCG",
        "loss": "loss",
    }
    found = {label: estimate(rows[n], clusters=clusters) for n, label in labels.items() if n in rows}
    tables = []
    if pairs:
        gaps = rows["rewards/margins"]
        found["log-loss"] = estimate(nn.functional.softplus(-gaps), clusters=clusters)
        found["calibration error"] = bootstrap_interval(
            gaps.unsqueeze(-1),
            seed=0,
            statistic=lambda x: calibration_error(x[:, 0]),
            num_resamples=500,
            clusters=clusters,
        )
        tables.append(_calibration_table(gaps))
    note = (
        f"{len(rows['loss'])} held-out samples; 95 % bootstrap intervals over contexts. An untrained model: "
        "accuracy 0.5, log-loss 0.693. Ties count one half. Resampling raises a calibration error a little."
    )
    lines = [[name, value] for name, value in found.items()]
    return [Table("Held-out data", ["measure", "value"], lines, note), *tables], found


def _calibration_table(gaps_N: Tensor) -> Table:
    confidence_N, right_N, bin_N = _confidence(gaps_N)
    lines: list[list[Any]] = []
    for k in range(_NUM_BINS):
        inside = bin_N == k
        if not inside.any():
            continue
        edges = f"{0.5 + 0.5 * k / _NUM_BINS:.1f} to {0.5 + 0.5 * (k + 1) / _NUM_BINS:.1f}"
        count, mean = int(inside.sum()), float(confidence_N[inside].mean())
        lines.append([edges, count, mean, win_rate(right_N[inside])])
    note = (
        "Confidence is sigmoid(|s_w - s_l|); of a calibrated model the share that is right equals its mean."
    )
    return Table("Calibration", ["confidence", "pairs", "mean confidence", "right"], lines, note)


def rating_results(
    predicted: Tensor, target: Tensor, rated: Tensor, names: Sequence[str], clusters: Sequence[str]
) -> Results:
    """Error of held-out ratings by attribute, in their own units: [M, N] each, `rated` where there is one.

    R2 = 1 - squared error / squared deviation from the held-out mean; Pearson's r is of what is rated.
    """
    lines: list[list[Any]] = []
    found: dict[str, Estimate] = {}
    for n, name in enumerate(names):
        known = rated[:, n]
        if int(known.sum()) < 2:
            lines.append([name, int(known.sum()), None, None, None])
            continue
        table = torch.stack([predicted[known, n], target[known, n]], -1).double()
        groups = [c for c, k in zip(clusters, known.tolist(), strict=True) if k]
        found[f"{name} error"] = estimate((table[:, 0] - table[:, 1]).abs(), clusters=groups)
        found[f"{name} R2"] = bootstrap_interval(
            table, seed=0, statistic=r_squared, num_resamples=500, clusters=groups
        )
        r = torch.corrcoef(table.T)[0, 1] if bool((table.std(0) > 0).all()) else torch.tensor(0.0)
        lines.append([name, int(known.sum()), found[f"{name} error"], found[f"{name} R2"], float(r)])
    note = f"{len(target)} held-out samples; mean absolute error in the ratings' units; the mean has R2 0."
    columns = ["attribute", "rated", "absolute error", "R2", "Pearson's r"]
    return [Table("Held-out ratings", columns, lines, note)], found


def r_squared(table: Tensor) -> float:
    """1 - sum (y - p)^2 / sum (y - mean y)^2 of rows (p, y); 0 where y does not vary."""
    predicted, target = table.unbind(-1)
    spread = (target - target.mean()).square().sum()
    return float(1 - (target - predicted).square().sum() / spread) if spread > 0 else 0.0


@torch.no_grad()
def scores_of_task(
    task: Task, policy: nn.Module, accelerator: Accelerator, *, micro_batch_size: int
) -> Tensor:
    """Scores of every sample's only candidate, [M, N] on the CPU; every rank computes all of them."""
    found: list[Tensor] = []
    with unchanged(policy), accelerator.autocast():
        for start in range(0, len(task.examples), micro_batch_size):
            batch = task.collate(task.examples[start : start + micro_batch_size], ())
            found.append(task.likelihood.terms(unwrapped(policy), batch.to(accelerator.device)).float().cpu())
    return torch.cat(found)


def results_of(
    reward: RewardRun, learner: Learner, accelerator: Accelerator, *, micro_batch_size: int
) -> Results:
    """Tables and estimates of the held-out data. Every rank calls it."""
    task = reward.eval_task
    if task is None:
        return reward.more(learner.policy)
    samples = [e.sample for e in task.examples]
    if samples[0].kind == "units":
        assert reward.outputs is not None
        outputs = copy.deepcopy(reward.outputs).cpu()
        scores = scores_of_task(task, learner.policy, accelerator, micro_batch_size=micro_batch_size)
        rated = torch.tensor([[r is not None for r in s.ratings] for s in samples])
        target = torch.tensor([[r or 0.0 for r in s.ratings] for s in samples])
        tables, found = rating_results(
            outputs.inverse(scores), outputs.inverse(target), rated, reward.names, reward.clusters
        )
    else:
        rows = evaluate(task, learner.policy, accelerator, micro_batch_size=micro_batch_size, seed=0)
        tables, found = pair_results(rows, reward.clusters, pairs=samples[0].kind == "pair")
    more_tables, more = reward.more(learner.policy)
    return [*tables, *more_tables], found | more


def finish(
    reward: RewardRun,
    learner: Learner,
    accelerator: Accelerator,
    *,
    folder: Path,
    micro_batch_size: int,
    title: str,
    tags: Sequence[str],
    datasets: Sequence[str],
    settings: Mapping[str, Any],
    quarantine: Quarantine,
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    further: Callable[[nn.Module], tuple[Results, list[Figure]]] | None = None,
) -> None:
    """Evaluate, export the model with its card, write results.json and report.html. Every rank calls it.

    further: what else is to be shown of the policy.
    """
    tables, results = results_of(reward, learner, accelerator, micro_batch_size=micro_batch_size)
    images: list[Figure] = []
    if further is not None:
        (more, found), images = further(learner.policy)
        tables, results = [*tables, *more], {**results, **found}
    state = whole_state(unwrapped(learner.policy))
    if not accelerator.is_main_process:
        return
    numbers = {name: f"{value:.3f}" for name, value in results.items()}
    reward.export(folder / "model", state)
    write_card(
        folder / "model",
        base_model=reward.base_model,
        library_name="triptych",
        tags=tags,
        datasets=datasets,
        license=None,
        metrics=numbers,
        command=command,
        versions=versions,
        config=settings,
        snippet=reward.snippet,
    )
    content = {name: asdict(value) for name, value in results.items()}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    path = write_report(
        folder,
        title=title,
        summary=list(numbers.items())[:3],
        tables=tables,
        samples=[],
        images=images,
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:.3f}")
    report(f"report: {path}")
