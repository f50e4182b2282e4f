"""Let scorers judge pictures and write preferences made of their votes: AI feedback.

    python scripts/label_images.py --data.source data/drawn --output_dir data/labelled --form lists \
        --scorers '{pickscore: {name: pickscore}, red: {name: measure, options: {measure: redness}}}'

Reads the lists of scripts/draw_images.py and everything that scripts/encode_images.py reads, whose labels are
replaced. The folder holds the pictures and metadata.jsonl, which scripts/encode_images.py reads, and, to look
at, label_report.json, label_report.png and lists.png. Scores are kept: a restart, another margin or another
form scores nothing again. What cannot be used is listed with its reason in quarantine.jsonl.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from triptych.modalities.diffusion.cutting import ahead, enough
from triptych.modalities.diffusion.fields import at, confined
from triptych.modalities.diffusion.image_scoring import build_scorer, scores_of_images
from triptych.modalities.diffusion.images import ImageLimits, open_image
from triptych.modalities.diffusion.json_rows import read_json_rows
from triptych.modalities.diffusion.labelling import (
    VOTES,
    Form,
    Labelling,
    PairsOf,
    Preference,
    Scores,
    Shown,
    agreements,
    figure,
    graded,
    preferences,
    sheet,
    spreads,
)
from triptych.modalities.diffusion.layouts import parse_row
from triptych.modalities.diffusion.prompts import prompt_key
from triptych.modalities.diffusion.ranking import relevance_from_votes
from triptych.modalities.diffusion.records import ImageRecord, ImageSource
from triptych.modalities.diffusion.sources import RecordSource, SourceConfig
from triptych.scripts.common import (
    StopSignal,
    errors_in_one_line,
    parse,
    progress,
    quiet_diffusers,
    save_config,
)
from triptych.scripts.draw_images import content_of, write_lines
from triptych.training.atomic import write_json
from triptych.training.manifest import is_plain_name
from triptych.training.order import key
from triptych.training.plugs import PlugConfig
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.stats import Estimate, win_rate

_GRADES = ("relevance", "ranking", "scores", "votes")
_ENDINGS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """What is judged, by whom, and what becomes of it.

    data: see `SourceConfig`; ties are pairs that somebody judged to be equal. scorers: a name of your own ->
    {name, options} of an image scorer; they are loaded one after the other. by, form, pairs, min_margin,
    min_agreement: see `Labelling`. num_shown: lists in lists.png.
    """

    data: SourceConfig
    scorers: dict[str, PlugConfig]
    output_dir: str
    by: str = VOTES
    form: Form = "pairs"
    pairs: PairsOf = "best_worst"
    min_margin: float = 0.0
    min_agreement: float = 0.0
    seed: int = 0
    batch_size: int = 16
    num_workers: int = 4
    num_shown: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers", "num_shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.scorers:
            raise ValueError("scorers={} names nobody to judge; give {name: {name: clip, options: {...}}}")
        for name in self.scorers:
            if not is_plain_name(name):
                raise ValueError(f"scorers: '{name}' is no name of letters, digits, '_', '-' and '.'")
        self.rule().check(self.scorers)

    def rule(self) -> Labelling:
        """How scores become labels."""
        return Labelling(**{name: getattr(self, name) for name in Labelling.__slots__})


@dataclass(frozen=True, slots=True)
class Gathered:
    """Pictures of one prompt: names of files in `images`, and the grades they came with, if any."""

    prompt: str
    images: tuple[str, ...]
    given: tuple[float, ...] | None

    @property
    def name(self) -> str:
        """The same wherever the list stands."""
        return f"{prompt_key(self.prompt)} {' '.join(self.images)}"


def run(config: LabelConfig) -> int:
    """Gather, score, label, report; returns the exit code."""
    stop, folder = StopSignal(), Path(config.output_dir)
    for plug in config.scorers.values():
        # What is wrong with its options is better said now; weights come at its first call.
        build_scorer(plug)
    lists, left_out = gather(config, folder, stop)
    scores = None if lists is None else score(config, lists, folder, stop)
    if lists is None or scores is None:
        _report("stopped; the same command goes on with the pictures that are not scored yet")
        return 128 + stop.number
    outcome = label(config.rule(), lists, scores)
    _look(config, lists, scores, outcome, left_out, folder)
    if not outcome.rows:
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        raise ValueError(f"{folder}: no {config.form} left, dropped were {outcome.dropped_text()}")
    write_lines(folder / "metadata.jsonl", outcome.rows)
    save_config(config, folder)
    return 0


def identity(config: LabelConfig, *, files: bool = True) -> dict[str, Any]:
    """What decides the labels: settings, scorers with the files they name and, if asked, the source's."""
    pace = ("scorers", "output_dir", "batch_size", "num_workers", "num_shown")
    found = {name: value for name, value in asdict(config).items() if name not in pace}
    found["scorers"] = {name: scorer_hash(plug) for name, plug in config.scorers.items()}
    found["data"] = {name: value for name, value in found["data"].items() if name != "source"}
    return found | ({"files": _listing(config.data)} if files else {})


