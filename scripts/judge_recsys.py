"""Judge alignment runs by what none of them was trained on: a ground truth, and ratings that were hidden.

    python scripts/judge_recsys.py --config scripts/recipes/recsys_judge/movielens_judge.yaml
    python scripts/judge_recsys.py --config ... --runs '{"ipa": ["runs/movielens_ipa"]}' --output runs/judged

runs: name -> folders of `train_recsys_online.py`, one a seed, all from one base. Beside them stand what needs
no training: the base's own beams ordered by the reward model, and by the mean response to their items. The
folder `output` gets report.html, results.json and verdict.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.exported import Recommender, load
from triptych.modalities.recsys.hidden_ratings import (
    HiddenRatings,
    hide_ratings,
    item_mean_rerank,
    item_means,
    judge_hidden,
)
from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.logged import LoggedSessions
from triptych.modalities.recsys.online_look import Answers, all_answers
from triptych.modalities.recsys.oracle_files import read_oracle
from triptych.modalities.recsys.ranked import RankingConfig, ranked_items
from triptych.modalities.recsys.trie import Trie
from triptych.modalities.recsys.verdicts import (
    Arm,
    Bench,
    arm_of,
    base_arm,
    estimates,
    first_answers,
    matched,
    reranked,
    session_means,
)
from triptych.scripts.common import (
    as_dict,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_libraries,
    versions,
)
from triptych.training.atomic import write_json
from triptych.training.quarantine import Quarantine
from triptych.training.report import Figure, Table, png, write_report
from triptych.training.stats import Estimate

BY_REWARD, BY_ITEMS, UPPER = "base, best by reward", "base, best by item means", "base, best by oracle"
COLUMNS = {
    "gold": "gold",
    "gold - base": "over the base",
    "drawn gold - base": "of samples, over the base",
    "best of beams - base": "best of beams, over the base",
    "reward - base": "reward model, over the base",
    "kl": "KL, nats",
    "agreement": "reward and gold agree",
    "recall - base": "recall@10, over the base",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """logs, oracle, other_oracle: what `log_sessions.py` wrote. control: the run that others are beside.

    hidden_share: of the judge users' ratings, hidden for the second judge; 0 leaves that out. shown: users
    whose sessions the report shows, by the base and by the first run.
    """

    logs: str
    oracle: str
    data: DataConfig
    runs: dict[str, list[str]]
    output: str
    other_oracle: str | None = None
    control: str | None = None
    hidden_share: float = 0.5
    shown: int = 8

    def __post_init__(self) -> None:
        if not self.runs or not all(self.runs.values()):
            raise ValueError("runs needs a name and at least one folder for it")
        if self.control is not None and self.control not in self.runs:
            raise ValueError(f"control={self.control} is none of the runs: {', '.join(self.runs)}")
        if not 0 <= self.hidden_share < 1:
            raise ValueError(f"hidden_share={self.hidden_share} must be at least 0 and below 1")


def run(config: Config) -> int:
    """Judge; returns the exit code."""
    quarantine, folder = Quarantine(), Path(config.output)
    events = load_interactions(config.data, quarantine=quarantine, report=print)
    logs = LoggedSessions.read(Path(config.logs))
    runs = {name: [Path(f) for f in folders] for name, folders in config.runs.items()}
    some = next(iter(runs.values()))[0]
    first = first_answers(some)
    results: dict[str, dict[str, Estimate]] = {}
    tables: list[Table] = []
    images: list[Figure] = []
    for name, place in (("oracle", config.oracle), ("other oracle", config.other_oracle)):
        if place is None:
            continue
        oracle = read_oracle(Path(place))
        if name == "oracle" and logs.about.get("oracle") != oracle.fingerprint:
            raise ValueError(f"oracle={place}: the logs were drawn from another one")
        bench = Bench.of(oracle, logs, first)
        arms = {arm: arm_of(folders, bench) for arm, folders in runs.items()} | _untrained(first, bench, logs)
        base = base_arm(some, first, bench)
        found = estimates(arms, base, config.control, bench.user_N.tolist())
        results |= {f"{name}: {arm}": values for arm, values in found.items()}
        tables.append(_table(name, found, config, len(bench.user_N)))
        if name == "oracle":
            tables += [*_matched_table(arms), *_shown(first, some, bench, logs, events, config.shown)]
            images.append(Figure("Reward and gold against KL", _figure(arms), FIGURE_NOTE))
    if config.hidden_share:
        table, more = _hidden(runs, logs, events, config)
        tables.append(table)
        results |= more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.png").write_bytes(images[0].data)
    flat = {f"{arm}: {name}": asdict(e) for arm, values in results.items() for name, e in values.items()}
    write_json(folder / "results.json", flat)
    for arm, values in results.items():
        print(f"{arm}: " + "  ".join(f"{name} {e:.3f}" for name, e in values.items()))
    path = write_report(
        folder,
        title=f"Verdict on {config.data.source}",
        summary=[
            (f"{arm}: gold over the base", f"{results[f'oracle: {arm}']['gold - base']:.3f}")
            for arm in list(runs)[:3]
        ],
        tables=tables,
        samples=[],
        images=images,
        config=as_dict(config),
        quarantine_counts=quarantine.counts,
        command=command_line(),
        versions=versions(),
        trained=False,
    )
    print(f"report: {path}")
    return 0


def _untrained(first: Answers, bench: Bench, logs: LoggedSessions) -> dict[str, Arm]:
    """The base's beams, one of them served by a rule: the reward, the items' mean response, or the truth."""
    train = logs.of("train")
    liked = torch.stack([train.signals[name] for name in ("vtr", "ltr", "wtr")]).mean(0).double()
    num = int(logs.items_Nm.max()) + 1
    num = max(num, int(first.served_NWm.max()) + 1)
    total = torch.zeros(num, dtype=torch.float64).index_add(0, train.items_Nm.flatten(), liked.flatten())
    count = torch.bincount(train.items_Nm.flatten(), minlength=num)
    # Items with few responses are drawn to the mean of all, by five of them.
    mean_I = (total + 5 * liked.mean()) / (count + 5)
    found = {} if bool(first.reward_NW[:, 0].isnan().any()) else {BY_REWARD: first.reward_NW.nan_to_num(-1e9)}
    found[BY_ITEMS] = session_means(first.served_NWm, mean_I)
    found[UPPER] = bench.gold(first.served_NWm).nan_to_num(-1e9)
    return {name: reranked(first, bench, score) for name, score in found.items()}


def _table(judge: str, found: Mapping[str, Mapping[str, Estimate]], config: Config, num: int) -> Table:
    named = dict(COLUMNS)
    if config.control is not None:
        named[f"gold - {config.control}"] = f"over {config.control}"
    used = [n for n in named if any(n in values for values in found.values())]
    rows: list[list[Any]] = []
    for arm, values in found.items():
        seeds = len(config.runs.get(arm, ()))
        label = f"{arm} ({seeds} seeds)" if seeds > 1 else arm
        rows.append([label, *(values.get(n) for n in used)])
    note = (
        f"Gold: expected reward by the {judge} of the session that is served, {num} requests of users whom "
        "nothing was trained on; 95 % bootstrap intervals over users, means over seeds. 'base, best by ...' "
        "need no training; by oracle is what choosing among the base's beams can reach at most."
    )
    return Table(f"Verdict of the {judge}", ["sessions", *(named[n] for n in used)], rows, note)


def _matched_table(arms: Mapping[str, Arm]) -> list[Table]:
    kl, found = matched(arms)
    if not found:
        return []
    rows = [
        [name, f"{sum(gains) / len(gains):.4f}", " ".join(f"{g:.4f}" for g in gains)]
        for name, gains in found.items()
    ]
    note = f"Gain of samples' gold where each run first reaches a KL of {kl:.3f} nats to the base."
    return [Table("Gain at the same KL", ["run", "mean", "by seed"], rows, note)]


PANELS = {
    "served": "gold, served session",
    "gold": "gold, drawn sessions",
    "reward": "reward, drawn sessions",
}
FIGURE_NOTE = (
    "Gains over the base, one line a run. Reward up while gold stays or falls is the reward model's error "
    "being learnt. The reward is each run's own judge, which for random or shuffled ones means nothing."
)


def _figure(arms: Mapping[str, Arm]) -> bytes:
    """Gold and reward gains against KL, as PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 3.8), layout="constrained")
    panels = dict(zip(PANELS, canvas.subplots(1, len(PANELS), sharex=True), strict=True))
    trained = {name: arm for name, arm in arms.items() if arm.paths}
    for place, (name, arm) in enumerate(trained.items()):
        colour = colormaps["tab20" if len(trained) > 10 else "tab10"](place)
        for what, axes in panels.items():
            for i, path in enumerate(arm.paths):
                points = [p for p in path if p.kl > 0]
                label = name if not i else None
                y = [getattr(p, what) for p in points]
                axes.plot([p.kl for p in points], y, ".-", color=colour, markersize=4, lw=1, label=label)
    for what, axes in panels.items():
        axes.set_title(PANELS[what])
        axes.set_xlabel("KL to the base, nats a session")
        axes.set_xscale("log")
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(canvas)


