"""Training curves as inline SVG: drawn by matplotlib, coloured by the page that holds them.

The SVG carries no script, style sheet, metadata, namespace address or date, and the same metrics give
the same bytes. Colours are CSS variables (--ink, --muted, --grid, --card, --series-1, --series-2), so
one drawing serves light and dark pages.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that survive matplotlib's colour parsing and are exchanged for variables in the SVG text.
_INK, _MUTED, _GRID, _CARD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_SERIES = ("#0a0b05", "#0a0b06")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _CARD: "var(--card)",
    _SERIES[0]: "var(--series-1)",
    _SERIES[1]: "var(--series-2)",
}
_MAX_POINTS = 400
# Beyond this matplotlib's own arithmetic overflows; such a loss is as good as infinite.
_DRAWABLE = 1e30


@dataclass(frozen=True, slots=True)
class Mark:
    """One legend entry: what it is, its last value, which of the two colours, line or points."""

    label: str
    value: str
    series: int
    held_out: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """One panel: inline SVG, its legend, and a note about values that could not be drawn."""

    title: str
    svg: str
    marks: tuple[Mark, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    keys: tuple[str, ...]
    level: float | None = None
    noisy: bool = True


@dataclass(frozen=True, slots=True)
class _Points:
    steps: list[int]
    values: list[float]
    lows: list[float]
    highs: list[float]
    num_skipped: int


_PANELS = (
    _Panel("Loss", ("loss",)),
    _Panel("Accuracy", ("rewards/accuracies",), level=0.5),
    _Panel("Margin", ("rewards/margins",), level=0.0),
    _Panel("Log-probability", ("logps/chosen", "logps/rejected")),
    _Panel("Reward", ("reward",)),
    _Panel("KL to the reference", ("kl",)),
    _Panel("Length of samples", ("length",)),
    _Panel("Drift from the reference", ("drift",)),
    _Panel("Diversity of samples", ("diversity",)),
    _Panel("Learning rate", ("learning_rate",), noisy=False),
    _Panel("Gradient norm", ("grad_norm",)),
)


def _measured(metrics: Sequence[Mapping[str, Any]]) -> list[_Panel]:
    """A panel for every measure of samples, which the log calls reward/<name>."""
    names = {k for event in metrics for k in event if k.startswith("reward/")}
    kept = sorted(k for k in names if not k.endswith(("_low", "_high")))
    return [_Panel(k.removeprefix("reward/").replace("_", " ").capitalize(), (k,)) for k in kept]


def render_curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """One curve per panel that has values, from the events of `read_metrics`.

    Training values are a thin raw line under a smoothed one; held-out values are points, with an
    interval where the event also holds `<name>_low` and `<name>_high`. Of long runs the raw line keeps
    the lowest and highest value of each stretch, so no spike is lost. Values that are not finite are
    counted in the note.
    """
    curves = []
    # matplotlib offers the salt and the font type as settings only; they are put back on leaving.
    with style.context(["default", {"svg.hashsalt": "triptych", "svg.fonttype": "none"}]):
        for panel in (*_PANELS, *_measured(metrics)):
            found = {
                (key, split): _points(metrics, key, split)
                for key in panel.keys
                for split in ("train", "eval")
            }
            if any(points.values for points in found.values()):
                curves.append(_draw(panel, found))
    return tuple(curves)


def _points(metrics: Sequence[Mapping[str, Any]], key: str, split: str) -> _Points:
    at: dict[int, tuple[float, float, float]] = {}
    num_skipped = 0
    for event in metrics:
        if event.get("split") != split or key not in event:
            continue
        value = _drawable(event[key])
        if value is None:
            num_skipped += 1
            continue
        low, high = (_drawable(event.get(f"{key}_{end}")) for end in ("low", "high"))
        at[event["step"]] = (value, value if low is None else low, value if high is None else high)
    steps = sorted(at)
    values, lows, highs = ([at[step][i] for step in steps] for i in range(3))
    return _Points(steps, values, lows, highs, num_skipped)


def _drawable(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _DRAWABLE else None


def _draw(panel: _Panel, found: Mapping[tuple[str, str], _Points]) -> Curve:
    figure = Figure(figsize=(5.0, 2.6), layout="constrained")
    axes = figure.subplots()
    if panel.level is not None:
        axes.axhline(panel.level, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    marks = []
    for i, key in enumerate(panel.keys):
        name = f"{key.rpartition('/')[2]}, " if len(panel.keys) > 1 else ""
        train, held_out = found[key, "train"], found[key, "eval"]
        if train.values:
            smooth = _smooth(train.values) if panel.noisy else train.values
            _draw_train(axes, train, smooth, _SERIES[i])
            marks.append(Mark(f"{name}training", _tick(smooth[-1]), i + 1, False))
        if held_out.values:
            _draw_held_out(axes, held_out, _SERIES[i])
            marks.append(Mark(f"{name}held out", _last_held_out(held_out), i + 1, True))
    _dress(axes)
    num_skipped = sum(points.num_skipped for points in found.values())
    plural = "s are" if num_skipped > 1 else " is"
    note = f"{num_skipped} value{plural} not finite and not drawn." if num_skipped else ""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    label = f"{panel.title} by step; " + "; ".join(f"{mark.label} ends at {mark.value}" for mark in marks)
    return Curve(panel.title, _inline(buffer.getvalue(), panel.title, label), tuple(marks), note)


def _draw_train(axes: Axes, points: _Points, smooth: list[float], colour: str) -> None:
    if len(points.values) < 2:
        axes.plot(points.steps, points.values, "o", color=colour, markersize=3.5)
        return
    if smooth != points.values:
        axes.plot(*_extremes(points.steps, points.values), color=colour, linewidth=0.7, alpha=0.32)
    axes.plot(*_extremes(points.steps, smooth), color=colour, linewidth=1.8)


def _draw_held_out(axes: Axes, points: _Points, colour: str) -> None:
    axes.plot(points.steps, points.values, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
    if points.lows != points.values or points.highs != points.values:
        axes.vlines(points.steps, points.lows, points.highs, color=colour, linewidth=1.2)
    axes.plot(
        points.steps,
        points.values,
        "o",
        markersize=5,
        markerfacecolor=_CARD,
        markeredgecolor=colour,
        markeredgewidth=1.5,
    )


def _last_held_out(points: _Points) -> str:
    value, low, high = points.values[-1], points.lows[-1], points.highs[-1]
    return _tick(value) if low == high else f"{_tick(value)} [{_tick(low)}, {_tick(high)}]"


def _smooth(values: Sequence[float]) -> list[float]:
    """Bias-corrected exponential mean over about a 25th of the run; short runs stay as they are."""
    if len(values) < 12:
        return list(values)
    keep = 1 - 2 / (max(5.0, len(values) / 25) + 1)
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth


def _extremes(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `_MAX_POINTS` points: the lowest and the highest of each stretch, in order."""
    if len(values) <= _MAX_POINTS:
        return list(steps), list(values)
    size = math.ceil(2 * len(values) / _MAX_POINTS)
    kept = []
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    kept = sorted({0, *kept, len(values) - 1})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _dress(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=8.5, labelcolor=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _step_text(step)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.margins(x=0.02, y=0.08)


def _step_text(step: float) -> str:
    return f"{step / 1000:,g}k" if abs(step) >= 10_000 else f"{step:,.0f}"


def _tick(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:,.0f}"
    mantissa, _, exponent = text.partition("e")
    text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return text.replace("-", "\u2212")


def _inline(svg: str, title: str, label: str) -> str:
    """What of matplotlib's file may stand inside a page: shapes and text, no prolog, metadata or style."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[\d. ]+"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box[0]} role="img" aria-label="{label}">', svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    # Several drawings share one page, so each gets its own names.
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    # Coordinates need two decimals; numbers that are read, between the tags, stay as they are.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg).strip()
