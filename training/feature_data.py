"""Preferences and ratings of feature vectors, from rows or tensors to checked samples.

A row is a pair, {chosen: [numbers], rejected: [numbers]} with an optional margin, strength, user, context and
prompt (its features: [numbers]), or a rated vector, {features: [numbers], ratings: {name: number or null}}.
strength is P(chosen preferred), 0.5 a tie. A safetensors file holds the same as tensors: features [M, D] with
pairs [P, 2] of its rows (chosen, rejected) and margin, strength, user, context [P], and prompts [Q, F] with
prompt [P], each pair's row of them; or with ratings [M, N], NaN where there is none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from triptych.training.feature_vectors import Standardise, Vectors
from triptych.training.order import key
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.scoring import ScoreBatch, ScoreSample, score_batch

_HOLDOUT = 2**63


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Where feature vectors with preferences or ratings come from.

    attributes: names of the ratings to predict; none for pairs. keep: what the objective sees of pairs, their
    margin or strength (1 where a row has none); without strength, ties are left out.
    extract: how rows of texts become vectors ('review_features': rows {reviews, chosen, rejected}).
    eval_source names held-out data; without it the share eval_fraction of contexts is held out, and of
    records without a context the share of distinct records.
    """

    source: str
    eval_source: str | None = None
    eval_fraction: float = 0.1
    split: str = "train"
    revision: str | None = None
    data_root: str | None = None
    attributes: list[str] = field(default_factory=list)
    keep: list[Literal["margin", "strength"]] = field(default_factory=list)
    extract: Literal["none", "review_features"] = "none"
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"features.eval_fraction={self.eval_fraction} must be in [0, 1)")
        if self.attributes and self.keep:
            raise ValueError("features.keep is of pairs, and features.attributes asks for ratings")
        if self.attributes and self.extract != "none":
            raise ValueError(f"features.extract={self.extract} makes pairs; leave features.attributes empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureExample:
    """One sample: the vectors of its candidates [K, D], whose preference it is, its prompt's features [F]."""

    sample: ScoreSample
    vectors: Tensor
    user: str | None
    context: str
    source: str
    prompt: Tensor | None = None

    @property
    def tied(self) -> bool:
        """Whether it prefers neither side, so that no ranking of it is right."""
        return self.sample.strength == 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureData:
    """Samples to train and to evaluate on; fingerprint: a hash of both."""

    train: tuple[FeatureExample, ...]
    held_out: tuple[FeatureExample, ...]
    fingerprint: str


def tensor_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a safetensors file, each with its place. DataError for one that is none or lacks parts."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError("is no safetensors file", source=path.name, remedy=str(error)) from error
    vectors = found.get("features")
    if vectors is None or vectors.ndim != 2 or not found.keys() & {"pairs", "ratings"}:
        names = ", ".join(found) or "nothing"
        remedy = f"it holds {names}; give features [M, D] with pairs [P, 2] or ratings [M, N]"
        raise DataError("lacks tensors", source=path.name, remedy=remedy)
    if "ratings" in found:
        for i, (vector, row) in enumerate(zip(vectors, found["ratings"].tolist(), strict=True)):
            ratings = [None if math.isnan(r) else r for r in row]
            yield f"{path.name}[{i}]", {"features": vector, "ratings": ratings}
        return
    pairs = found["pairs"].long()
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not bool(((pairs >= 0) & (pairs < len(vectors))).all()):
        remedy = f"pairs {tuple(pairs.shape)} are to be [P, 2] places among {len(vectors)} features"
        raise DataError("has pairs of no features", source=path.name, remedy=remedy)
    names = ("margin", "strength", "user", "context")
    more: dict[str, Sequence] = {name: found[name].tolist() for name in names if name in found}
    if found.keys() & {"prompt", "prompts"}:
        more["prompt"] = _prompts(found, len(pairs), path.name)
    for i, (chosen, rejected) in enumerate(pairs.tolist()):
        row = {"chosen": vectors[chosen], "rejected": vectors[rejected]}
        yield f"{path.name}[{i}]", row | {name: values[i] for name, values in more.items()}


def _prompts(found: Mapping[str, Tensor], num_pairs: int, name: str) -> Sequence[Tensor]:
    """Features of every pair's prompt."""
    table, place = found.get("prompts"), found.get("prompt")
    if table is None or table.ndim != 2 or place is None or place.shape != (num_pairs,):
        shapes = ", ".join(
            f"{n} {tuple(t.shape)}" for n, t in (("prompts", table), ("prompt", place)) if t is not None
        )
        remedy = f"it holds {shapes}; give prompts [Q, F] with prompt [{num_pairs}], each pair's row of them"
        raise DataError("lacks tensors", source=name, remedy=remedy)
    place = place.long()
    if not bool(((place >= 0) & (place < len(table))).all()):
        remedy = f"prompt is to hold places among {len(table)} prompts"
        raise DataError("has pairs of no prompt", source=name, remedy=remedy)
    return table[place]  # type: ignore[return-value]


def read_features(
    rows: Iterable[tuple[str, object]],
    config: FeatureConfig,
    *,
    quarantine: Quarantine,
    users: bool = False,
    prompts: bool = False,
) -> list[FeatureExample]:
    """The usable samples among rows; the others go to `quarantine`.

    users: whether each must name its user; prompts: whether each must have its prompt's features. DataError
    when none is left.
    """
    examples: list[FeatureExample] = []
    first: FeatureExample | None = None
    for place, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError("is not an object", source=place, preview=row)
            example = _example(row, place, config, users=users, prompts=prompts, first=first)
        except DataError as error:
            quarantine.add(error, strict=config.strict)
            continue
        first = first or example
        examples.append(example)
    if not examples:
        raise DataError("holds no usable record", source=config.source, remedy=quarantine.summary())
    return examples


def _example(
    row: Mapping,
    place: str,
    config: FeatureConfig,
    *,
    users: bool,
    prompts: bool,
    first: FeatureExample | None,
) -> FeatureExample:
    """A row as a sample; first: the one whose numbers of features it must have."""
    width = None if first is None else first.vectors.shape[1]
    if config.attributes:
        vectors = _vector(row, "features", place, width).unsqueeze(0)
        sample: dict[str, Any] = {"ratings": ratings_of(row.get("ratings"), config.attributes, place)}
    else:
        chosen = _vector(row, "chosen", place, width)
        vectors = torch.stack([chosen, _vector(row, "rejected", place, len(chosen))])
        if torch.equal(vectors[0], vectors[1]):
            raise DataError(
                "has equal candidates", source=place, remedy="no preference can be learnt from it"
            )
        margin = number_of(row.get("margin"), "margin", place) if "margin" in config.keep else None
        sample = {"grades": (1.0, 0.0), "margin": margin} | _strength(row, place, config)
    user = row.get("user")
    if users and not isinstance(user, (str, int)):
        raise DataError("is missing", source=place, field="user", remedy="name whose preference it is")
    prompt = _prompt(row, place, first) if prompts else None
    # Which side is chosen does not count: a pair and its reverse are never on two sides of the split.
    content = sorted(hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in vectors)
    name = str(user) if users else None
    context = str(row["context"]) if isinstance(row.get("context"), (str, int)) else " ".join(content)
    asked = "" if prompt is None else f" {prompt.tolist()}"
    own = hashlib.sha256(f"{name} {sample} {vectors.tolist()}{asked}".encode()).hexdigest()
    return FeatureExample(
        sample=ScoreSample(id=own, **sample),
        vectors=vectors,
        user=name,
        context=context,
        source=place,
        prompt=prompt,
    )


def _strength(row: Mapping, place: str, config: FeatureConfig) -> dict[str, float]:
    """P(chosen preferred) where the objective sees it; DataError for a tie where it does not."""
    given = row.get("strength")
    strength = 1.0 if given is None else number_of(given, "strength", place)
    if not 0.5 <= strength <= 1:
        remedy = "below one half, swap chosen and rejected and give 1 - strength"
        raise DataError("is not in [0.5, 1]", source=place, field="strength", remedy=remedy, preview=given)
    if "strength" in config.keep:
        return {"strength": strength}
    if strength == 0.5:
        raise DataError("is a tie", source=place, remedy="features.keep=[strength] learns from ties")
    return {}


def _prompt(row: Mapping, place: str, first: FeatureExample | None) -> Tensor:
    if row.get("prompt") is None:
        raise DataError("is missing", source=place, field="prompt", remedy="give the prompt's features")
    known = None if first is None else first.prompt
    return _vector(row, "prompt", place, None if known is None else len(known))


def _vector(row: Mapping, name: str, place: str, width: int | None) -> Tensor:
    value = row.get(name)
    if not isinstance(value, Tensor):
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if not listed or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in listed):
            raise DataError("is no list of numbers", source=place, field=name, preview=value)
        value = torch.tensor(value, dtype=torch.float32)
    value = value.float()
    if not bool(torch.isfinite(value).all()):
        raise DataError("has numbers that are not finite", source=place, field=name)
    if width is not None and len(value) != width:
        remedy = f"it has {len(value)} numbers, others before it {width}"
        raise DataError("has another length", source=place, field=name, remedy=remedy)
    return value