def _shown(
    first: Answers, folder: Path, bench: Bench, logs: LoggedSessions, events: Interactions, most: int
) -> list[Table]:
    """Some users' latest items, the sessions of the base and of a run by title, and what the oracle says."""
    if not most:
        return []
    last = Answers.read(list(all_answers(folder).values())[-1])
    judged = logs.of("judge")
    gold = [bench.gold(a.served_NWm[:, :1])[:, 0] for a in (first, last)]

    def text(items: Tensor) -> str:
        return " | ".join(events.titles[i] for i in items.tolist() if i >= 0)

    rows = []
    num = len(first.row_N)
    for n in torch.linspace(0, num - 1, min(most, num)).long().unique().tolist():
        at = int(first.row_N[n])
        history = judged.history.values[judged.history.offsets[at] : judged.history.offsets[at + 1]]
        sessions = [text(a.served_NWm[n, 0]) for a in (first, last)]
        rows.append(
            [
                events.users[int(bench.user_N[n])],
                text(history[-5:]),
                sessions[0],
                float(gold[0][n]),
                sessions[1],
                float(gold[1][n]),
            ]
        )
    columns = ["user", "latest items", "before", "oracle says", "after", "oracle says"]
    note = f"Before alignment, and after that of {folder.name}. The oracle's number is the expected reward."
    return [Table("Sessions before and after alignment", columns, rows, note)]


