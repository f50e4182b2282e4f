"""Graded relevance of a list's images, and the ways from lists to pairs and back. Pure functions.

Shapes: K images of one context; n scorers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from triptych.modalities.diffusion.records import MAX_CANDIDATES, ImageRecord, make_record


def relevance_from_votes(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """phi_i = (pairs that i wins, over all scorers) / (n (K - 1)), [K] in [0, 1].

    scores [n][K], higher is better; only the order within a scorer counts, so scales never mix. A tie is
    nobody's win; without ties the phi sum to K / 2. Karthik et al. 2024 (RankDPO), algorithm 1.
    """
    rows = [tuple(row) for row in scores]
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or sizes == {0} or sizes == {1}:
        raise ValueError(f"scores of {len(rows)} scorers over {sorted(sizes)} images; give n rows of K >= 2")
    num_images = sizes.pop()
    wins = [sum(sum(row[i] > other for other in row) for row in rows) for i in range(num_images)]
    return tuple(win / (len(rows) * (num_images - 1)) for win in wins)


def relevance_from_ranking(ranking: Sequence[float]) -> tuple[float, ...]:
    """Share of the others that each image is ranked before, [K]; ranking [K], 1 is best, ties allowed.

    1, 2, 3 give 1, 1/2, 0; equal ranks give equal relevance. This is the vote of one scorer.
    """
    return relevance_from_votes([[-rank for rank in ranking]])


def relevance_from_scores(scores: Sequence[float]) -> tuple[float, ...]:
    """(s - min) / (max - min) of one list's scores, [K] in [0, 1]; one half for all when they are equal."""
    low, high = min(scores), max(scores)
    if low == high:
        return (0.5,) * len(scores)
    # Halved first, or the range of the largest floats would be infinite.
    return tuple((s / 2 - low / 2) / (high / 2 - low / 2) for s in scores)


def all_pairs(record: ImageRecord) -> tuple[ImageRecord, ...]:
    """Every pair of unequal relevance, the better one chosen; margin is the gap in relevance."""
    return _pairs(record, lambda better, worse: True)


def best_worst_pairs(record: ImageRecord) -> tuple[ImageRecord, ...]:
    """The best against the worst image; each against each where several share that relevance."""
    high, low = max(record.relevance), min(record.relevance)
    return _pairs(record, lambda better, worse: better == high and worse == low)


def adjacent_pairs(record: ImageRecord) -> tuple[ImageRecord, ...]:
    """Each image against those of the next lower relevance."""
    levels = sorted(set(record.relevance))
    below = dict(zip(levels[1:], levels, strict=False))
    return _pairs(record, lambda better, worse: below.get(better) == worse)


def _pairs(record: ImageRecord, wanted: Callable[[float, float], bool]) -> tuple[ImageRecord, ...]:
    if record.kind == "single":
        raise ValueError(f"{record.source}: one image makes no pair; give a pair or a list")
    if record.kind == "pair":
        return (record,)
    grades = record.relevance
    return tuple(
        make_record(
            source=record.source,
            prompt=record.prompt,
            images=(record.images[i], record.images[j]),
            relevance=(1.0, 0.0),
            group=record.group,
            margin=grades[i] - grades[j],
        )
        for i, j in product(range(len(grades)), repeat=2)
        if grades[i] > grades[j] and wanted(grades[i], grades[j])
    )


def lists_from_pairs(records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    """One record a prompt: its pairs' images, graded by phi = wins / comparisons, in the order they are met.

    Equal images are recognised by the hash of their bytes. strength, where a pair has one, counts as its
    share of a win. group is kept where all pairs of the prompt agree. A prompt with a single pair gives that
    pair itself. All records are held until the last is read; to stream, give runs of one prompt each.
    ValueError for records that are no pairs and for more images than a record may hold.
    """
    pairs: dict[str, list[ImageRecord]] = {}
    for record in records:
        if record.kind != "pair":
            raise ValueError(f"{record.source} is a {record.kind}; lists are made from pairs")
        pairs.setdefault(record.prompt, []).append(record)
    for those in pairs.values():
        if len(those) == 1:
            yield those[0]
        else:
            yield from _list_of(those)


def _list_of(pairs: Sequence[ImageRecord]) -> Iterator[ImageRecord]:
    """The list, unless no two images of the pairs differ."""
    images, wins, comparisons = {}, Counter(), Counter()
    for record in pairs:
        won = 1.0 if record.strength is None else record.strength
        names = [image.content_hash() for image in record.images]
        if names[0] == names[1]:
            continue
        images |= {n: i for n, i in zip(names, record.images, strict=True) if n not in images}
        wins.update(dict(zip(names, (won, 1.0 - won), strict=True)))
        comparisons.update(names)
    source = pairs[0].source
    if len(images) > MAX_CANDIDATES:
        raise ValueError(f"{source}: its prompt has {len(images)} images; a list holds {MAX_CANDIDATES}")
    groups = {record.group for record in pairs}
    if images:
        yield make_record(
            source=source,
            prompt=pairs[0].prompt,
            images=tuple(images.values()),
            relevance=[wins[name] / comparisons[name] for name in images],
            group=groups.pop() if len(groups) == 1 else None,
        )
