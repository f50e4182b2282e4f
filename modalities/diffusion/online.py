"""Online runs of a denoiser: a recipe's plug points as stages of rounds, checked before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from triptych.modalities.diffusion.gallery import Studio
from triptych.modalities.diffusion.latents import ImagePrompt
from triptych.modalities.diffusion.model import (
    ModelConfig,
    adapt,
    family,
    load_denoiser,
    load_pipeline,
    load_scheduler,
    locate,
)
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.prompts import PromptConfig, prompt_key, read_all_prompts
from triptych.modalities.diffusion.rollout import Embedded, SampleConfig, decoded, embed
from triptych.modalities.diffusion.scene import Scene
from triptych.modalities.diffusion.schedule import Schedule, schedule_of
from triptych.modalities.diffusion.step_judges import JUDGES
from triptych.modalities.diffusion.step_port import StepPort
from triptych.modalities.diffusion.step_sources import SOURCES
from triptych.modalities.diffusion.steps import StepLikelihood
from triptych.modalities.diffusion.transitions import Ddim, FlowSde, Grid, Reduction, ddim_grid, flow_grid
from triptych.training import round_recipes
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.plugs import PlugConfig
from triptych.training.references import AdapterOff, FrozenCopy, Reference, content_hash
from triptych.training.round_recipes import AUTO, PartConfig, Plugs, RoundSettings, StageConfig
from triptych.training.rounds import Rounds
from triptych.training.stages import Keep, Stage

PLUGS = Plugs(modality="diffusion", sources=SOURCES, judges=JUDGES)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The noisy sampler that draws what is trained on, and whose steps have the log-probs.

    guidance: classifier-free guidance in drawing and in training alike, of policy and reference; 1 is
    without, at half the cost. eta: noise of a diffusion model's DDIM steps; noise_level: of a flow model's
    steps as an SDE (`FlowSde`). reduction: of log-probs over a latent's numbers. height, width: pixels; null
    is what the model was made for.
    """

    num_steps: int = 20
    guidance: float = 5.0
    eta: float = 1.0
    noise_level: float = 0.7
    reduction: Reduction = "mean"
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"sampler.num_steps={self.num_steps} must be at least 1")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise ValueError(f"sampler.{name}={value} must be a positive multiple of 8, or null")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """A whole online run: draw -> judge -> shape -> step -> keep, one line a plug point.

    shape 'auto' is the one that the objective asks for. stages: several stages one after the other, each
    given by what differs. sample: pictures of held-out prompts by the model's own sampler, before and after.
    """

    model: ModelConfig
    prompts: PromptConfig
    source: PlugConfig
    objective: ObjectiveConfig
    rounds: RoundSettings
    optim: OptimConfig
    run: RunConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: PlugConfig | None = None
    shape: PlugConfig = AUTO
    keep: Keep = field(default_factory=Keep)
    anchors: list[PartConfig] = field(default_factory=list)
    stages: list[StageConfig] = field(default_factory=list)
    sample: SampleConfig = field(default_factory=SampleConfig)


def stages_of(config: OnlineConfig) -> list[Stage]:
    """The stages of a recipe; ValueError, with the reason, for what could not mean what it says."""
    if config.model.cache_reference:
        raise ValueError("model.cache_reference: rounds keep each round's reference values by themselves")
    if config.optim.num_steps is not None or config.optim.num_epochs != 1:
        raise ValueError(
            "optim.num_steps, optim.num_epochs: rounds.num_rounds and rounds.num_epochs decide on the length"
        )
    if config.sample.num_prompts and not (config.prompts.eval_source or config.prompts.eval_share):
        raise ValueError(
            "no prompt is held out for pictures: set prompts.eval_share, or sample.num_prompts=0"
        )
    return round_recipes.stages_of(_on_this_sampler(config), PLUGS)


