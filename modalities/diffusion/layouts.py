"""The published layouts of image preferences whose rows are JSON, each as a parser from a row to a record.

A parser gets the row, its place and `image`, which makes an `ImageSource` of a path and its column's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from triptych.modalities.diffusion.fields import (
    PROMPT_NAMES,
    check_count,
    check_flag,
    check_length,
    check_list,
    check_number,
    check_numbers,
    person_of,
    prompt_of,
    require,
    share_of,
    wrong_type,
)
from triptych.modalities.diffusion.ranking import (
    relevance_from_ranking,
    relevance_from_scores,
    relevance_from_votes,
)
from triptych.modalities.diffusion.records import ImageRecord, ImageSource, make_record
from triptych.training.quarantine import DataError

ImageOf = Callable[[object, str], ImageSource]
Parser = Callable[[Mapping, str, ImageOf], ImageRecord]
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_GRADES = ("relevance", "ranking", "scores", "votes")
COLUMNS = {
    "hpdv2": "prompt, image_path (or file_path), human_preference (or rank)",
    "hpdv3": "prompt, path1 (the preferred one), path2, and confidence or choice_dist if known",
    "imagereward": "prompt, generations, ranking",
    "folder": "prompt and one of: chosen, rejected / images and relevance, ranking, scores or votes / image "
    "and, if known, desirable; all images as paths relative to the file",
}


def detect_layout(row: object) -> str:
    """The layout of one row by its columns; DataError for a row of none, and for texts."""
    if not isinstance(row, Mapping):
        raise DataError("is not an object", remedy="write each record as {...}", preview=row)
    names = row.keys()
    if not names & {*PROMPT_NAMES}:
        raise _unknown(row)
    if names & {"image_path", "file_path"} and names & {"human_preference", "rank"}:
        return "hpdv2"
    if {"path1", "path2"} <= names:
        return "hpdv3"
    if {"generations", "ranking"} <= names:
        return "imagereward"
    if {"chosen", "rejected"} <= names:
        if not all(_is_image_name(row[name]) for name in ("chosen", "rejected")):
            raise DataError(
                "is about texts, not images",
                field="chosen",
                remedy=f"train a language model on it, or give paths of {', '.join(_IMAGE_ENDINGS)} files",
                preview=row["chosen"],
            )
        return "folder"
    if names & {"images", "image", "file_name"}:
        return "folder"
    raise _unknown(row)


def _is_image_name(value: object) -> bool:
    return isinstance(value, str) and value.lower().endswith(_IMAGE_ENDINGS)


def _unknown(row: Mapping) -> DataError:
    known = "; ".join(f"{name}: {columns}" for name, columns in COLUMNS.items())
    found = ", ".join(map(str, row))[:300] or "none"
    return DataError("has columns of no known layout", remedy=f"found {found}; known are {known}")


def parse_row(row: object, layout: str, place: str, image: ImageOf) -> ImageRecord:
    """One JSON row as a record; DataError for anything else. The error may lack the place."""
    if not isinstance(row, Mapping):
        raise DataError("is not an object", remedy="write each record as {...}", preview=row)
    return PARSERS[layout](row, place, image)


def _hpdv2(row: Mapping, place: str, image: ImageOf) -> ImageRecord:
    """train.json: two images and which of them is preferred; test.json: images and their average ranks."""
    column = "image_path" if "image_path" in row else "file_path"
    paths = _paths(row, column)
    if "human_preference" not in row:
        grades = _ranks(require(row, "rank"), "rank", len(paths))
        return _listed(row, place, image, paths, column, grades)
    flags = check_numbers(row["human_preference"], "human_preference", len(paths))
    check_length(paths, column, 2)
    if flags not in ((1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0)):
        remedy = "give [1, 0] or [0, 1]; equal ones for a tie"
        raise DataError("is no preference", field="human_preference", remedy=remedy, preview=flags)
    chosen, rejected = reversed(paths) if flags[1] > flags[0] else paths
    tie = 0.5 if flags[0] == flags[1] else None
    return _paired(row, place, (image(chosen, column), image(rejected, column)), strength=tie)


def _hpdv3(row: Mapping, place: str, image: ImageOf) -> ImageRecord:
    """path1 is preferred. strength: the majority's share of choice_dist, else confidence."""
    images = image(require(row, "path1"), "path1"), image(require(row, "path2"), "path2")
    strength = share_of(row, "confidence")
    if row.get("choice_dist") is not None:
        votes = check_numbers(row["choice_dist"], "choice_dist", 2)
        if min(votes) < 0 or max(votes) == 0:
            raise DataError("is no count of votes", field="choice_dist", remedy="give two, not negative")
        strength = max(votes) / sum(votes)
    return _paired(row, place, images, strength=strength)


