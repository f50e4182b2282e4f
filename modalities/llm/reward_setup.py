"""Everything a text reward model's run needs: model, data, and the tasks to train and to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.llm.data import DataConfig, TextData, load_data
from triptych.modalities.llm.model import adapt, load_model, load_tokenizer, locate
from triptych.modalities.llm.ratings import (
    Rated,
    RatingsConfig,
    open_rows,
    ratings_fingerprint,
    read_ratings,
)
from triptych.modalities.llm.reward_model import (
    SEPARATOR,
    BodyConfig,
    Reads,
    RewardExample,
    RewardModel,
    collator_of,
    save_reward_model,
    with_reference_answer,
)
from triptych.modalities.llm.tokenization import Example, tokenize
from triptych.objectives import Terms
from triptych.training.feature_data import holds_out, standardised_ratings, standardised_sample
from triptych.training.loop import Task
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.references import content_hash
from triptych.training.reward_run import RewardRun
from triptych.training.scorers import Standardise
from triptych.training.scoring import INPUT_OF, ScoreLikelihood, ScoreSample

SNIPPET = """from pathlib import Path

import torch
from triptych.modalities.llm.reward_model import load_reward_model

reward = load_reward_model(Path('.'), device=torch.device('cpu'))
"""
Comparison = Literal["text", "gap"]


@dataclass(frozen=True, slots=True)
class _Examples:
    """What was read: samples to train and evaluate on, what each held-out one shares with others, a hash."""

    train: tuple[RewardExample, ...]
    held_out: tuple[RewardExample, ...]
    clusters: tuple[str, ...]
    fingerprint: str


def set_up_comparisons(
    kind: Comparison, body: BodyConfig, data: DataConfig, terms: Terms, *, seed: int, **surroundings: Any
) -> RewardRun:
    """A reward learnt from pairs or graded lists ('text'), or a gap over a reference answer ('gap').

    surroundings: as of `_set_up`. ValueError in one line for what the user can mend.
    """
    quarantine, report = surroundings["quarantine"], surroundings["report"]

    def read(tokenizer: Any) -> _Examples:
        found = load_data(data, tokenizer, quarantine, seed=seed, report=report)
        wanted = {"text": ("pair", "list"), "gap": ("pair",)}[kind]
        if found.kind not in wanted:
            raise ValueError(
                f"kind={kind} learns from {' or '.join(wanted)}s, and {data.source} has {found.kind}"
            )
        for name in data.keep:
            if kind == "gap" or any(getattr(e, name) is None for e in found.train):
                raise ValueError(f"data.keep={name}, but not every sample of kind {kind} has a {name}")
        return _compared(found, tokenizer, gap=kind == "gap")

    reads: Reads = "gap" if kind == "gap" else "answer"
    return _set_up(body, terms, read, names=(("gap",) if kind == "gap" else ("reward",)), reads=reads,
                   source=data.source, seed=seed, **surroundings)  # fmt: skip


def set_up_ratings(
    body: BodyConfig, ratings: RatingsConfig, terms: Terms, *, seed: int, **surroundings: Any
) -> RewardRun:
    """Several rewards learnt by regression on ratings; as `set_up_comparisons`."""
    quarantine = surroundings["quarantine"]

    def read(tokenizer: Any) -> _Examples:
        def of(source: str) -> list[Rated]:
            rows = open_rows(
                source, split=ratings.split, data_root=ratings.data_root, revision=ratings.revision
            )
            return read_ratings(rows, ratings, quarantine=quarantine)

        found, fraction = of(ratings.source), ratings.eval_fraction
        if ratings.eval_source is not None:
            known = {str(r.record.prompt) for r in found}
            held_out = [r for r in of(ratings.eval_source) if str(r.record.prompt) not in known]
        else:
            away = [holds_out(str(r.record.prompt), fraction=fraction, seed=seed) for r in found]
            held_out = [r for r, out in zip(found, away, strict=True) if out]
            found = [r for r, out in zip(found, away, strict=True) if not out]
        if not found:
            raise DataError("has nothing left to train on after holding out", source=ratings.source)
        surroundings["report"](f"data: {ratings.source}, {len(found)} to train on, {len(held_out)} held out")
        train = _tokenised(found, ratings, tokenizer, quarantine)
        evaluated = _tokenised(held_out, ratings, tokenizer, quarantine) if held_out else ()
        prompts = {r.record.source: str(r.record.prompt) for r in held_out}
        return _Examples(
            train=train,
            held_out=evaluated,
            clusters=tuple(prompts[e.source] for e in evaluated),
            fingerprint=ratings_fingerprint([*found, "-", *held_out]),
        )

    return _set_up(body, terms, read, names=tuple(ratings.attributes), reads="answer",
                   source=ratings.source, seed=seed, **surroundings)  # fmt: skip


def _set_up(
    body: BodyConfig,
    terms: Terms,
    read: Callable[[Any], _Examples],
    *,
    names: tuple[str, ...],
    reads: Reads,
    source: str,
    seed: int,
    device: torch.device,
    cache_dir: Path,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> RewardRun:
    """Load data, then model; check the objective before the weights are read."""
    config = body.model_config()
    folder = locate(config, cache_dir=cache_dir, report=report)
    tokenizer = load_tokenizer(folder, config)
    data = read(tokenizer)
    sample = data.train[0].sample
    fields = {name for name in ("margin", "strength") if getattr(sample, name) is not None}
    terms.check(
        INPUT_OF[sample.kind], frozenset(fields | ({"target"} if sample.ratings else set())), modality="llm"
    )
    model = load_model(folder, config)
    base_hash = content_hash(model)
    torch.manual_seed(seed)
    outputs = standardised_ratings([e.sample for e in data.train]) if sample.ratings else None
    policy = RewardModel(adapt(model, config), names=names, outputs=outputs).to(device)
    collate = collator_of(policy.model, tokenizer, body.prefix_sharing)

    def task(examples: Sequence[RewardExample]) -> Task:
        return Task(
            likelihood=ScoreLikelihood(),
            terms=terms,
            references={},
            collate=collate,
            examples=_in_model_units(examples, outputs),
            lengths=[e.num_tokens for e in examples],
            sources=[e.source for e in examples],
        )

    def export(target: Path, state: Mapping[str, Tensor] | None) -> None:
        save = partial(save_reward_model, policy, tokenizer, target, body=body, base_hash=base_hash)
        save(
            base_folder=folder,
            reads=reads,
            state=state,
            facts={"source": source, "objective": terms.main.objective.spec.name},
        )

    return RewardRun(
        policy=policy,
        task=task(data.train),
        eval_task=task(data.held_out) if data.held_out else None,
        clusters=data.clusters,
        names=names,
        fingerprint=data.fingerprint,
        base_hash=base_hash,
        base_model=body.name_or_path,
        snippet=SNIPPET,
        export=export,
        outputs=outputs,
    )


def _compared(data: TextData, tokenizer: Any, *, gap: bool) -> _Examples:
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]

    def made(examples: Sequence[Example]) -> tuple[RewardExample, ...]:
        if gap:
            return tuple(gap_example(e, separator, eos=tokenizer.eos_token_id) for e in examples)
        return tuple(_as_reward(e) for e in examples)

    return _Examples(
        train=made(data.train.examples),
        held_out=made(data.held_out.examples) if data.held_out else (),
        clusters=data.eval_clusters,
        fingerprint=f"{data.fingerprint} {separator if gap else ''}",
    )


def _as_reward(example: Example) -> RewardExample:
    sample = ScoreSample(
        id=example.id, grades=example.relevance, margin=example.margin, strength=example.strength
    )
    return RewardExample(sample, (example,), example.source)


@dataclass(frozen=True, slots=True)
class _Context:
    prompt_ids: Any
    candidate_ids: Sequence[Any]


def gap_example(example: Example, separator_ids: Sequence[int], *, eos: int) -> RewardExample:
    """A pair as PIT's four gaps: both answers over the rejected one, then both over the chosen one.

    In the candidates' order G(w, l), G(l, l), G(w, w), G(l, w), graded 1, 0, 0, -1: `pit_gap`'s five terms.
    """
    chosen, rejected = example.candidate_ids
    contexts = tuple(
        _Context(
            with_reference_answer(example.prompt_ids, reference, separator_ids, eos=eos), (chosen, rejected)
        )
        for reference in (rejected, chosen)
    )
    return RewardExample(ScoreSample(id=example.id, grades=(1.0, 0.0, 0.0, -1.0)), contexts, example.source)


def _tokenised(
    rated: Sequence[Rated], config: RatingsConfig, tokenizer: Any, quarantine: Quarantine
) -> tuple[RewardExample, ...]:
    ratings = {r.record.source: r.ratings for r in rated}
    found = tokenize(
        [r.record for r in rated],
        tokenizer,
        config.limits,
        quarantine=quarantine,
        strict=config.strict,
        chat=config.chat,
        system_prompt=config.system_prompt,
    )
    return tuple(
        RewardExample(ScoreSample(id=e.id, ratings=ratings[e.source]), (e,), e.source) for e in found
    )


def _in_model_units(
    examples: Sequence[RewardExample], outputs: Standardise | None
) -> Sequence[RewardExample]:
    """The samples with standardised ratings: attributes of different ranges weigh the same in the loss."""
    if outputs is None:
        return examples
    return [replace(e, sample=standardised_sample(e.sample, outputs)) for e in examples]
