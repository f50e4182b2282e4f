"""Everything a text run needs, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from triptych.modalities.llm.data import DataConfig, TextData, lengths, load_data
from triptych.modalities.llm.likelihood import INPUT_OF, Collator, TokenLikelihood, mismatched_candidates
from triptych.modalities.llm.model import ModelConfig, adapt, load_model, load_tokenizer, locate
from triptych.modalities.llm.policy import TokenPolicy, supported_sharing
from triptych.modalities.llm.tokenization import Example
from triptych.objectives import Terms
from triptych.training.config import EvaluationConfig, ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.logs import Progress
from triptych.training.loop import Task
from triptych.training.order import longest_first
from triptych.training.quarantine import Quarantine
from triptych.training.references import AdapterOff, Cached, FrozenCopy, Reference, content_hash
from triptych.training.values import ValueStore


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample generations of the base and the aligned model on held-out prompts, for the report.

    opening_words: words of the held-out candidate that are given to the model to continue.
    judges: measures of the generated text; 'sentiment' is fitted on texts that training never sees.
    """

    num_prompts: int = 8
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    opening_words: int = 0
    judges: list[Literal["vader", "sentiment"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        least_of = {"num_prompts": 0, "max_new_tokens": 1, "batch_size": 1, "opening_words": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"sample.{name}={getattr(self, name)} must be at least {least}")
        if self.temperature < 0:
            raise ValueError(f"sample.temperature={self.temperature} must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sample.top_p={self.top_p} must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A whole text run."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRun:
    """What `set_up` made: the policy on its way to training, its tasks, and the hash of its base model."""

    policy: TokenPolicy
    tokenizer: Any
    data: TextData
    task: Task
    eval_task: Task | None
    base_hash: str


def set_up(
    config: TextConfig,
    terms: Terms,
    *,
    device: torch.device,
    cache_dir: Path,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> TextRun:
    """Load model and data, check that the objective fits both, and make the references.

    Raises ValueError (DataError among them) in one line for anything the user can mend.
    """
    source = locate(config.model, cache_dir=cache_dir, report=report)
    tokenizer = load_tokenizer(source, config.model)
    data = load_data(config.data, tokenizer, quarantine, seed=config.run.seed, report=report)
    _check_judges(config.sample.judges, data)
    mismatched = data.kind == "labelled" and any("baseline" in t.objective.requires for t in terms.terms)
    public_length = data.kind == "pair" and any("head" in t.objective.requires for t in terms.terms)
    likelihood = TokenLikelihood(public_length=public_length)
    _check_kept(config.data.keep, data)
    terms.check(INPUT_OF[data.kind], _provided(data, mismatched, public_length), modality="llm")
    # Everything that can be refused without the weights has been.
    model = load_model(source, config.model)
    base_hash = content_hash(model)
    torch.manual_seed(config.run.seed)
    policy = TokenPolicy(adapt(model, config.model), impl=config.model.kernel).to(device)
    sharing = supported_sharing(policy, config.model.prefix_sharing)
    others = mismatched_candidates([*data.train, *(data.held_out or ())]) if mismatched else None
    collate = Collator(policy.row_cost(), tokenizer.pad_token_id, sharing, others)
    references = _references(config, terms, policy, base_hash, cache_dir)
    task = _task(data.train.examples, likelihood, terms, references, collate)
    held_out = (
        _task(data.held_out.examples, likelihood, terms, references, collate) if data.held_out else None
    )
    return TextRun(
        policy=policy,
        tokenizer=tokenizer,
        data=data,
        task=task,
        eval_task=held_out,
        base_hash=base_hash,
    )


def fill_references(
    run: TextRun,
    config: TextConfig,
    accelerator: Accelerator,
    *,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> None:
    """Compute what a cached reference lacks, in batches that do not depend on an interruption.

    Each rank takes its share and reads the others' from the store; where they share no storage, the reference
    computes what it misses later, batch by batch.
    """
    # The held-out batches are those of the evaluation, so that the untrained policy ties with its reference.
    sizes = (config.optim.micro_batch_size, config.evaluation.micro_batch_size)
    for reference in run.task.references.values():
        if not isinstance(reference, Cached):
            continue
        batches = [
            task.collate([task.examples[i] for i in cut], ())
            for task, size in zip((run.task, run.eval_task), sizes, strict=True)
            if task is not None
            for cut in _by_length(task.lengths, size)
        ]
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast(), bar("reference", len(mine)) as progress:
            total = 0
            for done, batch in enumerate(mine, start=1):
                total += reference.fill(run.task.likelihood, run.policy, [batch], accelerator.device)
                progress.update(done)
        reference.store.flush()
        accelerator.wait_for_everyone()
        reference.store.refresh()
        report(f"reference: {len(reference.store)} cached candidates, {total} computed now")


def _by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    order = longest_first(lengths)
    return [order[i : i + size] for i in range(0, len(order), size)]


def _check_judges(judges: Sequence[str], data: TextData) -> None:
    """Refuse, before training, a judge of samples that could not work after it."""
    packages = {"vader": ("vaderSentiment", "vaderSentiment"), "sentiment": ("sklearn", "scikit-learn")}
    for judge in judges:
        module, package = packages[judge]
        if find_spec(module) is None:
            raise ValueError(f"sample.judges={judge} needs the package {package}: pip install {package}")
        if judge == "sentiment" and not data.judge_texts:
            raise ValueError(
                "sample.judges=sentiment needs data with texts for a judge, such as clothing-reviews"
            )


def _check_kept(keep: Sequence[str], data: TextData) -> None:
    """Refuse a data.keep whose field the records do not have."""
    for name in keep:
        if any(getattr(e, name) is None for e in data.train):
            raise ValueError(f"data.keep={name}, but not every record has a {name}")


def _provided(data: TextData, mismatched: bool, public_length: bool) -> frozenset[str]:
    """Optional fields of the objective's input that this data and likelihood fill."""
    first = data.train[0]
    found = {"ref"} | {name for name in ("strength", "margin") if getattr(first, name) is not None}
    found |= {"baseline"} if mismatched else set()
    return frozenset(found | ({"head", "ref_head"} if public_length else set()))


def _references(
    config: TextConfig, terms: Terms, policy: TokenPolicy, base_hash: str, cache_dir: Path
) -> dict[str, Reference]:
    slots = terms.slots()
    if not slots:
        return {}
    if other := sorted(set(slots) - {"frozen"}):
        raise ValueError(f"reference slot {', '.join(other)} needs stages or rounds; here there is 'frozen'")
    frozen: Reference = AdapterOff() if config.model.reference == "adapter_off" else FrozenCopy.of(policy)
    if config.model.cache_reference:
        identity = f"{base_hash} {config.model.dtype} {config.optim.precision}"
        frozen = Cached(ValueStore(cache_dir / "references" / base_hash[:16]), identity, frozen)
    return {"frozen": frozen}


def _task(
    examples: Sequence[Example],
    likelihood: TokenLikelihood,
    terms: Terms,
    references: dict[str, Reference],
    collate: Collator,
) -> Task:
    return Task(
        likelihood=likelihood,
        terms=terms,
        references=references,
        collate=collate,
        examples=examples,
        lengths=lengths(examples),
        sources=[e.source for e in examples],
    )
