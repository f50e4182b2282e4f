"""What an online run of a denoiser leaves behind: pictures before and after, artefacts and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.gallery import Bar, Gallery, Pictures, step_name, weights_hash
from triptych.modalities.diffusion.online import OnlineConfig, OnlineRun
from triptych.modalities.diffusion.picture_report import Findings, compare, export_model, publish_run
from triptych.modalities.diffusion.prompts import prompt_key
from triptych.modalities.diffusion.step_sources import Walker
from triptych.training.order import key
from triptych.training.quarantine import Quarantine
from triptych.training.references import unchanged

_DRIFT_PROMPTS = 8


class PathDrift:
    """Mean squared difference of the policy's and the base's predictions along the policy's held-out paths.

    Every held-out prompt has one path of the noisy sampler, from the same noise at every call, at most 8.
    """

    def __init__(self, run: OnlineRun, *, batch_size: int, seed: int):
        self._run, self._batch_size, self._seed = run, batch_size, seed

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> float:
        """The drift of the policy as it is."""
        port, frozen = self._run.port, self._run.rounds.frozen
        keys = [prompt_key(text) for text in self._run.studio.scene.prompts[:_DRIFT_PROMPTS]]
        noises = [torch.Generator().manual_seed(key("drift", self._seed, name)) for name in keys]
        device = next(policy.parameters()).device
        walker = Walker(policy=policy, port=port, device=device, batch_size=self._batch_size)
        states = torch.stack([torch.randn(port.shape, generator=g) for g in noises])
        total = 0.0
        with unchanged(policy):
            for step in range(walker.num_steps):
                own = walker.predict(keys, states, step)
                with frozen.active(policy) as base:
                    beside = Walker(policy=base, port=port, device=device, batch_size=self._batch_size)
                    other = beside.predict(keys, states, step)
                total += float((own - other).square().mean())
                noise = torch.stack([torch.randn(port.shape, generator=g) for g in noises])
                states, _ = walker.draw(states, own, step, noise)
        return total / walker.num_steps


def finish_online(
    run: OnlineRun,
    config: OnlineConfig,
    *,
    base: Pictures | None,
    drift: PathDrift,
    step: int,
    average: Mapping[str, Tensor],
    quarantine: Quarantine,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Bar,
) -> None:
    """Draw the aligned model's pictures, export it (and the average policy), and write report.html."""
    folder, studio = Path(config.run.output_dir), run.studio
    findings = Findings(tables=[], results={}, samples=[], figures=[])
    if base is not None:
        place = folder / "samples" / step_name(step)
        aligned = studio.pictures(place, weights_hash(run.policy), lambda total: bar("aligned", total))
        moved = Gallery(studio, folder, base, bar, drift).drift(run.policy)
        findings = compare(studio, base, aligned, folder=folder, step=step, drift=moved)
    publish_run(
        studio.scene,
        folder,
        findings,
        objective=run.rounds.stages[-1].main.terms.main.objective.spec.name,
        dataset=config.prompts.source,
        state=None,
        tags=["online"],
        quarantine_counts=quarantine.counts,
        settings=settings,
        command=command,
        versions=versions,
        report=report,
    )
    if average:
        _export_average(run, average, folder / "average_model")


@torch.no_grad()
def _export_average(run: OnlineRun, average: Mapping[str, Tensor], folder: Path) -> None:
    """The mean of the policies at the rounds' ends, as a model of its own."""
    named = dict(run.policy.named_parameters())
    now = {name: named[name].detach().clone() for name in average}
    for name, value in average.items():
        named[name].copy_(value)
    export_model(run.studio.scene, folder)
    for name, value in now.items():
        named[name].copy_(value)
