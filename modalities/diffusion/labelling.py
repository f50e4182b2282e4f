"""From scores of pictures to preferences: grades, pairs, filters, the scorers' agreement. Pure functions.

rule = Labelling(by="votes", pairs="best_worst", min_margin=0.2)
kept, dropped = preferences({"clip": [0.31, 0.28, 0.30], "aesthetic": [5.5, 5.1, 6.0]}, rule)

Shapes: K pictures of a list, n scorers. Scores of a list: scorer's name -> [K], higher is better.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from triptych.modalities.diffusion.grids import grid
from triptych.modalities.diffusion.measures import on_white
from triptych.modalities.diffusion.ranking import relevance_from_scores, relevance_from_votes
from triptych.training.agreement import kendall
from triptych.training.evaluation import estimate
from triptych.training.order import key
from triptych.training.stats import Estimate

Scores = Mapping[str, Sequence[float]]
Form = Literal["pairs", "lists"]
PairsOf = Literal["best_worst", "all", "random"]
VOTES, MEAN = "votes", "mean"
OTHERS = "votes of the others"
TIE, NO_MAJORITY, NEAR, SPLIT = "tie", "no majority", "margin too small", "agreement too small"
# Thresholds are written as decimals, and 0.6 - 0.4 is not 0.2.
_ROUNDING = 1e-9
_CELL, _LINE, _COLUMNS = 168, 15, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelling:
    """How scores become preferences.

    by: 'votes' grades with phi (see `relevance_from_votes`), 'mean' with the mean z-score of all scorers, the
    name of a scorer with its scores. pairs: of a list, its best against its worst picture, all of its pairs,
    or one of them at random, whichever the seed and the list's name say. min_margin: least gap of the grades.
    min_agreement: least share of the scorers that prefer the better picture. Of a list that stays a list both
    are those of its best against its worst picture.
    """

    by: str = VOTES
    form: Form = "pairs"
    pairs: PairsOf = "best_worst"
    min_margin: float = 0.0
    min_agreement: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid in (("form", get_args(Form)), ("pairs", get_args(PairsOf))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(valid)}")
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"min_margin={self.min_margin} must be 0 or positive, and finite")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement={self.min_agreement} is a share and must be in [0, 1]")
        if self.by == VOTES and self.min_margin > 1:
            raise ValueError(f"min_margin={self.min_margin}: grades by votes are in [0, 1]")

    def check(self, scorers: Iterable[str]) -> None:
        """ValueError unless `by` says votes, mean or the name of one of these scorers."""
        names = list(scorers)
        for name in names:
            if name in (VOTES, MEAN):
                raise ValueError(f"a scorer cannot be called '{name}': by={name} means something else")
        if self.by not in (VOTES, MEAN, *names):
            raise ValueError(f"by={self.by} is not one of {', '.join((VOTES, MEAN, *names))}")


@dataclass(frozen=True, slots=True)
class Preference:
    """One picture of a list before another: their places, the gap of their grades, see `agreement`."""

    better: int
    worse: int
    margin: float
    agreement: float


def agreement(scores: Scores, better: int, worse: int) -> float:
    """Share of the scorers that prefer one picture to another, in [0, 1]; who ties them counts half.

    So the shares of both directions sum to 1, and it can serve as P(better preferred).
    """
    gaps = [row[better] - row[worse] for row in scores.values()]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)


def spreads(lists: Iterable[Scores]) -> dict[str, float]:
    """Each scorer's standard deviation within lists: sqrt(sum_l sum_i (s_li - mean_l)^2 / sum_l (K_l - 1)).

    Within, since only differences between pictures of one prompt become preferences.
    """
    squares: dict[str, float] = {}
    freedom: dict[str, int] = {}
    for scores in lists:
        for name, row in scores.items():
            mean = math.fsum(row) / len(row)
            squares[name] = squares.get(name, 0.0) + math.fsum((s - mean) ** 2 for s in row)
            freedom[name] = freedom.get(name, 0) + len(row) - 1
    return {name: math.sqrt(squares[name] / max(1, n)) for name, n in freedom.items()}


def mean_z(scores: Scores, scales: Mapping[str, float]) -> tuple[float, ...]:
    """(1 / n) sum_m (s_mi - mean_m) / scale_m, [K]; a scorer of scale 0 says nothing.

    mean_m: of the list; scales: see `spreads`. Only differences within the list have a meaning.
    """
    size = _size(scores)
    total = [0.0] * size
    for name, row in scores.items():
        mean, scale = math.fsum(row) / size, scales[name]
        if scale > 0:
            total = [t + (s - mean) / scale / len(scores) for t, s in zip(total, row, strict=True)]
    return tuple(total)


def grades(scores: Scores, by: str, scales: Mapping[str, float] | None = None) -> tuple[float, ...]:
    """The grades of a list, [K], higher is better; scales are needed for 'mean' alone."""
    _size(scores)
    if by == VOTES:
        return relevance_from_votes(list(scores.values()))
    if by == MEAN:
        if scales is None:
            raise ValueError("by=mean needs each scorer's spread, see spreads()")
        return mean_z(scores, scales)
    return tuple(scores[by])


def preferences(
    scores: Scores, rule: Labelling, *, scales: Mapping[str, float] | None = None, name: str = ""
) -> tuple[list[Preference], list[tuple[Preference, str]]]:
    """The pairs of a list that the rule keeps, and those that it drops, each with the reason.

    Equal grades are dropped always, and by votes also a pair that no majority of the scorers prefers: phi
    counts wins against all pictures, so the one with more of them may lose to the other.
    name: of the list; with rule.seed it decides which pair is taken at random.
    """
    found = grades(scores, rule.by, scales)
    order = _order(found)
    places = list(combinations(order, 2))
    if rule.pairs == "best_worst":
        places = [(order[0], order[-1])]
    elif rule.pairs == "random":
        # Drawn before the grades are looked at, so that other scorers are asked about the same pair.
        drawn = list(combinations(range(len(found)), 2))
        taken = drawn[key("pair of a list", rule.seed, name) % len(drawn)]
        places = [one for one in places if set(one) == set(taken)]
    kept: list[Preference] = []
    dropped: list[tuple[Preference, str]] = []
    for better, worse in places:
        one = Preference(better, worse, found[better] - found[worse], agreement(scores, better, worse))
        reason = _refused(one, rule)
        if not reason and rule.by == VOTES and one.agreement <= 0.5:
            reason = NO_MAJORITY
        if reason:
            dropped.append((one, reason))
        else:
            kept.append(one)
    return kept, dropped


def graded(
    scores: Scores, rule: Labelling, *, scales: Mapping[str, float] | None = None
) -> tuple[tuple[float, ...], Preference, str]:
    """A list that stays one: relevance [K] in [0, 1], its best against its worst, and why it is dropped.

    relevance: phi by votes, otherwise the grades scaled to [0, 1] within the list. The reason is '' for a
    list that the rule keeps.
    """
    found = grades(scores, rule.by, scales)
    better, *_, worse = _order(found)
    ends = Preference(better, worse, found[better] - found[worse], agreement(scores, better, worse))
    relevance = found if rule.by == VOTES else relevance_from_scores(found)
    return relevance, ends, _refused(ends, rule)


def _order(found: Sequence[float]) -> list[int]:
    """Places by falling grade; of equal ones the first comes first."""
    return sorted(range(len(found)), key=lambda k: (-found[k], k))


def _refused(one: Preference, rule: Labelling) -> str:
    if one.margin <= 0:
        return TIE
    if one.margin < rule.min_margin - _ROUNDING:
        return NEAR
    return SPLIT if one.agreement < rule.min_agreement - _ROUNDING else ""


def agreements(
    lists: Sequence[Scores], *, most: int = 10_000, seed: int = 0
) -> dict[tuple[str, str], Estimate]:
    """Mean over lists of Kendall's tau-b of each two scorers, and of each with the others' votes.

    The latter under (name, OTHERS), from two scorers on. Of more than `most` lists that many are looked at,
    evenly spread. Intervals: bootstrap over lists. A scorer that ties a whole list has tau 0 there.
    """
    step = max(1, -(-len(lists) // most))
    looked = lists[::step]
    names = list(looked[0]) if looked else []
    if len(names) < 2:
        return {}
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in combinations(names, 2)}
    found |= {(name, OTHERS): [] for name in names}
    for scores in looked:
        rows = {name: torch.tensor(row, dtype=torch.float64) for name, row in scores.items()}
        for name in names:
            others = [row for other, row in scores.items() if other != name]
            votes = torch.tensor(relevance_from_votes(others), dtype=torch.float64)
            found[name, OTHERS].append(kendall(rows[name], votes))
        for a, b in combinations(names, 2):
            found[a, b].append(kendall(rows[a], rows[b]))
    return {
        pair: estimate(torch.tensor(taus, dtype=torch.float64), seed=seed) for pair, taus in found.items()
    }


@dataclass(frozen=True, slots=True)
class Shown:
    """One list as people see it: its prompt, its pictures, their scores, and what became of it."""

    prompt: str
    images: Sequence[Image.Image]
    scores: Scores
    outcome: str


def sheet(lists: Sequence[Shown]) -> bytes:
    """A contact sheet, PNG bytes: one list a row, best first by votes, each picture with its phi and scores.

    Of longer lists the first 8 places are shown.
    """
    columns = min(_COLUMNS, max(len(one.images) for one in lists))
    rows: list[list[Image.Image | None]] = []
    for one in lists:
        phi = relevance_from_votes(list(one.scores.values()))
        cells: list[Image.Image | None] = []
        for k in _order(phi)[:columns]:
            lines = [f"votes {phi[k]:.2f}", *(f"{name} {row[k]:.4g}" for name, row in one.scores.items())]
            cells.append(_captioned(one.images[k], lines))
        rows.append(cells + [None] * (columns - len(cells)))
    titles = [f"{one.prompt} \u2014 {one.outcome}" for one in lists]
    heads = [f"place {k + 1}" for k in range(columns)]
    side = max(max(cell.size) for row in rows for cell in row if cell is not None)
    return grid(rows, heads, titles, cell=side, caption=170)


def _captioned(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture with lines of text below it, on a square."""
    rgb = on_white(image)
    scale = _CELL / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    sharp = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    side = _CELL + _LINE * len(lines) + 2
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(rgb.resize(size, sharp), (0, 0))
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    for n, line in enumerate(lines):
        pen.text((2, _CELL + 1 + n * _LINE), line, fill="#1a1a1a", font=font)
    return cell


