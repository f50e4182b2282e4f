"""From pairs to scores: what an image scorer reads of a batch, and the modules whose scores are trained.

Shapes: B pairs, C = 2 B candidates (chosen, rejected, chosen, ...), R pixels of CLIP's square, N rows of one
latent shape, Z latent channels, H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.latent_reward import LatentReward
from triptych.modalities.diffusion.likelihood import Collator, DiffusionBatch, Stack
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.rollout import decoded
from triptych.modalities.diffusion.schedule import Schedule
from triptych.modalities.diffusion.scorer_data import LatentPair, PicturePair, PictureStore
from triptych.modalities.diffusion.step_scorer import StepScorer, clip_pixels
from triptych.modalities.diffusion.steps import StepLikelihood
from triptych.objectives import Input
from triptych.training.order import Draw
from triptych.training.scoring import ScoreBatch, ScoreLikelihood, score_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a CLIP reads: pixels [C, 3, R, R], the prompt of each, the times [C] that they are seen from.

    times: None for clean pictures. weights: of the pairs, [B].
    """

    pixels: Tensor
    texts: tuple[str, ...]
    weights: Tensor
    times: Tensor | None = None

    def to(self, device: torch.device) -> Seen:
        """On a device."""
        times = None if self.times is None else self.times.to(device)
        return Seen(
            pixels=self.pixels.to(device, non_blocking=True),
            texts=self.texts,
            weights=self.weights.to(device),
            times=times,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised:
    """Latents with the times and the noise that they get; texts: prompts of the C candidates.

    weights: of the pairs, [B].
    """

    latents: DiffusionBatch
    texts: tuple[str, ...]
    weights: Tensor

    def to(self, device: torch.device) -> Noised:
        """On a device."""
        return replace(self, latents=self.latents.to(device), weights=self.weights.to(device))


@dataclass(frozen=True, slots=True)
class PictureCollator:
    """Pairs of pictures -> ScoreBatch of `Seen`. Nothing is random."""

    store: PictureStore

    def __call__(self, pairs: Sequence[PicturePair], draws: Sequence[Draw] = ()) -> ScoreBatch:
        """One batch, the chosen one of each pair first."""
        pixels = self.store.pixels([name for p in pairs for name in p.names])
        seen = Seen(pixels=pixels, texts=_texts(pairs), weights=_weights(pairs))
        keys = [f"{p.sample.id}:{k}" for p in pairs for k in range(2)]
        return score_batch([p.sample for p in pairs], seen, keys)


@dataclass(frozen=True, slots=True)
class LatentCollator:
    """Pairs of latents -> ScoreBatch of `Noised`: one time and one noise a pair, from its draw's seed."""

    noise: Collator

    def __post_init__(self) -> None:
        check_pairs(self.noise.noise)

    def __call__(self, pairs: Sequence[LatentPair], draws: Sequence[Draw]) -> ScoreBatch:
        """One batch, the chosen one of each pair first."""
        latents = self.noise([p.example for p in pairs], draws)
        noised = Noised(latents=latents, texts=_texts(pairs), weights=_weights(pairs))
        return score_batch([p.sample for p in pairs], noised, latents.keys)


def check_pairs(noise: NoiseConfig) -> None:
    """ValueError unless the two of a pair get the same noise, at one time."""
    for name, needed in (("shared", True), ("num_draws", 1)):
        if getattr(noise, name) != needed:
            value = str(getattr(noise, name)).lower()
            raise ValueError(f"noise.{name}={value}: pairs are compared at one time with one noise")


def _texts(pairs: Sequence[PicturePair] | Sequence[LatentPair]) -> tuple[str, ...]:
    return tuple(p.prompt for p in pairs for _ in range(2))


def _weights(pairs: Sequence[PicturePair] | Sequence[LatentPair]) -> Tensor:
    return torch.tensor([p.weight for p in pairs], dtype=torch.float32)


def fold(rows: Tensor, batch: ScoreBatch) -> Tensor:
    """Losses and metrics of pairs times their weights, [B], so that their means are means over prompts."""
    return rows * batch.inputs.weights.to(rows.dtype)


def noisy_stacks(batch: DiffusionBatch, schedule: Schedule) -> list[tuple[Tensor, Tensor, Conditions]]:
    """x_t, times and conditions of the rows of each latent shape."""
    return [
        (
            schedule.add_noise(s.latents, s.noise, s.times),
            s.times,
            replace(batch.conditions.rows(s.prompt), time_ids=s.time_ids),
        )
        for s in batch.stacks
    ]


def in_order(parts: Sequence[Tensor], stacks: Sequence[Stack]) -> Tensor:
    """Values of the rows of each stack, in the order of the candidates, [C, *]."""
    return torch.cat(list(parts))[torch.cat([s.cell for s in stacks]).argsort()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a step-aware scorer sees of noised latents: x_0-hat, decoded, as CLIP's pixels. Nothing is learnt.

    x_0-hat comes from one evaluation of the denoiser, as in sampling: likelihood.guidance above 1 puts the
    rows of the empty prompt into the same batch. vae: what has the VAE (`rollout.decoded`). size: R.
    """

    denoiser: Denoiser
    vae: Any
    likelihood: StepLikelihood
    empty: Conditions | None
    size: int

    @torch.no_grad()
    def __call__(self, noised: Noised) -> Seen:
        """One evaluation and one decoding for each latent shape of the batch."""
        batch, schedule = noised.latents, self.likelihood.schedule
        noisy, times, conditions = zip(*noisy_stacks(batch, schedule), strict=True)
        predictions = self.likelihood.predict(self.denoiser, noisy, times, conditions, self.empty)
        pixels = [
            clip_pixels(decoded(self.vae, schedule.clean_and_noise(p.float(), x, t)[0]), self.size)
            for p, x, t in zip(predictions, noisy, times, strict=True)
        ]
        return Seen(
            pixels=in_order(pixels, batch.stacks),
            texts=noised.texts,
            weights=noised.weights,
            times=in_order(times, batch.stacks),
        )


@dataclass(frozen=True, slots=True)
class SightLikelihood:
    """`ScoreLikelihood` of what is seen of a batch. The frozen models stay outside of the policy."""

    sight: Sight

    def __call__(self, policy: Any, batch: ScoreBatch, generator: torch.Generator | None = None) -> Input:
        """PairLogLik of the batch."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(self, policy: Any, batch: ScoreBatch, generator: torch.Generator | None = None) -> Tensor:
        """Scores of every candidate, [C, 1]."""
        return policy(self.sight(batch.inputs))

    def assemble(self, terms: Tensor, batch: ScoreBatch) -> Input:
        """See `ScoreLikelihood`."""
        return ScoreLikelihood().assemble(terms, batch)


class ClipPolicy(nn.Module):
    """exp(logit_scale) cos(f(x), g(prompt)) of a transformers CLIPModel, [C, 1] (PickScore).

    Each different prompt is encoded once, cut at the tower's length.
    """

    def __init__(self, clip: Any, tokenizer: Any):
        super().__init__()
        # Not a module, so not in the state.
        self.scorer, self.tokenizer = clip, tokenizer

    def forward(self, seen: Seen) -> Tensor:
        """Scores in float32."""
        texts = list(dict.fromkeys(seen.texts))
        length = self.scorer.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        asked = {name: tokens[name].to(seen.pixels.device) for name in ("input_ids", "attention_mask")}
        rows = torch.tensor([texts.index(text) for text in seen.texts], device=seen.pixels.device)
        text = _unit(self.scorer.get_text_features(**asked))[rows]
        image = _unit(self.scorer.get_image_features(pixel_values=seen.pixels))
        return self.scorer.logit_scale.float().exp() * (image * text).sum(-1, keepdim=True)


def _unit(found: Any) -> Tensor:
    """transformers 5 gives an output object, transformers 4 the tensor."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return nn.functional.normalize(features.float(), dim=-1)


class StepPolicy(nn.Module):
    """A step-aware preference model's scores of what is seen, [C, 1]."""

    def __init__(self, scorer: StepScorer):
        super().__init__()
        self.scorer = scorer

    def forward(self, seen: Seen) -> Tensor:
        """Scores."""
        assert seen.times is not None
        return self.scorer.score(seen.pixels, seen.texts, seen.times).unsqueeze(-1)


class LatentPolicy(nn.Module):
    """A latent reward's scores of noised latents themselves, [C, 1]; one evaluation a latent shape.

    empty: the empty prompt, one row, if and only if the reward is guided.
    """

    def __init__(self, scorer: LatentReward, schedule: Schedule, empty: Conditions | None):
        super().__init__()
        self.scorer, self.schedule, self.empty = scorer, schedule, empty

    def forward(self, noised: Noised) -> Tensor:
        """Scores."""
        stacks = noisy_stacks(noised.latents, self.schedule)
        scores = [self.scorer.score(x, times, own, self.empty) for x, times, own in stacks]
        return in_order(scores, noised.latents.stacks).unsqueeze(-1)
