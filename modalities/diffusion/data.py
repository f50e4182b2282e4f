"""Training data of a diffusion run: an encoded data set, split by prompt or person, in the form asked for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch

from triptych.modalities.diffusion.likelihood import Example, Kind
from triptych.modalities.diffusion.shards import EncodedDataset, EncodedPrompt, prompt_hash
from triptych.training.order import key
from triptych.training.quarantine import DataError

Form = Literal["auto", "pairs", "lists", "labelled", "winners"]
_KIND_OF: dict[str, Kind] = {"pairs": "pair", "lists": "list", "labelled": "labelled", "winners": "single"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from. source: a folder that scripts/encode_images.py wrote.

    form: 'pairs', 'lists', 'labelled' (each image desirable or not, for KTO), 'winners' (the best image of
    each context, for sft); 'auto' is what the objective takes. pairs_of_list: which pairs a list makes.
    ties: pairs of strength 1/2 are dropped, or learnt with both labels ('half'). min_margin: pairs with a
    known margin below it are left out. eval_share: of the prompts (or persons: split_by 'group') that are
    held out, whole; 'both' holds out persons and prompts, evaluates the new ones of one on those of the
    other, and leaves out what is new in one respect alone. dropout: probability that a context is learnt
    under the empty prompt. empty_prompt: its embeddings as the encoders give them, or zeros (SDXL-base's
    pipeline uses zeros when it samples).
    desirable: for lists as labelled images, the relevance from which one is (None: its list's mean). keep:
    fields of pairs that the objective is given: 'strength' (always where ties are halved), 'margin'.
    """

    source: str
    form: Form = "auto"
    pairs_of_list: Literal["all", "best_worst", "adjacent"] = "all"
    ties: Literal["drop", "half"] = "drop"
    min_margin: float = 0.0
    eval_share: float = 0.02
    max_eval: int = 512
    max_train: int | None = None
    split_by: Literal["prompt", "group", "both"] = "prompt"
    dropout: float = 0.2
    empty_prompt: Literal["encoded", "zeros"] = "encoded"
    desirable: float | None = None
    keep: list[Literal["strength", "margin"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"data.form={self.form} is not one of {', '.join(get_args(Form))}")
        for name in ("eval_share", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be in [0, 1)")
        if self.max_eval < 0 or (self.max_train is not None and self.max_train < 1):
            raise ValueError("data.max_eval must be 0 or positive, data.max_train at least 1")


@dataclass(frozen=True, slots=True)
class View(Sequence[Example]):
    """Contexts of a data set as examples of one kind, read when asked for.

    records: index of each example's record, [n]. picks: which of its images, in order, [n, K], -1 for none.
    keep: optional fields that the examples fill.
    """

    dataset: EncodedDataset
    kind: Kind
    records: np.ndarray
    picks: np.ndarray
    desirable: float | None = None
    keep: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """One example with its latents and prompt embeddings."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        record = self.dataset.record(int(self.records[index]))
        chosen = [int(k) for k in self.picks[index] if k >= 0]
        mean, logvar = self.dataset.latents(record, chosen)
        prompt = self.dataset.prompt(record)
        hashed = prompt_hash(record["prompt"])
        return Example(
            id=f"{record['id']}{_suffix(record, chosen)}",
            source=record["source"],
            kind=self.kind,
            latents=mean,
            logvar=logvar,
            embeds=prompt.embeds,
            pooled=prompt.pooled,
            time_ids=torch.tensor([record["time_ids"][k] for k in chosen], dtype=torch.float32),
            relevance=self._relevance(record, chosen),
            keys=tuple(_content(record, k, hashed) for k in chosen),
            strength=_strength(record) if "strength" in self.keep else None,
            margin=_margin(record, chosen) if "margin" in self.keep else None,
            group=record["group"],
        )

    def _relevance(self, record: dict[str, Any], chosen: Sequence[int]) -> tuple[float, ...]:
        grades = record["relevance"]
        if self.kind != "labelled":
            return tuple(float(grades[k]) for k in chosen)
        if record["kind"] == "pair":
            return tuple(float(k == 0) for k in chosen)
        least = self.desirable
        if least is None:
            least = sum(grades) / len(grades) if len(grades) > 1 else 0.5
        return tuple(float(grades[k] >= least) for k in chosen)


def _strength(record: dict[str, Any]) -> float:
    stored = record["strength"] if record["kind"] == "pair" else None
    return 1.0 if stored is None else float(stored)


def _margin(record: dict[str, Any], chosen: Sequence[int]) -> float:
    if record["kind"] == "pair" and record["margin"] is not None:
        return float(record["margin"])
    if record["kind"] == "pair":
        raise DataError(
            "has no margin", source=record["source"], field="margin", remedy="leave it out of data.keep"
        )
    first, second = chosen
    return float(record["relevance"][first] - record["relevance"][second])


class _Sources(Sequence[str]):
    """Where each example came from, looked up when a message needs it."""

    def __init__(self, view: View):
        self._view = view

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: Any) -> Any:
        return self._view.dataset.record(int(self._view.records[index]))["source"]


@dataclass(frozen=True, slots=True)
class DiffusionData:
    """Examples to learn from and to evaluate on, and the prompts that pictures are made of.

    eval_clusters: prompt or person of each held-out example. eval_prompts: held out, too, unless nothing is;
    then they are the first ones learnt from. shape: [Z, H, W] of the first example's latents.
    """

    kind: Kind
    train: View
    held_out: View | None
    eval_clusters: tuple[str, ...]
    eval_prompts: tuple[str, ...]
    empty: EncodedPrompt
    shape: tuple[int, ...]
    fingerprint: str
    facts: dict[str, Any]

    def lengths(self, view: View) -> np.ndarray:
        """Cost of each example: latent numbers times images, [n]; equal shapes have equal costs."""
        return _costs(view)

    def sources(self, view: View) -> Sequence[str]:
        """Where each example came from."""
        return _Sources(view)


def load_data(
    config: DataConfig,
    kinds: Sequence[Kind],
    *,
    seed: int,
    report: Callable[[str], None],
    persons: Container[str | None] | None = None,
) -> DiffusionData:
    """The data in the first of `kinds` that it can take, or as config.form says.

    persons: whose contexts are taken; None takes all, and those of nobody known. ValueError when the data
    cannot take the form, or when nothing is left to learn from.
    """
    dataset = EncodedDataset(Path(config.source))
    kind = _kind(config, kinds, dataset)
    records, picks, left_out = _pick(config, kind, dataset, persons)
    held, learnt = _split(config, dataset, records, seed)
    left_out["examples left out by data.split_by=both"] = int((~(held | learnt)).sum())
    for reason, number in left_out.items():
        if number:
            report(f"data: {number} {reason}")
    _check_keep(config, kind, dataset, records)
    keep = (
        frozenset(config.keep) | ({"strength"} if config.ties == "half" else set()) if kind == "pair" else ()
    )
    view = View(dataset, kind, records, picks, config.desirable, frozenset(keep))
    train = replace(view, records=records[learnt], picks=picks[learnt])
    if config.max_train is not None:
        train = _first(train, config.max_train, seed)
    if not len(train):
        raise ValueError(f"data.source={config.source} leaves nothing to learn from as {kind} data")
    held_out = _first(replace(view, records=records[held], picks=picks[held]), config.max_eval, seed)
    rows = [dataset.record(int(i)) for i in held_out.records]
    shown = rows or [dataset.record(int(i)) for i in train.records[: config.max_eval]]
    clusters = tuple(str(_cluster(r, config.split_by)) for r in rows)
    first = train[0]
    report(
        f"data: {len(train)} {kind} examples and {len(held_out)} held out of {dataset.num_records} contexts, "
        f"latents {'x'.join(map(str, first.latents.shape[1:]))}"
    )
    empty = dataset.empty_prompt()
    if config.empty_prompt == "zeros":
        empty = EncodedPrompt(
            torch.zeros_like(empty.embeds), None if empty.pooled is None else torch.zeros_like(empty.pooled)
        )
    return DiffusionData(
        kind=kind,
        train=train,
        held_out=held_out if len(held_out) else None,
        eval_clusters=clusters,
        eval_prompts=tuple(dict.fromkeys(r["prompt"] for r in shown)),
        empty=empty,
        shape=tuple(first.latents.shape[1:]),
        fingerprint=dataset.fingerprint,
        facts=dataset.facts,
    )


def _kind(config: DataConfig, kinds: Sequence[Kind], dataset: EncodedDataset) -> Kind:
    stored = set(dataset.column("kind").unique().to_pylist())
    if config.form != "auto":
        wanted = _KIND_OF[config.form]
        if wanted not in kinds:
            raise ValueError(
                f"data.form={config.form} makes {wanted} data, but the objective takes {', '.join(kinds)}"
            )
        candidates: list[Kind] = [wanted]
    else:
        # What is stored comes first; a list says more than the pairs in it.
        candidates = sorted(
            kinds, key=lambda k: (k not in stored, ["list", "pair", "labelled", "single"].index(k))
        )
    for kind in candidates:
        if kind in ("labelled", "single") or stored & {"pair", "list"}:
            return kind
    raise ValueError(
        f"data.source={config.source} holds single images, but the objective takes {', '.join(kinds)} data"
    )


def _check_keep(config: DataConfig, kind: Kind, dataset: EncodedDataset, records: np.ndarray) -> None:
    """Refuse fields that the examples cannot have, before anything is learnt."""
    if config.keep and kind != "pair":
        raise ValueError(f"data.keep={', '.join(config.keep)} is for pairs; this is {kind} data")
    if "margin" not in config.keep:
        return
    columns = [dataset.column(name) for name in ("kind", "margin")]
    absent = np.asarray([stored == "pair" and margin is None for stored, margin in _rows(columns)])[records]
    if absent.any():
        first = dataset.record(int(records[absent][0]))["source"]
        raise ValueError(
            f"data.keep=margin, but {absent.sum()} of {len(records)} pairs have none, {first} the first"
        )


def _pick(
    config: DataConfig, kind: Kind, dataset: EncodedDataset, persons: Container[str | None] | None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Record and images of every example, and how many contexts or pairs were left out, by reason."""
    unknown = "contexts of nobody in model.persons.users left out"
    out: dict[str, int] = dict.fromkeys((unknown, "ties left out", "pairs below data.min_margin left out"), 0)
    records, flat, sizes = array("q"), array("h"), array("h")
    columns = [dataset.column(n) for n in ("group", "kind", "relevance", "strength", "margin")]
    for index, row in enumerate(_rows(columns)):
        person, stored, grades, strength, margin = row
        if persons is not None and person not in persons:
            out[unknown] += 1
            continue
        for chosen in _choices(config, kind, stored, grades, strength, margin, out):
            records.append(index)
            flat.extend(chosen)
            sizes.append(len(chosen))
    numbers = np.asarray(sizes, dtype=np.int64)
    mask = np.arange(numbers.max(initial=1)) < numbers[:, None]
    table = np.full(mask.shape, -1, dtype=np.int16)
    table[mask] = np.asarray(flat, dtype=np.int16)
    return np.asarray(records, dtype=np.int64), table, out


def _rows(columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of several columns, a few thousand in memory at a time."""
    step = 4096
    for start in range(0, len(columns[0]), step):
        yield from zip(*(c.slice(start, step).to_pylist() for c in columns), strict=True)


def _choices(
    config: DataConfig,
    kind: Kind,
    stored: str,
    grades: Sequence[float],
    strength: float | None,
    margin: float | None,
    out: dict[str, int],
) -> Iterator[tuple[int, ...]]:
    """The images of each example that one record makes; for a pair the better one first."""
    tie = stored == "pair" and strength == 0.5
    if tie and (config.ties == "drop" or kind != "pair"):
        out["ties left out"] += 1
        return
    if stored == "pair" and margin is not None and margin < config.min_margin and not tie:
        out["pairs below data.min_margin left out"] += 1
        return
    images = range(len(grades))
    if kind == "list":
        yield tuple(images)
    elif kind == "labelled":
        yield from ((k,) for k in images)
    elif kind == "single":
        yield (max(images, key=lambda k: (grades[k], -k)),)
    elif stored == "pair":
        yield (0, 1)
    else:
        for i, j in _pairs_of_list(grades, config.pairs_of_list):
            gap = grades[i] - grades[j]
            if gap == 0:
                out["ties left out"] += 1
            elif abs(gap) < config.min_margin:
                out["pairs below data.min_margin left out"] += 1
            else:
                yield (i, j) if gap > 0 else (j, i)


def _pairs_of_list(grades: Sequence[float], which: str) -> list[tuple[int, int]]:
    order = sorted(range(len(grades)), key=lambda k: (-grades[k], k))
    if which == "best_worst":
        return [(order[0], order[-1])]
    if which == "adjacent":
        return list(pairwise(order))
    return list(combinations(order, 2))


def _split(
    config: DataConfig, dataset: EncodedDataset, records: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the record of each example is held out, and whether it is learnt from, [n] each."""
    columns = ("prompt", "group") if config.split_by == "both" else (config.split_by,)
    if "group" in columns and np.asarray(dataset.column("group").is_null())[records].any():
        raise ValueError(f"data.split_by={config.split_by}, but not every record names a person or group")
    flags = np.stack([_held_out(config, dataset, name, seed) for name in columns])[:, records]
    return np.asarray(flags.all(0)), ~np.asarray(flags.any(0))


def _held_out(config: DataConfig, dataset: EncodedDataset, column: str, seed: int) -> np.ndarray:
    """Whether each record's prompt or person is held out: a function of it and the seed, [num_records]."""
    names = dataset.column(column)
    flags = np.zeros(len(names), dtype=bool)
    if not config.eval_share:
        return flags
    for i, (name,) in enumerate(_rows([names])):
        flags[i] = key("held out", seed, name) / 2**63 < config.eval_share
    return flags


def _first(view: View, most: int, seed: int) -> View:
    """At most `most` examples of a view, drawn without replacement, in order."""
    if len(view) <= most:
        return view
    generator = np.random.Generator(np.random.Philox(key=key("subset", seed)))
    kept = np.sort(generator.permutation(len(view))[:most])
    return replace(view, records=view.records[kept], picks=view.picks[kept])


def _costs(view: View) -> np.ndarray:
    shapes = view.dataset.column("shape").combine_chunks().dictionary_encode()
    sizes = np.asarray(
        [int(np.prod([int(n) for n in name.split("x")])) for name in shapes.dictionary.to_pylist()]
    )
    numbers = sizes[np.asarray(shapes.indices)] if len(sizes) else sizes
    # Shapes of equal size differ by a trifle, so that batches hold one shape wherever they can.
    distinct = 64 * numbers + np.asarray(shapes.indices)
    return distinct[view.records] * (view.picks >= 0).sum(1)


def _cluster(record: dict[str, Any], split_by: str) -> Any:
    return record["prompt" if split_by == "prompt" else "group"]


def _content(record: dict[str, Any], image: int, prompt: str) -> str:
    facts = f"{prompt}\x1f{record['contents'][image]}\x1f{record['shape']}\x1f{record['time_ids'][image]}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _suffix(record: dict[str, Any], chosen: Sequence[int]) -> str:
    whole = len(chosen) == len(record["rows"]) and list(chosen) == sorted(chosen)
    return "" if whole else f"[{','.join(map(str, chosen))}]"