def figure(
    agreed: Mapping[tuple[str, str], Estimate],
    *,
    kept: Sequence[float],
    dropped: Sequence[float],
    unit: str,
    min_margin: float,
) -> bytes:
    """Who agrees with whom (Kendall's tau-b) beside the margins of what was kept and dropped, PNG bytes."""
    made = Figure(figsize=(10.0, 4.2) if agreed else (5.5, 4.2), layout="constrained")
    axes = made.subplots(1, 2 if agreed else 1, squeeze=False)[0]
    if agreed:
        names = list(dict.fromkeys(name for name, _ in agreed))
        heads = [*names, OTHERS]
        table = [[_tau(agreed, row, column) for column in heads] for row in names]
        axes[0].imshow(table, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
        axes[0].set_xticks(range(len(heads)), heads, rotation=30, ha="right")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_title("Agreement of two scorers: mean Kendall's tau-b", fontsize=10)
        for i, row in enumerate(table):
            for j, tau in enumerate(row):
                colour = "white" if abs(tau) > 0.6 else "black"
                axes[0].text(j, i, f"{tau:.2f}", ha="center", va="center", color=colour, fontsize=9)
    both = [*kept, *dropped]
    edges = [max(both, default=1.0) * i / 30 for i in range(31)] if max(both, default=0) > 0 else 30
    last = axes[-1]
    labels = [f"kept, {len(kept):,}", f"dropped, {len(dropped):,}"]
    last.hist(
        [list(kept), list(dropped)], bins=edges, stacked=True, label=labels, color=["#2a78d6", "#c9c7c0"]
    )
    if min_margin > 0:
        last.axvline(min_margin, color="black", linewidth=0.9, linestyle="--", label="min_margin")
    last.set_xlabel(f"margin ({unit})")
    last.set_title("Margins", fontsize=10)
    last.legend(fontsize=8)
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _tau(agreed: Mapping[tuple[str, str], Estimate], a: str, b: str) -> float:
    if a == b:
        return 1.0
    return (agreed[a, b] if (a, b) in agreed else agreed[b, a]).mean


def _size(scores: Scores) -> int:
    sizes = {len(row) for row in scores.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        lengths = ", ".join(f"{name} {len(row)}" for name, row in scores.items()) or "no scorer"
        raise ValueError(f"each scorer needs one score for each of two or more pictures, not {lengths}")
    return sizes.pop()
