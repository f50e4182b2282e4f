"""Online runs of a language model: a recipe's plug points as stages of rounds, checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from triptych.modalities.llm.critic import CriticConfig, TokenCritic
from triptych.modalities.llm.data import DataConfig
from triptych.modalities.llm.model import ModelConfig, adapt, load_model, load_tokenizer, locate
from triptych.modalities.llm.plugs import PLUGS
from triptych.modalities.llm.policy import TokenPolicy, supported_sharing
from triptych.modalities.llm.port import TextPort
from triptych.modalities.llm.prompt_data import PromptData, load_prompts
from triptych.modalities.llm.sources import own_temperatures
from triptych.modalities.llm.turn_metrics import turn_metrics
from triptych.training import round_recipes
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.plugs import PlugConfig
from triptych.training.quarantine import Quarantine
from triptych.training.references import AdapterOff, FrozenCopy, Reference, content_hash
from triptych.training.round_recipes import AUTO, PartConfig, RoundSettings, StageConfig
from triptych.training.rounds import Rounds
from triptych.training.stages import Keep, Stage


@dataclass(frozen=True, kw_only=True)
class OnlineEvaluation:
    """Held-out prompts that the policy answers at run.eval_every and at the end.

    They are judged by the recipe's own judge ('reward') and by further_judges, by name: parts of the reward,
    or judges that training never sees, which tell a real gain from a hacked reward. best_of: also the best of
    so many answers of the base by the recipe's judge, the bar that sampling alone sets.
    """

    num_prompts: int = 64
    max_new_tokens: int = 48
    temperature: float = 1.0
    batch_size: int = 64
    best_of: int = 4
    further_judges: dict[str, PlugConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"num_prompts": 0, "max_new_tokens": 1, "batch_size": 1, "best_of": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least {least}")
        if self.temperature < 0:
            raise ValueError(f"evaluation.temperature={self.temperature} must be 0 (greedy) or positive")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """A whole online run: draw -> judge -> shape -> step -> keep, one line a plug point.

    shape 'auto' is the one that the objective asks for, so that a recipe may change its objective line alone.
    stages: several stages one after the other, each given by what differs; empty for one.
    """

    model: ModelConfig
    data: DataConfig
    source: PlugConfig
    objective: ObjectiveConfig
    rounds: RoundSettings
    optim: OptimConfig
    run: RunConfig
    judge: PlugConfig | None = None
    shape: PlugConfig = AUTO
    keep: Keep = field(default_factory=Keep)
    anchors: list[PartConfig] = field(default_factory=list)
    critic: CriticConfig | None = None
    stages: list[StageConfig] = field(default_factory=list)
    evaluation: OnlineEvaluation = field(default_factory=OnlineEvaluation)


def stages_of(config: OnlineConfig) -> list[Stage]:
    """The stages of a recipe; ValueError, with the reason, for what could not mean what it says."""
    _check_settings(config)
    stages = round_recipes.stages_of(config, PLUGS, has_critic=config.critic is not None)
    if config.critic is not None and not any(
        "value" in t.objective.uses for s in stages for p in s.parts for t in p.terms.terms
    ):
        raise ValueError("a critic is given, but no objective trains it: add ppo_value or oreo_value")
    return stages


def _check_settings(config: OnlineConfig) -> None:
    """Refuse what other runs read and rounds do not."""
    if config.model.cache_reference:
        raise ValueError("model.cache_reference: rounds keep each round's reference values by themselves")
    if config.optim.num_steps is not None or config.optim.num_epochs != 1:
        raise ValueError(
            "optim.num_steps, optim.num_epochs: rounds.num_rounds and rounds.num_epochs decide on the length"
        )
    if config.data.keep:
        raise ValueError(
            f"data.keep={', '.join(config.data.keep)}: rounds take labels from the judge and the shape"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRun:
    """What `set_up_online` made."""

    policy: TokenPolicy
    tokenizer: Any
    data: PromptData
    rounds: Rounds
    base_hash: str


def set_up_online(
    config: OnlineConfig,
    stages: Sequence[Stage],
    *,
    device: torch.device,
    cache_dir: Path,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> OnlineRun:
    """Load prompts and model, and put the rounds together. ValueError for what a user can mend."""
    source = locate(config.model, cache_dir=cache_dir, report=report)
    tokenizer = load_tokenizer(source, config.model)
    data = load_prompts(config.data, tokenizer, quarantine, seed=config.run.seed, report=report)
    if config.evaluation.num_prompts and not data.held_out:
        raise ValueError(
            "no prompt is held out for evaluation: set data.eval_fraction, or evaluation.num_prompts=0"
        )
    temperature = _temperature(stages)
    model = load_model(source, config.model)
    base_hash = content_hash(model)
    torch.manual_seed(config.run.seed)
    policy = TokenPolicy(adapt(model, config.model), impl=config.model.kernel)
    sharing = supported_sharing(policy, config.model.prefix_sharing)
    # Of the policy before it has a critic: a frozen copy of values would be memory for nothing.
    frozen: Reference = AdapterOff() if config.model.reference == "adapter_off" else FrozenCopy.of(policy)
    if config.critic is not None:
        body = (
            adapt(load_model(source, config.model), config.model) if config.critic.kind == "model" else None
        )
        policy.critic = TokenCritic(policy.causal_lm.config.get_text_config().hidden_size, body)
    policy.temperature = temperature
    if isinstance(frozen, FrozenCopy):
        frozen.model.temperature = temperature  # type: ignore[assignment]
        frozen.model.to(device)
    policy = policy.to(device)
    port = TextPort(tokenizer=tokenizer, cost=policy.row_cost(), sharing=sharing)
    return OnlineRun(
        policy=policy,
        tokenizer=tokenizer,
        data=data,
        rounds=Rounds(stages=stages, contexts=data.train, port=port, frozen=frozen, observe=turn_metrics),
        base_hash=base_hash,
    )


def _temperature(stages: Sequence[Stage]) -> float:
    """The one temperature at which samples of the policy are drawn; 1 where none are."""
    found = {t for s in stages for p in s.parts for t in own_temperatures(p.source)}
    if len(found) > 1:
        text = ", ".join(f"{t:g}" for t in sorted(found))
        raise ValueError(f"sources draw from the policy at temperatures {text}: it has one, choose one")
    return found.pop() if found else 1.0
