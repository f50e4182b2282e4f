"""Everything that the training of an image scorer needs, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.data import DiffusionData, load_data
from triptych.modalities.diffusion.draws import NoiseConfig, check_times
from triptych.modalities.diffusion.latent_reward import LatentReward, save_latent_reward
from triptych.modalities.diffusion.likelihood import Collator
from triptych.modalities.diffusion.model import (
    DTYPES,
    family,
    load_denoiser,
    load_scheduler,
    load_vae,
    locate,
)
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.schedule import Schedule, schedule_of
from triptych.modalities.diffusion.scorer_batches import (
    ClipPolicy,
    LatentCollator,
    LatentPolicy,
    PictureCollator,
    Sight,
    SightLikelihood,
    StepPolicy,
    check_pairs,
    fold,
)
from triptych.modalities.diffusion.scorer_config import ScorerConfig, ScorerTrainingConfig
from triptych.modalities.diffusion.scorer_data import (
    LatentPairs,
    PicturePair,
    PictureStore,
    load_pictures,
    weighted,
    without_ties,
)
from triptych.modalities.diffusion.scorer_outcome import TimeBin, eval_times, parts_of
from triptych.modalities.diffusion.setup import check_encoded, check_sizes
from triptych.modalities.diffusion.step_scorer import StepScorer, load_clip, save_step_scorer
from triptych.modalities.diffusion.steps import StepLikelihood
from triptych.modalities.diffusion.transitions import Ddim
from triptych.objectives import PairLogLik, Terms
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.logs import Progress
from triptych.training.loop import Task
from triptych.training.quarantine import Quarantine
from triptych.training.references import Likelihood, content_hash
from triptych.training.reward_run import RewardRun
from triptych.training.scoring import ScoreLikelihood

Export = Callable[[Path, Mapping[str, Tensor] | None], None]
SNIPPETS = {
    "clip": """from triptych.modalities.diffusion.image_scoring import build_scorer

scorer = build_scorer({'name': 'pickscore', 'options': {'name_or_path': '.'}})
""",
    "step": """from pathlib import Path

from triptych.modalities.diffusion.step_scorer import load_step_scorer

scorer = load_step_scorer(Path('.'))
""",
    "latent": """from pathlib import Path

from triptych.modalities.diffusion.latent_reward import load_latent_reward

reward = load_latent_reward(Path('.'))
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerRun:
    """A scorer on its way to training. bins: for a scorer that sees noise, where something is held out."""

    reward: RewardRun
    bins: tuple[TimeBin, ...] = ()


