"""report.html: everything a run shows people, in one file that needs nothing else and runs nothing."""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from triptych.training.curves import Curve, render_curves
from triptych.training.logs import read_metrics
from triptych.training.redaction import printable, redact
from triptych.training.stats import Estimate

__all__ = ["Curve", "Figure", "SamplePair", "Table", "png", "render_curves", "write_report"]

# Longer texts are cut, with the number of characters named: a report is read, not searched.
_MAX_TEXT = 8_000
_MAX_OPEN_SAMPLES = 6

_IMAGE_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_NUMBER = re.compile(
    r"[-+\u2212]?(?:\d[\d,]*(?:\.\d*)?|\.\d+|inf|nan)(?:e[-+]?\d+)?\s*%?(?:\s*\[[^\[\]]*\])?"
)
_WITH_INTERVAL = re.compile(r"(?P<value>[^\[\]]*[^\s\[\]])\s*\[(?P<interval>[^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of results. Cells are text, numbers, `Estimate`s or None (shown as a dash)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class SamplePair:
    """One prompt answered by the base and by the aligned model, as text or as PNG or JPEG bytes.

    scores: name -> (base, aligned), or one number where only the aligned sample was scored.
    """

    prompt: str
    base: str | bytes
    aligned: str | bytes
    scores: Mapping[str, float | tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture for the report, PNG or JPEG bytes, such as a grid of samples."""

    title: str
    data: bytes
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    interval: str = ""
    numeric: bool = False


def png(drawing: Any) -> bytes:
    """A matplotlib figure as PNG; nothing in it but the drawing, so the same one gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(drawing).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def write_report(
    run_dir: Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    samples: Sequence[SamplePair],
    images: Sequence[Figure] = (),
    config: Mapping[str, Any],
    quarantine_counts: Mapping[str, int],
    command: str,
    versions: Mapping[str, str] | None = None,
    trained: bool = True,
) -> Path:
    """Write `run_dir/report.html` and return its path.

    summary: (label, value) headline results; a value such as "0.71 [0.66, 0.76]" shows its interval
    smaller. Curves come from `run_dir/metrics.jsonl`. Every text is escaped and rid of control
    characters; config, command, tables and reasons are also redacted. The page may load nothing (its
    content security policy allows inline styles and data images only) and holds no script and no date,
    so the same run gives the same bytes. ValueError for an image that is neither PNG nor JPEG or a table
    row whose length is not that of its columns. trained: whether there is a section on training.
    """
    run_dir = Path(run_dir)
    log = run_dir / "metrics.jsonl"
    metrics = read_metrics(log) if log.exists() else []
    page = _template().render(
        title=_text(title),
        trained=trained,
        run=_text(run_dir.resolve().name),
        num_steps=max((event["step"] for event in metrics), default=0),
        summary=[(_text(label), _cell(value)) for label, value in summary],
        curves=[(curve, Markup(curve.svg)) for curve in render_curves(metrics)],
        tables=[_table(table) for table in tables],
        samples=[_sample(pair) for pair in samples],
        num_open=_MAX_OPEN_SAMPLES,
        images=[(_text(image.title), _data_uri(image.data), _text(image.note)) for image in images],
        quarantine=sorted(
            ((redact(str(reason)), int(count)) for reason, count in quarantine_counts.items()),
            key=lambda row: (-row[1], row[0]),
        ),
        config=_yaml(config),
        versions=[(str(name), str(version)) for name, version in redact(versions or {}).items()],
        command=redact(command),
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    path, temporary = run_dir / "report.html", run_dir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


def _template() -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _text(value: Any) -> str:
    text = printable(str(value))
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}\u2026 [{len(text) - _MAX_TEXT:,} more characters]"


def _cell(value: Any) -> _Cell:
    if value is None:
        return _Cell("\u2013", numeric=True)
    if isinstance(value, bool):
        return _Cell("yes" if value else "no")
    if isinstance(value, Estimate):
        return _cell(f"{value:.3f}")
    if isinstance(value, int | float):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return _Cell(text.replace("-", "\u2212"), numeric=True)
    text = _text(redact(str(value)))
    numeric = _NUMBER.fullmatch(text.strip()) is not None
    parts = _WITH_INTERVAL.fullmatch(text.strip())
    if parts is None:
        return _Cell(text.replace("-", "\u2212") if numeric else text, numeric=numeric)
    interval = parts["interval"].replace("-", "\u2212")
    return _Cell(parts["value"].replace("-", "\u2212") if numeric else parts["value"], interval, numeric)


def _table(table: Table) -> dict[str, Any]:
    for i, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r}: row {i} has {len(row)} cells for {len(table.columns)} columns"
            )
    rows = [[_cell(value) for value in row] for row in table.rows]
    numeric = [
        bool(rows) and all(row[i].numeric for row in rows) and any(row[i].text != "\u2013" for row in rows)
        for i in range(len(table.columns))
    ]
    return {
        "title": _text(table.title),
        "columns": [(_text(name), numeric[i]) for i, name in enumerate(table.columns)],
        "rows": [list(zip(row, numeric, strict=True)) for row in rows],
        "note": redact(table.note),
    }


def _sample(pair: SamplePair) -> dict[str, Any]:
    base_scores, aligned_scores = [], []
    for name, score in pair.scores.items():
        base, aligned = score if isinstance(score, tuple | list) else (None, score)
        if base is not None:
            base_scores.append((_text(name), _cell(float(base)).text, ""))
        change = "" if base is None or base == aligned else "up" if aligned > base else "down"
        aligned_scores.append((_text(name), _cell(float(aligned)).text, change))
    sides = [
        (label, kind, *_shown(value), scores)
        for label, kind, value, scores in (
            ("Base", "base", pair.base, base_scores),
            ("Aligned", "aligned", pair.aligned, aligned_scores),
        )
    ]
    return {"prompt": _text(pair.prompt), "sides": sides}


def _shown(value: str | bytes) -> tuple[str, str]:
    """(text, data URI): one of them is empty."""
    return ("", _data_uri(value)) if isinstance(value, bytes) else (_text(value), "")


def _data_uri(data: bytes) -> str:
    for magic, kind in _IMAGE_KINDS.items():
        if data.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    raise ValueError(f"an image begins with {data[:8]!r}; valid: the bytes of a PNG or a JPEG file")


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True, width=110) if config else ""