def _hidden(
    runs: Mapping[str, Sequence[Path]], logs: LoggedSessions, events: Interactions, config: Config
) -> tuple[Table, dict[str, dict[str, Estimate]]]:
    """The judge without synthesis: half of the judge users' ratings hidden, and what of it is recommended."""
    users = sorted(set(logs.of("judge").user_N.tolist()))
    hidden = hide_ratings(events, users, seed=0, share=config.hidden_share)
    mean_I = item_means(_without(hidden, users))
    base = Path(_settings(next(iter(runs.values()))[0])["base"])
    models = {"base": [base]} | {name: [f / "model" for f in folders] for name, folders in runs.items()}
    results: dict[str, dict[str, Estimate]] = {}
    rows: list[list[Any]] = []
    with progress("hidden ratings", enabled=True)(sum(map(len, models.values())), 0) as bar:
        done = 0
        for name, folders in models.items():
            found = []
            for folder in folders:
                items = _recommended(load(folder), hidden)
                found.append(
                    judge_hidden(items[:, :10], hidden, against_Rk=item_mean_rerank(items, mean_I, 10))
                )
                bar.update(done := done + 1)
            # Seeds are judged together, as more recommendations to the same users.
            summaries = [rows_.summary(seed=0) for rows_ in found]
            results[f"hidden: {name}"] = summaries[0]
            keys = ("precision", "precision_lift", "rating_lift")
            rows.append([name, *(summaries[0].get(k) for k in keys)])
    note = (
        f"{len(users)} judge users; {config.hidden_share:.0%} of each one's ratings are hidden, and the "
        "first 10 items recommended from the others are read against them. Precision: liked (4 or 5) of what "
        "was rated; lift: over what the user likes anyway; rating: over the same candidates ordered by "
        "items' means. First seed of each."
    )
    columns = ["model", "precision", "over the user's rate", "rating over item means"]
    return Table("Ratings that were hidden", columns, rows, note), results


def _without(hidden: HiddenRatings, users: Sequence[int]) -> Interactions:
    """What is known, without the judged users."""
    keep_U = torch.ones(len(hidden.known.users), dtype=torch.bool)
    keep_U[list(users)] = False
    return hidden.known.kept(keep_U[hidden.known.user_E])


def _recommended(made: Recommender, hidden: HiddenRatings) -> Tensor:
    """The first 50 items for every judged user, from the events that are known."""
    assert made.ids is not None
    histories = [hidden.known.of(user) for user in hidden.users]
    ranking = RankingConfig(ks=[50], width=50)
    trie = Trie.of(made.ids.codes_IL, made.ids.sizes)
    owners = made.owners([hidden.known.users[user] for user in hidden.users])
    return ranked_items(made.policy, trie, histories, ranking, window=made.window, owners=owners)


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text("utf-8"))


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="judge_recsys", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
