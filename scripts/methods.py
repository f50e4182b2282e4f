"""Online methods as they are composed: one line a plug point, read from the recipes themselves.

triptych methods
triptych methods table llm
triptych methods table diffusion
triptych methods table recsys
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from triptych.scripts.common import errors_in_one_line

RECIPES = Path(__file__).resolve().parent / "recipes"
MODALITIES = ("llm", "diffusion", "recsys")
COLUMNS = ("recipe", "method", "paper", "source", "judge", "shape", "objective", "keep")
# Options that say how much, not what.
_SIZES = {
    "max_new_tokens",
    "batch_size",
    "max_step_tokens",
    "max_final_tokens",
    "template",
    "follow_up",
    "lead",
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="methods", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    table = commands.add_parser("table", help="the table as Markdown, as it stands in the README")
    table.add_argument("modality", choices=MODALITIES, nargs="?", default=MODALITIES[0])
    options = parser.parse_args(args)
    with errors_in_one_line():
        if options.command == "table":
            print(markdown(options.modality))
        else:
            for row in (row for modality in MODALITIES for row in rows(modality)):
                print(f"{row['recipe']}: {row['method']} ({row['paper']})")
                print(*(f"    {name:<10} {row[name]}" for name in COLUMNS[3:] if row[name] != "-"), sep="\n")
    return 0


def rows(modality: str = MODALITIES[0]) -> list[dict[str, str]]:
    """One row an online recipe of a modality, in the order of their names."""
    return [_row(path) for path in sorted((RECIPES / modality / "online").glob("*.yaml"))]


def markdown(modality: str = MODALITIES[0]) -> str:
    """The table of a modality's online recipes for the README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows(modality):
        cells = [row[name].replace("|", "\\|") for name in COLUMNS]
        lines.append("| " + " | ".join([f"`{cells[0]}`", *cells[1:]]) + " |")
    return "\n".join(lines)


def _row(path: Path) -> dict[str, str]:
    text = path.read_text("utf-8")
    recipe = yaml.safe_load(text)
    method, paper = _title(text)
    stages = [recipe | {k: v for k, v in s.items() if v is not None} for s in recipe.get("stages") or [{}]]
    row = {"recipe": path.stem, "method": method, "paper": paper}
    for name in ("source", "judge", "shape"):
        row[name] = _each(_plug(s.get(name)) for s in stages)
    row["objective"] = _each(_objective(s) for s in stages)
    row["keep"] = _each(_keep(s.get("keep") or {}) for s in stages)
    return row


def _title(text: str) -> tuple[str, str]:
    """Method and paper from the comment at the top: `# Name (Paper, arXiv 1234.56789): ...`."""
    lines = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    comment = " ".join(lines)
    found = re.search(r"^(.*?)\s*\(([^()]*arXiv [0-9.]+[^()]*)\)", comment)
    return (found[1].rstrip(","), found[2]) if found else (comment.partition(":")[0], "-")


def _each(parts: Any) -> str:
    """What the stages have, once where it is the same."""
    return "; then ".join(dict.fromkeys(parts))


def _plug(plug: Mapping[str, Any] | None) -> str:
    """A plug point in words: name(options), those that only say how much left out."""
    if plug is None:
        return "-"
    options = {k: v for k, v in (plug.get("options") or {}).items() if k not in _SIZES}
    inner = ", ".join(f"{k}={_value(v)}" for k, v in options.items())
    return f"{plug['name']}({inner})" if inner else plug["name"]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if "name" in value:
            return _plug(value)
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_value, value)) + "]" if isinstance(value, list) else str(value)


def _objective(stage: Mapping[str, Any]) -> str:
    parts = [_term(stage["objective"])]
    parts += [f"{r.get('weight', 1.0):g} {_term(r)}" for r in stage["objective"].get("regularizers") or []]
    parts += [
        f"{a.get('weight', 1.0):g} {_term(a['objective'])} on {_plug(a['source'])}"
        for a in stage.get("anchors") or []
    ]
    return " + ".join(parts)


def _term(term: Mapping[str, Any]) -> str:
    reference = term.get("reference", "frozen")
    where = "" if reference == "frozen" else f" against {reference}"
    return _plug({"name": term["name"], "options": term.get("options")}) + where


def _keep(keep: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in keep.items()) or "fixed"


if __name__ == "__main__":
    raise SystemExit(main())
