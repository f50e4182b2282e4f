"""What a run on preference data leaves behind: held-out results, pictures, artefacts and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from triptych.modalities.diffusion.gallery import Bar, Gallery, Pictures, Studio, step_name, weights_hash
from triptych.modalities.diffusion.likelihood import DiffusionBatch
from triptych.modalities.diffusion.measures import drift
from triptych.modalities.diffusion.picture_report import Findings, compare, publish_run
from triptych.modalities.diffusion.setup import DiffusionConfig, DiffusionRun
from triptych.training.evaluation import estimate, evaluate
from triptych.training.loop import Learner
from triptych.training.order import Draw, key
from triptych.training.quarantine import Quarantine
from triptych.training.references import AdapterOff, Cached, Reference, unwrapped
from triptych.training.report import Table
from triptych.training.sharding import is_sharded, whole_state
from triptych.training.stats import Estimate, paired_difference

_DRIFT_CONTEXTS = 32


def finish(
    run: DiffusionRun,
    learner: Learner,
    config: DiffusionConfig,
    accelerator: Accelerator,
    *,
    quarantine: Quarantine,
    studio: Studio,
    base: Pictures | None,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Bar,
) -> None:
    """Evaluate, sample, export the artefacts with their card, and write report.html. Every rank calls it."""
    folder, scene = Path(config.run.output_dir), studio.scene
    rows = None
    if run.eval_task is not None:
        size = config.evaluation.micro_batch_size
        rows = evaluate(
            run.eval_task, learner.policy, accelerator, micro_batch_size=size, seed=config.run.seed
        )
    policy = unwrapped(learner.policy)
    aligned, moved = None, None
    # A sharded model can only be sampled and gathered by all ranks together.
    if scene.wanted and (accelerator.is_main_process or is_sharded(policy)):
        place = folder / "samples" / step_name(learner.step)
        aligned = studio.pictures(place, weights_hash(policy), lambda total: bar("aligned", total))
        moved = Gallery(studio, folder, base, bar, HeldOutDrift(run)).drift(policy)
    state = whole_state(run.policy.model)
    if not accelerator.is_main_process:
        return
    findings = Findings(tables=[], results={}, samples=[], figures=[])
    if rows:
        referenced = run.task.terms.main.slot != "none"
        table, results = held_out_table(rows, run.data.eval_clusters, referenced=referenced)
        findings += Findings(tables=[table], results=results, samples=[], figures=[])
    if base is not None and aligned is not None:
        findings += compare(studio, base, aligned, folder=folder, step=learner.step, drift=moved)
    publish_run(
        scene,
        folder,
        findings,
        objective=config.objective.name,
        dataset=config.data.source,
        state=state,
        quarantine_counts=quarantine.counts,
        settings=settings,
        command=command,
        versions=versions,
        report=report,
    )


class HeldOutDrift:
    """Mean of `measures.drift` over the first held-out contexts; None of a run without a reference.

    It is measured from the objective's reference if there is more of that than a table of numbers, or from
    the base under the adapters.
    """

    def __init__(self, run: DiffusionRun):
        self._run = run
        self._batches: list[DiffusionBatch] | None = None

    def __call__(self, policy: nn.Module) -> float | None:
        """The drift of the policy as it is."""
        reference = self._reference()
        if reference is None:
            return None
        if self._batches is None:
            # As in training, data is put together outside of the low precision.
            with torch.autocast("cpu", enabled=False):
                self._batches = self._collated()
        likelihood: Any = self._run.task.likelihood
        return float(drift(likelihood, policy, reference, self._batches).mean())

    def _reference(self) -> Reference | None:
        frozen = self._run.task.references.get("frozen")
        if isinstance(frozen, Cached) and frozen.source is None:
            return None
        if frozen is not None:
            return frozen
        return AdapterOff() if hasattr(self._run.policy, "adapters") else None

    def _collated(self) -> list[DiffusionBatch]:
        config, task = self._run.config, self._run.eval_task or self._run.task
        number = min(_DRIFT_CONTEXTS, len(task.examples))
        draws = [Draw(i, -1, key("eval", config.run.seed, i)) for i in range(number)]
        size = config.evaluation.micro_batch_size
        cuts = [draws[i : i + size] for i in range(0, number, size)]
        return [task.collate([task.examples[d.index] for d in cut], cut) for cut in cuts]  # type: ignore[misc]


_HELD_OUT = {
    "ELBO ranking accuracy": ("ranking/reference", "ranking/accuracy"),
}
_ALIGNED_ONLY = {
    "top-1 of lists": "ranking/top1",
    "NDCG of lists": "ranking/ndcg",
    "reward margin": "rewards/margins",
    "loss": "loss",
}


def held_out_table(
    rows: Mapping[str, Tensor], clusters: Sequence[str], *, referenced: bool = True
) -> tuple[Table, dict[str, Estimate]]:
    """Held-out results of base and aligned model, 95 % intervals over clusters, as a table and by name.

    referenced: whether rewards are relative to the base, so that all of the base's own are ties.
    """
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    if "rewards/accuracies" in rows:
        results["reward accuracy"] = estimate(rows["rewards/accuracies"], clusters=clusters)
        lines.append(["reward accuracy", 0.5 if referenced else None, results["reward accuracy"], None])
    for name, (before, after) in _HELD_OUT.items():
        if before in rows and after in rows:
            gain = paired_difference(rows[before], rows[after], seed=0, clusters=clusters)
            results[f"{name}, aligned - base"] = gain
            base, aligned = (estimate(rows[side], clusters=clusters) for side in (before, after))
            lines.append([name, base, aligned, gain])
    for name, column in _ALIGNED_ONLY.items():
        if column in rows:
            lines.append([name, None, estimate(rows[column], clusters=clusters), None])
    ties = " (the base is its own reference, so all its rewards are ties)" if referenced else ""
    note = (
        f"{len(next(iter(rows.values())))} held-out samples, each at one draw of times and noise; 95 % "
        "bootstrap intervals over prompts or persons. Reward accuracy: share of comparisons that the "
        f"implicit reward decides as the label does{ties}; ties count one half. It says how well the labels "
        "are told apart, not how good the pictures are."
    )
    return Table("Held-out data", ["measure", "base", "aligned", "difference"], lines, note), results