def number_of(value: Any, name: str, place: str) -> float:
    """A finite number; DataError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError("is no number", source=place, field=name, preview=value)
    return float(value)


def ratings_of(value: Any, attributes: Sequence[str], place: str) -> tuple[float | None, ...]:
    """The named ratings of a row, None where there is none; DataError where there is none at all."""
    listed = [value.get(name) for name in attributes] if isinstance(value, Mapping) else value
    if not isinstance(listed, Sequence) or len(listed) != len(attributes):
        remedy = f"give a number or null for {', '.join(attributes)}"
        raise DataError("are not as configured", source=place, field="ratings", remedy=remedy, preview=value)
    pairs = zip(listed, attributes, strict=True)
    found = tuple(None if v is None else number_of(v, f"ratings.{name}", place) for v, name in pairs)
    if all(v is None for v in found):
        raise DataError("are all missing", source=place, field="ratings")
    return found


def holds_out(context: str, *, fraction: float, seed: int) -> bool:
    """Whether a context is held out: a function of its content, so all of its records are on one side."""
    return key("holdout", seed, context) < fraction * _HOLDOUT


def split(
    examples: Sequence[FeatureExample],
    held_out: Sequence[FeatureExample] | None,
    *,
    fraction: float,
    seed: int,
) -> FeatureData:
    """Training and held-out samples; without data to hold out, a share of the contexts."""
    if held_out is None:
        away = [holds_out(e.context, fraction=fraction, seed=seed) for e in examples]
        held_out = [e for e, out in zip(examples, away, strict=True) if out]
        examples = [e for e, out in zip(examples, away, strict=True) if not out]
    else:
        known = {e.context for e in examples}
        held_out = [e for e in held_out if e.context not in known]
    if not examples:
        raise ValueError("nothing is left to train on after holding out; lower features.eval_fraction")
    names = [*(e.sample.id for e in examples), "-", *(e.sample.id for e in held_out)]
    fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return FeatureData(train=tuple(examples), held_out=tuple(held_out), fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class FeatureCollator:
    """Feature examples -> one batch. users: index of each user's name, or None where rewards are shared."""

    users: Mapping[str, int] | None = None

    def __call__(self, examples: Sequence[FeatureExample], draws: Sequence[object] = ()) -> ScoreBatch:
        """One batch, the candidates in order."""
        vectors = torch.cat([e.vectors for e in examples])
        sizes = torch.tensor([len(e.vectors) for e in examples])
        users = prompts = None
        if self.users is not None:
            users = torch.tensor([self.users[e.user or ""] for e in examples]).repeat_interleave(sizes)
        if examples[0].prompt is not None:
            prompts = prompts_of(examples).repeat_interleave(sizes, 0)
        keys = [f"{e.sample.id}:{k}" for e in examples for k in range(len(e.vectors))]
        return score_batch([e.sample for e in examples], Vectors(vectors, users, prompts), keys)


def standardised(examples: Sequence[FeatureExample]) -> Standardise:
    """Mean and spread of each feature over all candidates."""
    return Standardise.of(torch.cat([e.vectors for e in examples]))


def prompts_of(examples: Sequence[FeatureExample]) -> Tensor:
    """Features of each example's prompt, [B, F]; every one must have them."""
    found = [e.prompt for e in examples if e.prompt is not None]
    assert len(found) == len(examples)
    return torch.stack(found)


def standardised_ratings(samples: Sequence[ScoreSample]) -> Standardise:
    """Mean and spread of each attribute over the samples that rate it."""
    known = torch.tensor([[r is not None for r in s.ratings] for s in samples])
    return Standardise.of(torch.tensor([[r or 0.0 for r in s.ratings] for s in samples]), known)


def standardised_sample(sample: ScoreSample, outputs: Standardise) -> ScoreSample:
    """The sample with its ratings standardised: attributes of different ranges then weigh the same."""
    mean, scale = outputs.mean.tolist(), outputs.scale.tolist()
    ratings = zip(sample.ratings, mean, scale, strict=True)
    return replace(sample, ratings=tuple(None if r is None else (r - m) / s for r, m, s in ratings))