def gather(
    config: LabelConfig, folder: Path, stop: StopSignal
) -> tuple[list[Gathered] | None, dict[str, int]]:
    """The lists, their pictures checked and named by content in folder/images; (None, {}) if it was stopped.

    Pictures are linked where the file system can, copied otherwise. What was gathered from the same files
    before is taken as it is. The counts are those of records and pictures that were left out.
    """
    origin = {"data": asdict(config.data), "files": _listing(config.data)}
    facts, kept = folder / "gathered.json", folder / "gathered.jsonl"
    if facts.is_file() and (had := json.loads(facts.read_text("utf-8")))["origin"] == origin:
        rows = [json.loads(line) for line in kept.read_text("utf-8").split("\n")[:-1]]
        return [_gathered(row) for row in rows], had["left_out"]
    facts.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(folder / "quarantine.jsonl")
    found: dict[tuple[str, frozenset[str]], Gathered] = {}
    data = config.data
    limits = ImageLimits(max_pixels=data.max_pixels, min_side=data.min_side, max_aspect=data.max_aspect)
    work = partial(_store, folder=folder / "images", limits=limits)
    with ThreadPoolExecutor(config.num_workers) as pool:
        for record, stored in ahead(pool, work, _records(data, quarantine), 2 * config.num_workers):
            if stop():
                return None, {}
            one = _list_of(record, stored, quarantine)
            if one is None:
                continue
            if (same := (one.prompt, frozenset(one.images))) in found:
                remedy = "its scores would be the same"
                quarantine.add(DataError("repeats an earlier record", source=record.source, remedy=remedy))
            else:
                found[same] = one
    if not found:
        raise DataError("holds no pictures to compare", source=data.source, remedy=quarantine.summary())
    write_lines(kept, [asdict(one) for one in found.values()])
    write_json(facts, {"origin": origin, "left_out": quarantine.counts})
    _report(quarantine.summary())
    return list(found.values()), quarantine.counts


def _gathered(row: Mapping[str, Any]) -> Gathered:
    given = row["given"]
    return Gathered(row["prompt"], tuple(row["images"]), None if given is None else tuple(given))


def _records(data: SourceConfig, quarantine: Quarantine) -> Iterator[ImageRecord]:
    path = _ungraded(data)
    if path is None:
        source = RecordSource(data, quarantine, _report)
        while (record := source.take()) is not None:
            yield record
        return
    _report(f"{path}: lists without grades")
    root = (path.parent if data.image_root is None else Path(data.image_root)).resolve()
    for place, row in islice(read_json_rows(path, name=path.name), data.max_records):
        try:
            if isinstance(row, DataError):
                raise row
            yield _ungraded_record(row, place, root)
        except DataError as error:
            quarantine.add(at(place, error))


