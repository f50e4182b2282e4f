"""The settings of an image scorer's training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from triptych.modalities.diffusion.data import DataConfig
from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.model import ModelConfig
from triptych.modalities.diffusion.sources import SourceConfig
from triptych.training.config import EvaluationConfig, ObjectiveConfig, OptimConfig, RunConfig

Keep = Literal["strength", "margin"]
Kind = Literal["clip", "step", "latent"]
# Kind -> the settings that it needs, and those that it may have.
NEEDED = {
    "clip": {"pictures", "scorer.clip"},
    "step": {"model", "data", "scorer.clip"},
    "latent": {"model", "data"},
}
OPTIONAL = {
    "clip": {"scorer.processor", "scorer.revision"},
    "step": {"noise", "scorer.processor", "scorer.revision", "scorer.guidance", "model.vae_dtype"},
    "latent": {"noise", "scorer.guidance", "scorer.multi_scale"},
}
GUIDANCE = {"step": 5.0, "latent": 7.5}


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Pairs of picture files. source, layout, split, image_root, max_records: see `SourceConfig`.

    eval_split: files of that split are held out, and their prompts not learnt from; without it the share
    eval_share of the prompts is. At most max_eval pairs are evaluated. ties: pairs of strength 1/2 are
    dropped, or learnt with both labels ('half'); held-out ones are left out, as no ranking of them is right.
    min_margin: pairs with a known margin below it are left out; a list makes all its pairs, the margin is the
    gap of their grades. keep: what the objective is given, besides the strength where ties are halved.
    num_workers: threads that open pictures, once, before the training; they change speed alone.
    """

    source: str
    layout: str = "auto"
    split: str = "train"
    eval_split: str | None = None
    image_root: str | None = None
    max_records: int | None = None
    ties: Literal["drop", "half"] = "half"
    min_margin: float = 0.0
    eval_share: float = 0.02
    max_eval: int = 512
    keep: list[Keep] = field(default_factory=list)
    num_workers: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"pictures.eval_share={self.eval_share} must be in [0, 1)")
        if self.max_eval < 0:
            raise ValueError(f"pictures.max_eval={self.max_eval} must be 0 or positive")
        if self.num_workers < 1:
            raise ValueError(f"pictures.num_workers={self.num_workers} must be at least 1")

    def of_split(self, split: str) -> SourceConfig:
        """What is read of a split."""
        names = ("source", "layout", "image_root", "max_records", "ties")
        return SourceConfig(split=split, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class EncodedConfig:
    """Pairs of an encoded data set (scripts/encode_images.py); the fields are those of `DataConfig`.

    Ties are learnt with both labels unless they are dropped; held-out ones are left out.
    """

    source: str
    pairs_of_list: Literal["all", "best_worst", "adjacent"] = "all"
    ties: Literal["drop", "half"] = "half"
    min_margin: float = 0.0
    eval_share: float = 0.02
    max_eval: int = 512
    max_train: int | None = None
    split_by: Literal["prompt", "group", "both"] = "prompt"
    empty_prompt: Literal["encoded", "zeros"] = "encoded"
    keep: list[Keep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data_config()

    def data_config(self) -> DataConfig:
        """As the training of models has it."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return DataConfig(form="pairs", dropout=0.0, **own)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """What is trained.

    type: 'clip' scores clean pictures (PickScore, Kirstain et al. 2023), 'step' the picture that a denoising
    step sees, told its time (SPO), 'latent' the noisy latent itself (LPO). clip, revision: the CLIPModel that
    it begins as, a hub name or a folder; processor: where tokenizer and image processor are, if elsewhere.
    guidance: of the step's prediction (null: 5), or of a latent reward's features (null: 7.5). multi_scale:
    see `LatentReward` (null: true). weigh 'prompts': every prompt counts the same, however many pairs it has.
    time_bins: parts of the noise's range whose accuracies are reported.
    """

    type: Kind
    clip: str | None = None
    revision: str | None = None
    processor: str | None = None
    guidance: float | None = None
    multi_scale: bool | None = None
    gradient_checkpointing: bool = False
    weigh: Literal["prompts", "pairs"] = "prompts"
    time_bins: int = 8

    def __post_init__(self) -> None:
        if self.guidance is not None and not self.guidance >= 1:
            raise ValueError(f"scorer.guidance={self.guidance} must be at least 1, which is without")
        if self.time_bins < 1:
            raise ValueError(f"scorer.time_bins={self.time_bins} must be at least 1")

    def strength_of_guidance(self) -> float:
        """The configured guidance, or the type's own."""
        return GUIDANCE.get(self.type, 1.0) if self.guidance is None else self.guidance


@dataclass(frozen=True, kw_only=True)
class StepModelConfig:
    """The diffusion model whose steps are scored: frozen, or what a latent reward begins as.

    For the fields see `ModelConfig`. vae_dtype: of its decoder (null: float32).
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_dtype: Literal["float32", "bfloat16"] | None = None
    prediction: Literal["auto", "epsilon", "v", "flow"] = "auto"

    def model_config(self, *, trained: bool) -> ModelConfig:
        """As the training of models has it."""
        names = ("name_or_path", "revision", "variant", "dtype", "prediction")
        own = {name: getattr(self, name) for name in names}
        return ModelConfig(lora=None, reference="frozen_copy", **own) if trained else ModelConfig(**own)


def bradley_terry() -> ObjectiveConfig:
    """-[p log sigmoid(s_w - s_l) + (1 - p) log sigmoid(s_l - s_w)], p the strength, one half for a tie.

    PickScore's and SPO's cross-entropy, but for their constant log 1/2 at ties.
    """
    return ObjectiveConfig(name="simpo", options={"beta": 1.0, "gamma": 0.0}, reference="none")


@dataclass(frozen=True, kw_only=True)
class ScorerTrainingConfig:
    """A whole training of an image scorer.

    pictures: for type 'clip'; model, data and noise for the others. objective: null for `bradley_terry`.
    """

    scorer: ScorerConfig
    optim: OptimConfig
    run: RunConfig
    pictures: PictureConfig | None = None
    model: StepModelConfig | None = None
    data: EncodedConfig | None = None
    noise: NoiseConfig | None = None
    objective: ObjectiveConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        kind = self.scorer.type
        needed, valid = NEEDED[kind], NEEDED[kind] | OPTIONAL[kind]
        for name in sorted(set[str]().union(*NEEDED.values(), *OPTIONAL.values())):
            given = self._given(name)
            if given and name not in valid:
                uses = ", ".join(sorted(valid))
                raise ValueError(f"scorer.type={kind} does not use {name}; it uses {uses}")
            if not given and name in needed:
                raise ValueError(f"scorer.type={kind} needs {name}")

    def _given(self, name: str) -> bool:
        value: Any = self
        for part in name.split("."):
            value = None if value is None else getattr(value, part)
        return value is not None

    def chosen_objective(self) -> ObjectiveConfig:
        """The configured objective, or Bradley and Terry's with ties."""
        return self.objective or bradley_terry()
