"""EVIDENCE.md: what papers claim, tried where everything can be computed, with the result and its interval.

    python scripts/evidence.py                      # every experiment, a few minutes on one thread
    python scripts/evidence.py --only cyclic_game   # one of them; the others keep their stored results
    python scripts/evidence.py --render             # EVIDENCE.md from the stored results
    python scripts/evidence.py --check              # fails if EVIDENCE.md is not what they give
    python scripts/evidence.py --quick              # small sizes, into runs/evidence_quick

Results are kept as assets/evidence/NAME.json and NAME.png. Experiments that train a real model are run only
when `--only` names them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from triptych.scripts.common import errors_in_one_line
from triptych.scripts.experiments import EXPERIMENTS, LONG
from triptych.scripts.experiments.common import FAMILIES, ROOT, SEEDS, Claim, Stored, load, save, word

INTRODUCTION = """# Evidence

What papers claim, and what came out when it was tried here. These are small experiments in which everything
can be computed or repeated many times: they show relations, not benchmark numbers, and reproduce no paper's
scores. A relation that did not hold is in the same tables, with 'no' or 'in part'. Numbers in brackets are
95 % intervals over seeds.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run what is asked for, store it, write EVIDENCE.md; with --check only compare."""
    options = _parse(args)
    with errors_in_one_line():
        folder = options.output / "assets" / "evidence"
        page = options.output / "EVIDENCE.md"
        if options.check:
            return _check(folder, page)
        if not options.render:
            torch.set_num_threads(1)
            run_all(options.only or EXPERIMENTS, folder, seeds=options.seeds, quick=options.quick)
        page.write_text(render(stored(folder)), "utf-8")
        print(f"wrote {page}")
    return 0


def run_all(names: Iterable[str], folder: Path, *, seeds: int, quick: bool) -> None:
    """Run experiments by name and store what they find."""
    for name in names:
        if name not in EXPERIMENTS + LONG:
            raise ValueError(f"there is no experiment '{name}'; there are {', '.join(EXPERIMENTS + LONG)}")
        experiment = importlib.import_module(f"triptych.scripts.experiments.{name}")
        outcome = experiment.run(seeds=seeds, quick=quick)
        save(name, outcome, folder)
        verdicts = ", ".join(f"{c.method}: {word(c.holds)}" for c in outcome.claims)
        print(f"{name} ({outcome.seconds:.1f} s)  {verdicts}", flush=True)


def stored(folder: Path) -> list[Stored]:
    """Every stored result, in the order of the registry; ValueError for one that it does not name."""
    found = {path.stem: path for path in folder.glob("*.json")}
    unknown = sorted(found.keys() - set(EXPERIMENTS + LONG))
    if unknown:
        raise ValueError(f"{folder} has results of {', '.join(unknown)}, which no experiment writes")
    if not found:
        raise ValueError(f"{folder} has no results; run python scripts/evidence.py first")
    results = [load(found[name]) for name in EXPERIMENTS + LONG if name in found]
    for result in results:
        if result.figure is not None and not (folder / result.figure).is_file():
            raise ValueError(f"{folder / result.figure} is missing; run --only {result.name}")
    return results


def render(results: Sequence[Stored]) -> str:
    """EVIDENCE.md: a table a family, each followed by its figures, then where and when it was run."""
    claims = [claim for result in results for claim in result.claims]
    counts = {w: sum(word(c.holds) == w for c in claims) for w in ("yes", "in part", "no")}
    tally = ", ".join(f"{number} {w}" for w, number in counts.items())
    parts = [INTRODUCTION, f"{len(claims)} claims: {tally}.\n"]
    for family in FAMILIES:
        own = [result for result in results if any(c.family == family for c in result.claims)]
        if not own:
            continue
        parts += [f"## {family}\n", _table([c for r in own for c in r.claims if c.family == family])]
        # A figure stands where most of its experiment's claims do, once.
        parts += [_figure(r) for r in own if r.figure is not None and _home(r) == family]
    parts.append(_provenance(results))
    return "\n".join(parts)


def _home(result: Stored) -> str:
    families = [claim.family for claim in result.claims]
    return max(families, key=families.count)


def _table(claims: Sequence[Claim]) -> str:
    rows = ["| claim | paper | what was run | result | holds | command |", "|---|---|---|---|---|---|"]
    for claim in claims:
        cells = (f"**{claim.method}**: {claim.statement}", claim.paper, claim.what, claim.result)
        rows.append(
            f"| {' | '.join(map(_cell, cells))} | **{word(claim.holds)}** | `{_cell(claim.command)}` |"
        )
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _figure(result: Stored) -> str:
    alt = result.caption.partition(".")[0]
    image = f"![{alt}](assets/evidence/{result.figure})"
    return f"{image}\n\n*{result.name}.* {result.caption}\n"


def _provenance(results: Sequence[Stored]) -> str:
    """When, at which commit, on what: results that share all of it in one row."""
    groups: dict[tuple[str, str, str, str], list[Stored]] = {}
    for result in results:
        libraries = {k: v for k, v in result.versions.items() if k != "commit"}
        text = ", ".join(f"{k} {v}" for k, v in libraries.items())
        key = (result.date, result.versions.get("commit", "none"), result.device, text)
        groups.setdefault(key, []).append(result)
    rows = ["| experiments (seconds) | date | last commit | device | versions |", "|---|---|---|---|---|"]
    for key, own in groups.items():
        names = ", ".join(f"{r.name} ({r.seconds:.0f})" for r in own)
        rows.append(f"| {' | '.join(map(_cell, (names, *key)))} |")
    return "## Where and when\n\n" + "\n".join(rows) + "\n"


def _check(folder: Path, page: Path) -> int:
    missing = [name for name in EXPERIMENTS if not (folder / f"{name}.json").is_file()]
    if missing:
        print(f"no stored result of {', '.join(missing)}; run python scripts/evidence.py", file=sys.stderr)
        return 1
    if not page.is_file() or page.read_text("utf-8") != render(stored(folder)):
        print(f"{page.name} is not current; run python scripts/evidence.py --render", file=sys.stderr)
        return 1
    print(f"{page.name} is current")
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evidence", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=json.dumps([*EXPERIMENTS, *LONG]))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try that it works")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="repetitions of whatever is random")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="run and write nothing")
    parser.add_argument("--output", type=Path, help="folder of EVIDENCE.md and assets/evidence")
    options = parser.parse_args(args)
    if options.quick and options.output is not None and options.output.resolve() == ROOT:
        parser.error("--quick results are not evidence; give another --output")
    if options.output is None:
        options.output = ROOT / "runs" / "evidence_quick" if options.quick else ROOT
    return options


if __name__ == "__main__":
    raise SystemExit(main())