def _ungraded(data: SourceConfig) -> Path | None:
    """The file of lists without grades that the source is, if it is one."""
    path = Path(data.source).expanduser()
    path = path / "metadata.jsonl" if path.is_dir() else path
    if not path.is_file() or path.suffix != ".jsonl" or data.layout not in ("auto", "folder"):
        return None
    _, row = next(read_json_rows(path, name=path.name), ("", None))
    plain = isinstance(row, Mapping) and "images" in row and not any(row.get(g) is not None for g in _GRADES)
    return path if plain else None


def _ungraded_record(row: object, place: str, root: Path) -> ImageRecord:
    def image(value: object, column: str) -> ImageSource:
        path = confined(root, value, column)
        return ImageSource(name=str(value), path=path, place=place, column=column)

    if isinstance(row, Mapping) and isinstance(row.get("images"), list):
        # Equal grades, which say nothing.
        row = {**row, "relevance": [0.0] * len(row["images"])}
    return parse_row(row, "folder", place, image)


def _store(
    record: ImageRecord, *, folder: Path, limits: ImageLimits
) -> tuple[ImageRecord, list[str | DataError]]:
    """Check a record's pictures and keep their bytes; the name of each, or what is wrong with it."""
    found: list[str | DataError] = []
    for source in record.images:
        try:
            data = source.read(limits.max_bytes)
            open_image(replace(source, data=data, path=None), limits=limits)
        except DataError as error:
            found.append(error)
            continue
        ending = next((end for start, end in _ENDINGS.items() if data.startswith(start)), "webp")
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{ending}"
        if name in found:
            found.append(source.error("is the same as another image of its record", "remove one of them"))
            continue
        _keep(folder / name, data, source.path)
        found.append(name)
    return replace(record, images=tuple(replace(i, data=None, path=Path()) for i in record.images)), found


def _keep(path: Path, data: bytes, source: Path | None) -> None:
    if path.exists():
        return
    try:
        if source is not None:
            os.link(source, path)
            return
    except OSError:
        pass  # another file system, or one without links
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(aside, 0o644)
    os.replace(aside, path)


def _list_of(
    record: ImageRecord, stored: Sequence[str | DataError], quarantine: Quarantine
) -> Gathered | None:
    """The list that is left of a record's pictures, if any."""
    for error in stored:
        if isinstance(error, DataError):
            quarantine.add(error)
    names = tuple(name for name in stored if isinstance(name, str))
    error = enough(record, len(names))
    if error is None and len(names) < 2:
        error = DataError("is a single image", source=record.source, remedy="a comparison needs two or more")
    if error is not None:
        quarantine.add(error)
        return None
    return Gathered(
        record.prompt, names, None if record.kind == "list" or record.is_tie else record.relevance
    )


def _listing(data: SourceConfig) -> str:
    """Hash of names, sizes and times of all files that the source may read."""
    path = Path(data.source).expanduser()
    places = [path.parent if path.is_file() and path.suffix in (".json", ".jsonl") else path]
    places += [] if data.image_root is None else [Path(data.image_root)]
    files = {Path(name) for name in glob.glob(str(path), recursive=True)}
    for place in places:
        files |= {*place.rglob("*")} if place.is_dir() else {place}
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files) if f.is_file()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def score(
    config: LabelConfig, lists: Sequence[Gathered], folder: Path, stop: StopSignal
) -> list[Scores] | None:
    """What every scorer says of every list, each picture scored once; None if it was stopped."""
    wanted = list(dict.fromkeys((image, one.prompt) for one in lists for image in one.images))
    tables: dict[str, dict[str, float]] = {}
    for name, plug in config.scorers.items():
        table = _scored(name, plug, wanted, config, folder, stop)
        if table is None:
            return None
        tables[name] = table
    return [
        {
            name: tuple(table[_key(image, one.prompt)] for image in one.images)
            for name, table in tables.items()
        }
        for one in lists
    ]