def _on_this_sampler(config: OnlineConfig) -> OnlineConfig:
    """The recipe whose sources know the sampler's number of steps."""

    def told(plug: PlugConfig) -> PlugConfig:
        return replace(plug, options={"num_steps": config.sampler.num_steps, **plug.options})

    def of_parts(parts: Sequence[PartConfig]) -> list[PartConfig]:
        return [replace(p, source=told(p.source)) for p in parts]

    stages = [
        replace(
            s,
            source=None if s.source is None else told(s.source),
            anchors=None if s.anchors is None else of_parts(s.anchors),
        )
        for s in config.stages
    ]
    return replace(config, source=told(config.source), anchors=of_parts(config.anchors), stages=stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRun:
    """What `set_up_online` made. fingerprint: hash of all prompts."""

    policy: Denoiser
    port: StepPort
    rounds: Rounds
    studio: Studio
    base_hash: str
    fingerprint: str


def set_up_online(
    config: OnlineConfig,
    stages: Sequence[Stage],
    *,
    device: torch.device,
    root: Path,
    report: Callable[[str], None],
) -> OnlineRun:
    """Load prompts and model, and put the rounds together. ValueError for what a user can mend."""
    source = locate(config.model, root=root)
    kind = family(source, revision=config.model.revision)
    scheduler = load_scheduler(source, config.model)
    schedule = schedule_of(scheduler, prediction=config.model.prediction)
    likelihood = StepLikelihood(
        schedule=schedule,
        rule=rule_of(schedule, scheduler, config.sampler),
        guidance=config.sampler.guidance,
        reduction=config.sampler.reduction,
    )
    train, held_out = read_all_prompts(config.prompts, num_held_out=config.sample.num_prompts)
    report(f"prompts: {len(train)} to train on, {len(held_out)} held out and drawn")
    model: Any = load_denoiser(source, config.model)
    base_hash = content_hash(model)
    torch.manual_seed(config.run.seed)
    policy = Denoiser(adapt(model, config.model)).to(device)
    frozen: Reference = AdapterOff() if config.model.reference == "adapter_off" else FrozenCopy.of(policy)
    pipeline, embedded = _embedded(source, config.model, policy, [*train, *held_out])
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    side = model.config["sample_size"] * factor
    height, width = config.sampler.height or side, config.sampler.width or side
    scene = Scene(
        policy=policy,
        source=source,
        family=kind,
        base_hash=base_hash,
        model=config.model,
        sample=config.sample,
        precision=config.optim.precision,
        prompts=tuple(held_out),
        resolution=None if config.sampler.height is None else height,
        seed=config.run.seed,
    )
    time_ids = torch.tensor([[height, width, 0, 0, height, width]]).float() if kind == "sdxl" else None
    port = StepPort(
        likelihood=likelihood,
        grid=grid_of(schedule, scheduler, config.sampler.num_steps),
        prompts=_conditions(embedded, time_ids),
        shape=(model.config["in_channels"], height // factor, width // factor),
        empty=None if config.sampler.guidance == 1 else _empty(embedded),
        decode=partial(decoded, pipeline),
        base=frozen,
    )
    contexts = [ImagePrompt(key=prompt_key(text), text=text) for text in train]
    fingerprint = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()
    return OnlineRun(
        policy=policy,
        port=port,
        rounds=Rounds(stages=stages, contexts=contexts, port=port, frozen=frozen),
        studio=Studio(scene, made=(pipeline, _last(embedded, len(held_out)))),
        base_hash=base_hash,
        fingerprint=fingerprint,
    )


def rule_of(schedule: Schedule, scheduler: Any, config: SamplerConfig) -> Ddim | FlowSde:
    """The noisy step that goes with the model: `FlowSde` of a flow, otherwise `Ddim`."""
    if schedule.is_flow:
        return FlowSde(noise_level=config.noise_level)
    clean = bool(scheduler.config.get("set_alpha_to_one", False))
    final: Literal["clean", "first"] = "clean" if clean else "first"
    return Ddim(eta=config.eta, final=final)


def grid_of(schedule: Schedule, scheduler: Any, num_steps: int) -> Grid:
    """The times of the model's own sampler."""
    if schedule.is_flow:
        return flow_grid(num_steps, num_times=schedule.num_times, shift=schedule.shift)
    spacing = scheduler.config.get("timestep_spacing", "leading")
    offset = int(scheduler.config.get("steps_offset", 0)) if spacing == "leading" else 0
    return ddim_grid(num_steps, num_times=schedule.num_times, spacing=spacing, offset=offset)


def _embedded(
    source: str, config: ModelConfig, policy: Denoiser, prompts: Sequence[str]
) -> tuple[Any, Embedded]:
    """The pipeline around the policy, without text encoders, and what they made of the prompts."""
    pipeline = load_pipeline(source, config, denoiser=policy.model)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    device = next(policy.parameters()).device
    for part in parts.values():
        if part is not policy.model:
            part.to(device)
    embedded = embed(pipeline, prompts)
    pipeline.register_modules(**{name: None for name in parts if name.startswith("text_encoder")})
    return pipeline, embedded


def _conditions(embedded: Embedded, time_ids: torch.Tensor | None) -> Mapping[str, Conditions]:
    """Conditions of one row of every prompt, by its key."""
    embeds, pooled = (embedded.tensors.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds"))
    assert embeds is not None
    return {
        prompt_key(text): Conditions(
            embeds[i : i + 1], None if pooled is None else pooled[i : i + 1], time_ids
        )
        for i, text in enumerate(embedded.prompts)
    }


def _empty(embedded: Embedded) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The empty prompt as the pipeline has it: SDXL's is zeros."""
    pooled = embedded.tensors.get("negative_pooled_prompt_embeds")
    return embedded.tensors["negative_prompt_embeds"][0], None if pooled is None else pooled[0]


def _last(embedded: Embedded, num: int) -> Embedded:
    first = len(embedded) - num
    return Embedded(embedded.prompts[first:], {n: t[first:] for n, t in embedded.tensors.items()})
