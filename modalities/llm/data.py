"""From a recipe's data section to tokenised training and held-out examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from triptych.modalities.llm.instructions import InstructionSettings
from triptych.modalities.llm.readers import fingerprint, read_records
from triptych.modalities.llm.records import Record
from triptych.modalities.llm.reviews import clothing_review_pairs
from triptych.modalities.llm.tokenization import Example, Examples, Limits, tokenize
from triptych.training.quarantine import DataError, Quarantine

REVIEWS = "clothing-reviews"
_HOLDOUT = 2**32


@dataclass(frozen=True, kw_only=True)
class ReviewSettings:
    """How pairs are made of the packaged clothing reviews."""

    num_train: int = 480
    num_eval: int = 160
    max_words: int = 50
    min_gap: int = 3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preference data.

    source: a file, a folder, a hub name, 'clothing-reviews', or, for rounds, the built-in 'instructions'.
    eval_source or eval_split name held-out data; without either, the share eval_fraction of contexts, chosen
    by a hash of the prompt, is held out.
    keep: optional fields of the records that the objective shall see ('strength', 'margin').
    strict: stop at the first bad record instead of leaving it out with a count.
    """

    source: str
    format: str = "auto"
    split: str = "train"
    eval_source: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.05
    revision: str | None = None
    data_root: str | None = None
    max_examples: int | None = None
    max_eval_examples: int | None = 500
    keep: list[Literal["strength", "margin"]] = field(default_factory=list)
    chat: Literal["auto", "always", "never"] = "auto"
    system_prompt: str | None = None
    limits: Limits = field(default_factory=Limits)
    reviews: ReviewSettings = field(default_factory=ReviewSettings)
    instructions: InstructionSettings = field(default_factory=InstructionSettings)
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction={self.eval_fraction} must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData:
    """Training and held-out examples with the records they were made from, of one kind.

    eval_clusters[i]: what held-out example i shares with others (item, prompt); intervals resample these.
    judge_texts, judge_labels: texts that no split trains or evaluates on, for a sentiment judge.
    """

    train: Examples
    held_out: Examples | None
    eval_records: tuple[Record, ...]
    eval_clusters: tuple[str, ...]
    fingerprint: str
    format: str
    judge_texts: tuple[str, ...] = ()
    judge_labels: tuple[bool, ...] = ()

    @property
    def kind(self) -> str:
        """'pair', 'list' or 'labelled'."""
        return self.train[0].kind


def load_data(
    config: DataConfig, tokenizer: Any, quarantine: Quarantine, *, seed: int, report: Callable[[str], None]
) -> TextData:
    """Read, check, split and tokenise. DataError or ValueError in one line for what cannot be used."""
    judge: tuple[tuple[str, ...], tuple[bool, ...]] = ((), ())
    known = ""
    if config.source == REVIEWS:
        settings = config.reviews
        found = clothing_review_pairs(
            seed=seed,
            num_train=settings.num_train,
            num_eval=settings.num_eval,
            max_words=settings.max_words,
            min_gap=settings.min_gap,
        )
        train, held_out, layout = found.train, found.eval, REVIEWS
        judge = (found.judge_texts, found.judge_labels)
        known = f"; correlation of label and length {found.length_correlation:.4f}"
    else:
        train, held_out, layout = read_split(config, quarantine, seed, report)
    report(f"data: {config.source} ({layout}), {len(train)} to train on, {len(held_out)} held out{known}")
    tokenised = tokenise_records(train, config, tokenizer, quarantine)
    evaluated = tokenise_records(held_out, config, tokenizer, quarantine) if held_out else None
    kinds = {e.kind for e in (*tokenised, *(evaluated or ()))}
    if len(kinds) > 1 or "prompt" in kinds:
        raise DataError(
            f"holds records of kinds {', '.join(sorted(kinds))}; one kind a run", source=config.source
        )
    by_source = {r.source: r for r in held_out}
    records = tuple(by_source[e.source] for e in evaluated) if evaluated else ()
    if quarantine.counts:
        report(f"left out: {quarantine.summary()}")
    return TextData(
        train=tokenised,
        held_out=evaluated,
        eval_records=records,
        eval_clusters=tuple(_cluster(r) for r in records),
        fingerprint=_joined(tokenised, evaluated),
        format=layout,
        judge_texts=judge[0],
        judge_labels=judge[1],
    )


def read_split(
    config: DataConfig, quarantine: Quarantine, seed: int, report: Callable[[str], None]
) -> tuple[Sequence[Record], Sequence[Record], str]:
    """Training and held-out records of a file, folder or hub data set, and the layout that was found."""

    def read(source: str, split: str, limit: int | None):
        return read_records(
            source,
            format=config.format,
            split=split,
            quarantine=quarantine,
            strict=config.strict,
            limit=limit,
            data_root=config.data_root,
            revision=config.revision,
        )

    everything = read(config.source, config.split, config.max_examples)
    if config.eval_source is not None or config.eval_split is not None:
        source = config.eval_source or config.source
        held_out = read(source, config.eval_split or config.split, config.max_eval_examples)
        known = {_content(r) for r in everything}
        kept = [r for r in held_out if _content(r) not in known]
        if not kept:
            raise DataError("holds no record that is not also trained on", source=source)
        if repeated := len(held_out) - len(kept):
            report(f"held out: {repeated} records left out of {source}, as they are trained on")
        return list(everything), kept, everything.format
    limit = config.eval_fraction * _HOLDOUT
    held = [r for r in everything if _place(r, seed) < limit]
    held_prompts = {_cluster(r) for r in held}
    train = [r for r in everything if _cluster(r) not in held_prompts]
    if not train:
        raise DataError("has nothing left to train on after holding out", source=config.source)
    return train, held[: config.max_eval_examples], everything.format


def tokenise_records(
    records: Sequence[Record], config: DataConfig, tokenizer: Any, quarantine: Quarantine
) -> Examples:
    """Token ids of records, as the data section says."""
    return tokenize(
        [_kept(r, config.keep) for r in records],
        tokenizer,
        config.limits,
        quarantine=quarantine,
        strict=config.strict,
        chat=config.chat,
        system_prompt=config.system_prompt,
    )


def _kept(record: Record, keep: Sequence[str]) -> Record:
    return replace(
        record,
        strength=record.strength if "strength" in keep else None,
        margin=record.margin if "margin" in keep else None,
    )


def _content(record: Record) -> str:
    """Hash of a record's texts and their order of preference, whatever else is known of them."""
    return fingerprint([replace(record, source="", tags={}, strength=None, margin=None)])


def _cluster(record: Record) -> str:
    """Records that share this are not independent: one item's reviews, or one prompt."""
    item = record.tags.get("rejected_item")
    return f"item {item}" if item is not None else str(record.prompt)


def _place(record: Record, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{record.prompt}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big")


def _joined(train: Examples, held_out: Examples | None) -> str:
    parts = [train.fingerprint, held_out.fingerprint if held_out else "-"]
    parts += [f"{e.strength} {e.margin}" for e in (*train, *(held_out or ()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example's shared row."""
    return [e.num_tokens for e in examples]