def _imagereward(row: Mapping, place: str, image: ImageOf) -> ImageRecord:
    paths = _paths(row, "generations")
    grades = _ranks(require(row, "ranking"), "ranking", len(paths))
    return _listed(row, place, image, paths, "generations", grades)


def _folder(row: Mapping, place: str, image: ImageOf) -> ImageRecord:
    if "chosen" in row or "rejected" in row:
        images = tuple(image(require(row, name), name) for name in ("chosen", "rejected"))
        return _paired(row, place, images, **pair_extras(row))
    if "images" in row:
        paths = _paths(row, "images")
        return _listed(row, place, image, paths, "images", grades_of(row, len(paths)))
    column = "file_name" if "file_name" in row and "image" not in row else "image"
    return make_record(
        source=place,
        prompt=prompt_of(row),
        images=(image(require(row, column), column),),
        relevance=desirability_of(row),
        group=person_of(row),
    )


def _paths(row: Mapping, column: str) -> list:
    paths = check_list(require(row, column), column, "paths")
    check_count(paths, column)
    return paths


def _paired(
    row: Mapping,
    place: str,
    images: tuple[ImageSource, ...],
    strength: float | None = None,
    margin: float | None = None,
) -> ImageRecord:
    return make_record(
        source=place,
        prompt=prompt_of(row),
        images=images,
        relevance=(1.0, 0.0),
        strength=strength,
        margin=margin,
        group=person_of(row),
    )


def _listed(
    row: Mapping, place: str, image: ImageOf, paths: list, column: str, grades: tuple[float, ...]
) -> ImageRecord:
    return make_record(
        source=place,
        prompt=prompt_of(row),
        images=tuple(image(path, f"{column}[{k}]") for k, path in enumerate(paths)),
        relevance=grades,
        group=person_of(row),
    )


def pair_extras(row: Mapping) -> dict[str, float | None]:
    """strength, P(chosen preferred), and margin, the gap of two scores, where a row has them."""
    margin = None if row.get("margin") is None else check_number(row["margin"], "margin")
    return {"strength": share_of(row, "strength"), "margin": margin}


def desirability_of(row: Mapping) -> tuple[float]:
    """The grade of a single image: 1, or 0 if `desirable` says so."""
    desirable = row.get("desirable") is None or check_flag(row["desirable"], "desirable")
    return (1.0 if desirable else 0.0,)


def grades_of(row: Mapping, num_images: int) -> tuple[float, ...]:
    """Relevance of a list's two or more images from exactly one of relevance, ranking, scores and votes.

    relevance is taken as it is; ranking has 1 for the best; scores are scaled to [0, 1] within the list;
    votes are the scores of n scorers, [[...], ...] or {name: [...]}, of which only the order counts.
    """
    found = [name for name in _GRADES if row.get(name) is not None]
    if len(found) != 1:
        reason = "has several kinds of grades" if found else "has no grades"
        remedy = f"found {', '.join(found)}; " if found else ""
        raise DataError(reason, field="images", remedy=f"{remedy}give one of {', '.join(_GRADES)}")
    name = found[0]
    return _GRADERS[name](row[name], name, num_images)


def _ranks(value: Any, name: str, num_images: int) -> tuple[float, ...]:
    return relevance_from_ranking(check_numbers(value, name, num_images))


def _scores(value: Any, name: str, num_images: int) -> tuple[float, ...]:
    return relevance_from_scores(check_numbers(value, name, num_images))


def _votes(value: Any, name: str, num_images: int) -> tuple[float, ...]:
    rows = list(value.values()) if isinstance(value, Mapping) else value
    rows = check_list(rows, name, "lists of scores, one a scorer")
    if not rows:
        raise wrong_type(value, name, "at least one scorer's list of scores")
    return relevance_from_votes([check_numbers(row, name, num_images) for row in rows])


_GRADERS = {"relevance": check_numbers, "ranking": _ranks, "scores": _scores, "votes": _votes}
PARSERS: dict[str, Parser] = {
    "hpdv2": _hpdv2,
    "hpdv3": _hpdv3,
    "imagereward": _imagereward,
    "folder": _folder,
}
