"""What denoising paths bring to the rounds: records, batches, log-densities of steps, checkpoints.

Shapes: C candidates, U denoising steps of the longest one, Z latent channels, H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.latents import ImagePrompt, Latents, follows
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.step_batches import Trajectory, TrajectoryCollator
from triptych.modalities.diffusion.steps import Empty, StepBatch, StepLikelihood
from triptych.modalities.diffusion.transitions import Grid
from triptych.training.references import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPort:
    """The port of a denoiser that samples with noise at every step. One unit is one denoising step.

    grid: the sampler's steps. prompts: conditions of one row by a context's key. empty: the empty prompt, if
    and only if the likelihood is guided. shape: of a latent, (Z, H, W). decode: latents [N, Z, H, W] ->
    pictures [N, 3, 8 H, 8 W] or so in [-1, 1], for judges that look. base: the model that the readout 'kl'
    is measured to. States that candidates have in common are computed once.
    """

    likelihood: StepLikelihood
    grid: Grid
    prompts: Mapping[str, Conditions]
    shape: tuple[int, int, int]
    empty: Empty | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    base: Reference | None = None

    @property
    def bound(self) -> bool:
        """False: these are log-probs of what was drawn."""
        return False

    def key(self, context: ImagePrompt | Latents, candidate: Latents) -> str:
        """As in the batch's keys: prompt, states, times, rule, guidance and reduction."""
        return self.collate([(context, [candidate])], [0]).keys[0]

    def length(self, context: ImagePrompt | Latents, candidates: Sequence[Latents]) -> int:
        """Rows of the model: steps, less those of siblings, which share the state they leave."""
        shared = sum(follows(context, c) for c in candidates)
        return sum(len(c.states) - (not follows(context, c)) for c in candidates) - max(0, shared - 1)

    def collate(
        self, items: Sequence[tuple[ImagePrompt | Latents, Sequence[Latents]]], seeds: Sequence[int]
    ) -> StepBatch:
        """Contexts with their candidates, [C] in all; nothing is random. ValueError for an unknown prompt."""
        paths = [self._path(context, c) for context, candidates in items for c in candidates]
        return TrajectoryCollator(likelihood=self.likelihood, empty=self.empty)(paths)

    def terms(self, policy: Any, batch: StepBatch, generator: torch.Generator | None = None) -> Tensor:
        """Log-density of each step, [C, U], zero-padded."""
        return self.likelihood.terms(policy, batch, generator)

    def readouts(self, policy: Any, batch: StepBatch, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` and 'kl', the exact KL of each step to the base's, [C, U]; ValueError for another.

        One forward of the policy and one of the base. 'kl' is the mean over Z, H, W where the likelihood is.
        """
        if other := sorted(names - {"kl"}):
            raise ValueError(f"a denoiser has no {', '.join(other)}: choose an objective without")
        if self.base is None:
            raise ValueError("this port has no base model to measure 'kl' to; give it one (base: ...)")
        means = self.likelihood.means(policy, batch)
        found = {"logp": self.likelihood.densities(means, batch)}
        if "kl" in names:
            with self.base.active(policy) as base:
                others = self.likelihood.means(base, batch)
            found["kl"] = self.likelihood.divergence(means, others, batch)
        return found

    def pack(self, record: ImagePrompt | Latents) -> Mapping[str, Any]:
        """A record as tensors and JSON values."""
        return {f.name: getattr(record, f.name) for f in fields(record)}

    def unpack(
        self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]
    ) -> ImagePrompt | Latents:
        """The record that was packed."""
        return Latents(**packed) if "states" in packed else ImagePrompt(**packed)

    def _path(self, context: ImagePrompt | Latents, candidate: Latents) -> Trajectory:
        if context.key not in self.prompts:
            raise ValueError(f"context {context.key}: no conditions are known of its prompt")
        states, first = candidate.states, candidate.step
        if isinstance(context, Latents) and follows(context, candidate):
            states, first = torch.cat([context.states[-1:], states]), context.end
        last = first + len(states) - 1
        if last > len(self.grid.times):
            raise ValueError(f"context {context.key}: a path to step {last} of {len(self.grid.times)}")
        return Trajectory(
            id=context.key,
            states=states,
            times=tuple(self.grid.times[first:last].tolist()),
            next_times=tuple(self.grid.next_times[first:last].tolist()),
            prompt=self.prompts[context.key],
        )