def _scored(
    name: str,
    plug: PlugConfig,
    wanted: Sequence[tuple[str, str]],
    config: LabelConfig,
    folder: Path,
    stop: StopSignal,
) -> dict[str, float] | None:
    """One scorer's scores by picture. A line of the file is a batch, so that a restart has the same ones."""
    path = folder / "scores" / f"{name}-{scorer_hash(plug)}.jsonl"
    table = _read_scores(path)
    missing = [one for one in wanted if _key(*one) not in table]
    if not missing:
        return table
    scorer = build_scorer(plug)
    size, done = config.batch_size, len(wanted) - len(missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    read = partial(_open, folder=folder / "images")
    bars = progress(f"score {name}", enabled=True)
    with ThreadPoolExecutor(config.num_workers) as pool, bars(len(wanted), done) as bar:
        pictures = ahead(pool, read, (image for image, _ in missing), 2 * size)
        for start in range(0, len(missing), size):
            if stop():
                return None
            batch = missing[start : start + size]
            images, prompts = list(islice(pictures, len(batch))), [prompt for _, prompt in batch]
            values = scores_of_images(scorer, images, prompts, name)
            keys = [_key(*one) for one in batch]
            _append(path, {"pictures": keys, "scores": values.tolist()})
            table |= dict(zip(keys, values.tolist(), strict=True))
            bar.update(done + start + len(batch))
    del scorer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return table


def scorer_hash(plug: PlugConfig) -> str:
    """What a scorer's scores depend on: its name, its options, and the content of files that these name."""
    files = {k: content_of(v) for k, v in plug.options.items() if isinstance(v, str)}
    text = json.dumps([plug.name, plug.options, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _key(image: str, prompt: str) -> str:
    return f"{image.partition('.')[0]} {prompt_key(prompt)}"


def _open(name: str, *, folder: Path) -> Image.Image:
    return open_image(ImageSource(name, path=folder / name))


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with open(path, "ab") as file:
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_scores(path: Path) -> dict[str, float]:
    """The scores that are there; half a line, left by a kill, is removed."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    found: dict[str, float] = {}
    for line in whole.splitlines():
        row = json.loads(line)
        found |= dict(zip(row["pictures"], row["scores"], strict=True))
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of metadata.jsonl, what was kept and dropped (with the reasons), and what became of each list."""

    rows: list[dict[str, Any]]
    kept: list[Preference]
    dropped: list[tuple[Preference, str]]
    fates: list[str]

    def reasons(self) -> dict[str, int]:
        """How many were dropped, by reason."""
        return dict(Counter(reason for _, reason in self.dropped).most_common())

    def dropped_text(self) -> str:
        """One phrase."""
        return ", ".join(f"{number:,} {reason}" for reason, number in self.reasons().items()) or "none"


def label(rule: Labelling, lists: Sequence[Gathered], scores: Sequence[Scores]) -> Outcome:
    """Every list judged by the rule."""
    scales = spreads(scores)
    outcome = Outcome([], [], [], [])
    for one, said in zip(lists, scores, strict=True):
        if rule.form == "lists":
            relevance, ends, reason = graded(said, rule, scales=scales)
            kept, dropped = ([], [(ends, reason)]) if reason else ([ends], [])
            outcome.rows.extend(_list_row(one, said, relevance, ends) for ends in kept)
        else:
            kept, dropped = preferences(said, rule, scales=scales, name=one.name)
            outcome.rows.extend(_pair_row(one, said, pair, rule) for pair in kept)
        outcome.kept.extend(kept)
        outcome.dropped.extend(dropped)
        reasons = ", ".join(sorted({reason for _, reason in dropped}))
        parts = [f"{len(kept)} kept" if kept else "", f"{len(dropped)} dropped: {reasons}" if dropped else ""]
        outcome.fates.append("; ".join(part for part in parts if part))
    return outcome


def _list_row(one: Gathered, said: Scores, relevance: Sequence[float], ends: Preference) -> dict[str, Any]:
    return {
        "prompt": one.prompt,
        "images": [f"images/{name}" for name in one.images],
        "relevance": list(relevance),
        "phi": list(relevance_from_votes(list(said.values()))),
        "by_scorer": {name: list(row) for name, row in said.items()},
        "margin": ends.margin,
        "agreement": ends.agreement,
    }


def _pair_row(one: Gathered, said: Scores, pair: Preference, rule: Labelling) -> dict[str, Any]:
    """strength, P(chosen preferred), is the share of the votes where these decide, and left out elsewhere."""
    both = (pair.better, pair.worse)
    phi = relevance_from_votes(list(said.values()))
    return {
        "prompt": one.prompt,
        "chosen": f"images/{one.images[pair.better]}",
        "rejected": f"images/{one.images[pair.worse]}",
        "margin": pair.margin,
        **({"strength": pair.agreement} if rule.by == VOTES else {}),
        "agreement": pair.agreement,
        "phi": [phi[k] for k in both],
        "by_scorer": {name: [row[k] for k in both] for name, row in said.items()},
    }


def _look(
    config: LabelConfig,
    lists: Sequence[Gathered],
    scores: Sequence[Scores],
    outcome: Outcome,
    left_out: Mapping[str, int],
    folder: Path,
) -> None:
    """The report: printed, as JSON, as a figure, and a few lists to look at."""
    agreed = agreements(scores, seed=config.seed)
    given = _given(lists, scores)
    facts = {
        "num_lists": len(lists),
        "num_pictures": len({image for one in lists for image in one.images}),
        "left_out": dict(sorted(left_out.items())),
        "by": config.by,
        "form": config.form,
        "num_kept": len(outcome.kept),
        "dropped": outcome.reasons(),
        "agreement": {f"{a} / {b}": _numbers(e) for (a, b), e in agreed.items()},
        "agreement_with_given_labels": {name: _numbers(e) for name, e in given.items()},
        "spread_within_lists": spreads(scores),
    }
    write_json(folder / "label_report.json", facts)
    margins = [one.margin for one in outcome.kept], [one.margin for one, _ in outcome.dropped]
    unit = {VOTES: "gap of votes phi", "mean": "gap of mean z-scores"}.get(config.by, f"gap of {config.by}")
    drawn = figure(agreed, kept=margins[0], dropped=margins[1], unit=unit, min_margin=config.min_margin)
    (folder / "label_report.png").write_bytes(drawn)
    places = sorted(range(len(lists)), key=lambda i: key("shown", config.seed, lists[i].name))
    shown = [
        Shown(
            lists[i].prompt,
            [_open(name, folder=folder / "images") for name in lists[i].images],
            scores[i],
            outcome.fates[i],
        )
        for i in sorted(places[: config.num_shown])
    ]
    (folder / "lists.png").write_bytes(sheet(shown))
    for pair, found in agreed.items():
        print(f"Kendall's tau of {pair[0]} and {pair[1]}: {found}")
    for name, found in given.items():
        print(f"{name} agrees with the labels that were given: {found}")
    made = f"{len(outcome.rows):,} {config.form} of {len(lists):,} lists"
    print(f"{folder}: {made}; dropped: {outcome.dropped_text()}")


def _given(lists: Sequence[Gathered], scores: Sequence[Scores]) -> dict[str, Estimate]:
    """How often each scorer, and the votes, prefer what the pairs' own labels chose; a tie counts half."""
    known = [said for one, said in zip(lists, scores, strict=True) if one.given is not None]
    if not known:
        return {}
    tables = [{**said, VOTES: relevance_from_votes(list(said.values()))} for said in known]
    return {
        name: win_rate([1.0 if t[name][0] > t[name][1] else 0.5 * (t[name][0] == t[name][1]) for t in tables])
        for name in tables[0]
    }


def _numbers(found: Estimate) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "num_lists": found.n}


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(LabelConfig, args, prog="label_images", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