def set_up(
    config: ScorerTrainingConfig,
    terms: Terms,
    *,
    device: torch.device,
    cache_dir: Path,
    root: Path,
    quarantine: Quarantine,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> ScorerRun:
    """Models, data and tasks. root: folder of the project's own assets; cache_dir: where pictures are kept.

    ValueError (DataError among them) in one line for anything the user can mend.
    """
    if slots := terms.slots():
        raise ValueError(f"a scorer has no reference, and the objective reads {', '.join(slots)}")
    if config.scorer.type == "clip":
        return _set_up_clip(
            config, terms, device=device, cache_dir=cache_dir, quarantine=quarantine, report=report, bar=bar
        )
    return _set_up_noisy(config, terms, device=device, root=root, report=report)


def _set_up_clip(
    config: ScorerTrainingConfig,
    terms: Terms,
    *,
    device: torch.device,
    cache_dir: Path,
    quarantine: Quarantine,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> ScorerRun:
    """A scorer of clean pictures."""
    pictures, scorer = config.pictures, config.scorer
    assert pictures is not None
    processor = _image_processor(scorer)
    store = PictureStore.of(cache_dir, processor)
    seed = config.run.seed
    data = load_pictures(pictures, store, seed=seed, quarantine=quarantine, report=report, bar=bar)
    sample = data.train[0].sample
    _check_objective(terms, {n for n in ("strength", "margin") if getattr(sample, n) is not None})
    clip, tokenizer = _clip(scorer)
    if scorer.gradient_checkpointing:
        clip.gradient_checkpointing_enable()
    policy = ClipPolicy(clip, tokenizer)
    collate = PictureCollator(store)

    def task(pairs: tuple[PicturePair, ...], **options: Any) -> Task:
        return Task(
            likelihood=ScoreLikelihood(),
            terms=terms,
            references={},
            collate=collate,
            examples=pairs,
            lengths=[1] * len(pairs),
            sources=[p.source for p in pairs],
            **options,
        )

    def export(folder: Path, state: Mapping[str, Tensor] | None) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean_temporary(folder.parent)
        temporary = make_temporary(folder)
        for part in (clip, tokenizer, processor):
            part.save_pretrained(temporary)
        publish(temporary, folder)

    train = task(weighted(data.train), fold=fold) if scorer.weigh == "prompts" else task(data.train)
    reward = _reward(
        config,
        policy,
        train,
        task(data.held_out) if data.held_out else None,
        clusters=tuple(p.prompt for p in data.held_out),
        fingerprint=data.fingerprint,
        frozen="",
        export=export,
        device=device,
    )
    return ScorerRun(reward=reward)


@dataclass(frozen=True, slots=True)
class _Material:
    """What scorers of noised latents begin with. empty: the empty prompt, one row, if they are guided."""

    source: str
    schedule: Schedule
    noise: NoiseConfig
    data: DiffusionData
    denoiser: Any
    empty: Conditions | None


def _set_up_noisy(
    config: ScorerTrainingConfig,
    terms: Terms,
    *,
    device: torch.device,
    root: Path,
    report: Callable[[str], None],
) -> ScorerRun:
    """A scorer of noised latents, or of what a step sees of them."""
    scorer = config.scorer
    found = _material(config, terms, root=root, report=report)
    torch.manual_seed(config.run.seed)
    made = _step(config, found, device) if scorer.type == "step" else _latent(scorer, found)
    policy, likelihood, frozen, export = made
    data, collator = found.data, LatentCollator(Collator(schedule=found.schedule, noise=found.noise))

    def task(pairs: LatentPairs, collate: LatentCollator, **options: Any) -> Task:
        return Task(
            likelihood=likelihood,
            terms=terms,
            references={},
            collate=collate,
            examples=pairs,
            lengths=data.lengths(pairs.view),  # type: ignore[arg-type]
            sources=data.sources(pairs.view),
            **options,
        )

    if scorer.weigh == "prompts":
        train = task(LatentPairs.weighted(data.train), collator, fold=fold)
    else:
        train = task(LatentPairs(data.train), collator)
    held_out = None if data.held_out is None else LatentPairs(data.held_out)
    bins: list[TimeBin] = []
    if held_out is not None:
        for part in parts_of(found.noise, scorer.time_bins):
            own = LatentCollator(replace(collator.noise, noise=part))
            times = eval_times(part, found.schedule, len(held_out))
            bins.append(TimeBin(task=task(held_out, own), times=times))
    reward = _reward(
        config,
        policy,
        train,
        None if held_out is None else task(held_out, collator),
        clusters=data.eval_clusters,
        fingerprint=data.fingerprint,
        frozen=frozen,
        export=export,
        device=device,
    )
    return ScorerRun(reward=reward, bins=tuple(bins))


def _material(
    config: ScorerTrainingConfig, terms: Terms, *, root: Path, report: Callable[[str], None]
) -> _Material:
    """Data and denoiser, checked against each other before any weight is read."""
    model, encoded, scorer = config.model, config.data, config.scorer
    assert model is not None
    assert encoded is not None
    settings = model.model_config(trained=scorer.type == "latent")
    source = locate(settings, root=root)
    kind = family(source, revision=model.revision)
    schedule = schedule_of(load_scheduler(source, settings), prediction=model.prediction)
    noise = config.noise or NoiseConfig()
    check_times(noise, schedule)
    check_pairs(noise)
    if scorer.type == "step":
        # x_0-hat must exist at every time.
        schedule.check_space("x0", None)
    found = load_data(encoded.data_config(), ["pair"], seed=config.run.seed, report=report)
    data = without_ties(found)
    if ties := len(found.eval_clusters) - len(data.eval_clusters):
        report(f"data: {ties} held-out ties left out")
    check_encoded(data, kind, source)
    _check_objective(terms, set(data.train.keep))
    denoiser: Any = load_denoiser(source, settings)
    check_sizes(data, denoiser, source)
    empty = None
    if scorer.strength_of_guidance() > 1:
        pooled = data.empty.pooled
        empty = Conditions(data.empty.embeds[None], None if pooled is None else pooled[None])
    return _Material(source, schedule, noise, data, denoiser, empty)


# A policy, how it scores a batch, the hash of the models that only look, and how it is saved.
_Made = tuple[nn.Module, Likelihood, str, Export]


def _step(config: ScorerTrainingConfig, found: _Material, device: torch.device) -> _Made:
    """A step-aware scorer, and the frozen models that show it the steps."""
    model, scorer = config.model, config.scorer
    assert model is not None
    made = StepScorer.from_clip(*_clip(scorer), checkpointing=scorer.gradient_checkpointing)
    vae = load_vae(
        found.source,
        DTYPES[model.vae_dtype or "float32"],
        revision=model.revision,
        variant=model.variant,
    )
    frozen = f"{content_hash(found.denoiser)} {content_hash(vae)}"
    sight = Sight(
        denoiser=Denoiser(found.denoiser).to(device).eval().requires_grad_(False),
        vae=SimpleNamespace(vae=vae.to(device)),
        likelihood=StepLikelihood(
            schedule=found.schedule,
            # How the path goes on does not matter to what is seen of it.
            rule=Ddim(eta=1.0),
            guidance=scorer.strength_of_guidance(),
        ),
        empty=found.empty,
        size=made.image_size,
    )
    return StepPolicy(made), SightLikelihood(sight), frozen, lambda to, state: save_step_scorer(made, to)


def _latent(scorer: ScorerConfig, found: _Material) -> _Made:
    """A latent reward that begins as the denoiser."""
    text = found.data.empty.embeds if found.data.empty.pooled is None else found.data.empty.pooled
    made = LatentReward.from_unet(
        found.denoiser,
        text.shape[-1],
        guidance=scorer.strength_of_guidance(),
        multi_scale=scorer.multi_scale is None or scorer.multi_scale,
    ).requires_grad_(True)
    if scorer.gradient_checkpointing:
        made.unet.enable_gradient_checkpointing()
    policy = LatentPolicy(made, found.schedule, found.empty)
    return policy, ScoreLikelihood(), "", lambda to, state: save_latent_reward(made, to)


def _clip(scorer: ScorerConfig) -> tuple[Any, Any]:
    """(CLIPModel in float32, tokenizer)."""
    assert scorer.clip is not None
    clip, tokenizer = load_clip(scorer.clip, scorer.revision, tokenizer=scorer.processor)
    return clip.float().requires_grad_(True), tokenizer


def _image_processor(scorer: ScorerConfig) -> Any:
    from transformers import AutoImageProcessor

    assert scorer.clip is not None
    own = scorer.revision if scorer.processor is None else None
    where = scorer.processor or scorer.clip
    try:
        return AutoImageProcessor.from_pretrained(where, revision=own, backend="pil")
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"scorer.processor: cannot load the image processor of {where}: {reason}") from error


def _check_objective(terms: Terms, fields: set[str]) -> None:
    terms.check(PairLogLik, frozenset(fields), modality="diffusion")


def _reward(
    config: ScorerTrainingConfig,
    policy: nn.Module,
    task: Task,
    eval_task: Task | None,
    *,
    clusters: tuple[str, ...],
    fingerprint: str,
    frozen: str,
    export: Export,
    device: torch.device,
) -> RewardRun:
    """frozen: hash of the models that only look."""
    kind = config.scorer.type
    base = config.scorer.clip or (config.model.name_or_path if config.model else "")
    return RewardRun(
        policy=policy.to(device).train(),
        task=task,
        eval_task=eval_task,
        clusters=clusters,
        names=("preference",),
        fingerprint=fingerprint,
        base_hash=f"{content_hash(policy)} {frozen}".strip(),
        base_model=base,
        snippet=SNIPPETS[kind],
        export=export,
    )
