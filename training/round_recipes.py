"""A recipe's plug points as stages of rounds: the same for every modality, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from triptych.training.config import ObjectiveConfig
from triptych.training.judging import build_judge
from triptych.training.plugs import PlugConfig, Registry
from triptych.training.shapes import SHAPES, shape_for
from triptych.training.stages import Judge, Keep, Part, Shape, Source, Stage

AUTO = PlugConfig(name="auto")


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Samples of their own whose loss is added at every step: an anchor.

    weight: of its loss. batch_size: its samples a step. share: of a round's contexts. judge: none for
    objectives that need no verdict.
    """

    name: str
    source: PlugConfig
    objective: ObjectiveConfig
    judge: PlugConfig | None = None
    shape: PlugConfig = AUTO
    weight: float = 1.0
    batch_size: int | None = None
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """num_contexts: prompts of a round. num_epochs: passes over a round's samples."""

    num_rounds: int
    num_contexts: int
    num_epochs: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One of several stages: what differs from the recipe's own plug points; null leaves them as they are."""

    name: str
    source: PlugConfig | None = None
    judge: PlugConfig | None = None
    shape: PlugConfig | None = None
    objective: ObjectiveConfig | None = None
    anchors: list[PartConfig] | None = None
    keep: Keep | None = None
    rounds: RoundSettings | None = None


class HasRounds(Protocol):
    """The part of a modality's online recipe that says what its rounds are.

    shape 'auto' is the one that the objective asks for, so that a recipe may change its objective line alone.
    stages: several stages one after the other, each given by what differs; empty for one.
    """

    @property
    def source(self) -> PlugConfig:
        """What draws."""
        ...

    @property
    def judge(self) -> PlugConfig | None:
        """What judges."""
        ...

    @property
    def shape(self) -> PlugConfig:
        """What makes samples."""
        ...

    @property
    def objective(self) -> ObjectiveConfig:
        """What is minimised."""
        ...

    @property
    def anchors(self) -> list[PartConfig]:
        """Further parts."""
        ...

    @property
    def keep(self) -> Keep:
        """What becomes of the weights."""
        ...

    @property
    def rounds(self) -> RoundSettings:
        """How many and how large."""
        ...

    @property
    def stages(self) -> list[StageConfig]:
        """See the class."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugs:
    """What a modality's recipes may name, and the modality itself."""

    modality: str
    sources: Registry[Source]
    judges: Registry[Judge]


def stages_of(config: HasRounds, plugs: Plugs, *, has_critic: bool = False) -> list[Stage]:
    """The stages of a recipe; ValueError, with the reason, for what could not mean what it says."""
    single = StageConfig(name="rounds")
    return [_stage(config, s, plugs, has_critic) for s in config.stages or [single]]


def _stage(config: HasRounds, stage: StageConfig, plugs: Plugs, has_critic: bool) -> Stage:
    names = ("source", "judge", "shape", "objective", "anchors", "keep", "rounds")
    given = {n: getattr(stage, n) if getattr(stage, n) is not None else getattr(config, n) for n in names}
    main = PartConfig(
        name="main",
        source=given["source"],
        judge=given["judge"],
        shape=given["shape"],
        objective=given["objective"],
    )
    rounds: RoundSettings = given["rounds"]
    parts = [_part(p, plugs) for p in (main, *given["anchors"])]
    return Stage(
        name=stage.name,
        parts=tuple(parts),
        keep=given["keep"],
        num_rounds=rounds.num_rounds,
        num_contexts=rounds.num_contexts,
        num_epochs=rounds.num_epochs,
        has_critic=has_critic,
        modality=plugs.modality,
    )


def _part(config: PartConfig, plugs: Plugs) -> Part:
    terms = config.objective.terms()
    source: Source = plugs.sources.build(config.source.name, config.source.options)
    objectives = [t.objective for t in terms.terms]
    shape: Shape
    if config.shape.name == "auto":
        if config.shape.options:
            raise ValueError(
                f"shape 'auto' takes no options, not {', '.join(config.shape.options)}; name a shape"
            )
        shape = shape_for(*objectives, on_policy="logp" in source.provides)
    else:
        shape = SHAPES.build(config.shape.name, config.shape.options)
    return Part(
        source=source,
        judge=None if config.judge is None else build_judge(config.judge, plugs.judges),
        shape=shape,
        terms=terms,
        weight=config.weight,
        batch_size=config.batch_size,
        share=config.share,
        name=config.name,
    )
