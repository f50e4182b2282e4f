"""What experiments share: claims and outcomes, intervals over seeds, one style of figure, stored results.

An experiment is a module of this folder with

    def run(*, seeds: int, quick: bool = False) -> Outcome: ...

    if __name__ == "__main__":
        main("its_name", run, __doc__)

so `python -m triptych.scripts.experiments.its_name` prints its claims, and `--save` stores them where
`scripts/evidence.py` reads them: assets/evidence/its_name.json and its_name.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from triptych.scripts.common import errors_in_one_line, versions
from triptych.training.stats import Estimate, bootstrap_interval, mean_interval

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "evidence"
SEEDS = 32

Family = Literal[
    "Self-play and games",
    "Online preferences",
    "Policy gradients",
    "Reasoning and trees",
    "Many users and groups",
    "A real language model",
    "Diffusion",
    "A generative recommender",
]
FAMILIES: tuple[Family, ...] = get_args(Family)

# Okabe and Ito's colours, which every kind of colour vision tells apart; lines differ in dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED = "#1a1a1a", "#767676"
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of the table.

    statement: the claim in words, with the relation that is expected. result: what came out, with numbers
    and an interval wherever there was randomness. holds: None means in part. what: what was run: the toy,
    its seeds and steps. paper: with its arXiv id.
    """

    family: Family
    method: str
    paper: str
    statement: str
    result: str
    holds: bool | None
    what: str
    command: str

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; valid: {', '.join(FAMILIES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an experiment found. figure: draws on an empty figure. caption: what is to be seen in it.

    size: of the figure, in inches. seconds: how long the run took.
    """

    claims: Sequence[Claim]
    figure: Callable[[Figure], None] | None
    caption: str
    seconds: float
    size: tuple[float, float] = (10.0, 3.6)


class Experiment(Protocol):
    """A module of this folder."""

    def run(self, *, seeds: int, quick: bool = False) -> Outcome:
        """Try the claims. seeds: repetitions of whatever is random. quick: sizes for tests only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An outcome as it is kept. figure: file name beside the JSON, or None."""

    name: str
    claims: tuple[Claim, ...]
    caption: str
    seconds: float
    figure: str | None
    date: str
    device: str
    versions: dict[str, str] = field(default_factory=dict[str, str])


def command(name: str) -> str:
    """What one types to run an experiment."""
    return f"python -m triptych.scripts.experiments.{name}"


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """A function that says how many seconds have passed."""
    start = time.monotonic()
    yield lambda: time.monotonic() - start


def over_seeds(values: Sequence[float] | Tensor, *, confidence: float = 0.95) -> Estimate:
    """Mean over seeds with its interval: the bootstrap's, or Student's t for fewer than 20 seeds.

    The bootstrap's is too narrow for few. For shares of seeds use `triptych.training.stats.win_rate`.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 20:
        return Estimate(*mean_interval(x, confidence), n=len(x))
    return bootstrap_interval(x, seed=0, confidence=confidence)


def verdict(*parts: bool) -> bool | None:
    """True if all parts hold, False if none does, None (in part) otherwise."""
    return True if all(parts) else None if any(parts) else False


def line(ax: Axes, x: Sequence[float] | Tensor, y: Sequence[float] | Tensor, series: int, label: str) -> None:
    """One curve in the series' colour and dashes."""
    ax.plot(_list(x), _list(y), color=COLOURS[series], linestyle=DASHES[series], label=label)


def band(ax: Axes, x: Sequence[float] | Tensor, y_SN: Tensor, series: int, label: str) -> None:
    """The mean over seeds of N points, y [S, N], with the 95 % interval of `over_seeds` shaded."""
    estimates = [over_seeds(column) for column in y_SN.T]
    line(ax, x, [e.mean for e in estimates], series, label)
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    ax.fill_between(_list(x), low, high, color=COLOURS[series], alpha=0.18, linewidth=0)


def bars(
    ax: Axes,
    labels: Sequence[str],
    estimates: Sequence[Estimate],
    *,
    series: int = 0,
    shift: float = 0.0,
    label: str | None = None,
) -> None:
    """One dot a label with its interval as an error bar, labels on the x axis.

    shift: to the right, so that several series stand side by side. label: of the series, for a legend.
    """
    x = [place + shift for place in range(len(labels))]
    means = [e.mean for e in estimates]
    errors = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    style = {"fmt": MARKERS[series], "color": COLOURS[series], "capsize": 4, "markersize": 6, "label": label}
    ax.errorbar(x, means, yerr=errors, **style)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.grid(visible=False, axis="x")


def save_figure(outcome: Outcome, path: Path) -> bool:
    """Draw the outcome's figure in the common style as a PNG; False where it has none."""
    if outcome.figure is None:
        return False
    with rc_context(STYLE):
        figure = Figure(figsize=outcome.size)
        outcome.figure(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    return True


def save(name: str, outcome: Outcome, folder: Path = ASSETS) -> Path:
    """Store the outcome: folder/name.json and, if it has a figure, folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = save_figure(outcome, folder / f"{name}.png")
    stored = Stored(
        name=name,
        claims=tuple(outcome.claims),
        caption=outcome.caption,
        seconds=round(outcome.seconds, 1),
        figure=f"{name}.png" if drawn else None,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=device_name(),
        versions=versions(),
    )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(asdict(stored), indent=1) + "\n", "utf-8")
    return path


def load(path: Path) -> Stored:
    """A stored outcome; ValueError naming the file that is not one."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return Stored(**(found | {"claims": tuple(Claim(**claim) for claim in found["claims"])}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no stored experiment: {error}") from None


def device_name() -> str:
    """What the experiments run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()}"


def word(holds: bool | None) -> str:
    """How a verdict is written."""
    return {True: "yes", False: "no", None: "in part"}[holds]


def report(outcome: Outcome) -> str:
    """The claims as text for a terminal."""
    rows = []
    for claim in outcome.claims:
        rows += [f"{claim.method} ({claim.paper})", f"  claim:  {claim.statement}", f"  run:    {claim.what}"]
        rows += [f"  result: {claim.result}", f"  holds:  {word(claim.holds)}", ""]
    return "\n".join([*rows, f"{outcome.seconds:.1f} s"])


def main(name: str, run: Callable[..., Outcome], doc: str | None, args: Sequence[str] | None = None) -> None:
    """Entry point of an experiment: run it, print its claims, and store them on request."""
    parser = argparse.ArgumentParser(prog=name, description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="repetitions of whatever is random")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try that it works")
    parser.add_argument("--save", nargs="?", type=Path, const=ASSETS, help="store results and figure here")
    options = parser.parse_args(args)
    with errors_in_one_line():
        if options.quick and options.save == ASSETS:
            raise ValueError("--quick results are not evidence; name another folder after --save")
        torch.set_num_threads(1)
        outcome = run(seeds=options.seeds, quick=options.quick)
        print(report(outcome))
        if options.save is not None:
            print(f"stored in {save(name, outcome, options.save)}")


def _list(values: Sequence[float] | Tensor) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float64).tolist()
