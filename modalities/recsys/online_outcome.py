"""What an alignment run leaves behind: retrieval before and after, sessions by title, the model, a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from triptych.modalities.recsys.exported import export
from triptych.modalities.recsys.online import OnlineConfig, OnlineRun
from triptych.modalities.recsys.online_look import Answers, Looker, all_answers, answers_path
from triptych.modalities.recsys.ranked import ranked_items, tested
from triptych.modalities.recsys.ranking import ranking_metrics
from triptych.modalities.recsys.ranking_report import ranking_note, ranking_table
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.logs import Progress
from triptych.training.quarantine import Quarantine
from triptych.training.references import unwrapped
from triptych.training.report import Table, write_report
from triptych.training.stats import Estimate, bootstrap_interval, paired_difference

BASE, ALIGNED = "base", "aligned"


def finish_online(
    run: OnlineRun,
    config: OnlineConfig,
    looker: Looker,
    *,
    step: int,
    alarm: str | None,
    quarantine: Quarantine,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> None:
    """Rank the held-out items with base and aligned model, write the last answers, export, and report."""
    folder, model = Path(config.run.output_dir), unwrapped(run.policy)
    last = answers_path(folder, step)
    if not last.is_file():
        looker.answers(model).write(last)
    first, after = (Answers.read(p) for p in (next(iter(all_answers(folder).values())), last))
    clusters = [r.user for r in looker.requests]
    table, results = _answers_table(first, after, clusters)
    ranking, measured = _retrieval(run, config, folder, bar)
    results |= measured
    state = model.state_dict()
    export(folder / "model", replace(run.base, policy=run.policy), state=state)
    objective = config.objective.name if config.weight else "next-token prediction"
    numbers = {name: f"{value:.3f}" for name, value in results.items()}
    write_card(
        folder / "model",
        base_model=config.base,
        library_name="safetensors",
        tags=["generative-recommendation", "preference-alignment", objective],
        datasets=[config.data.source],
        license=None,
        metrics=numbers,
        command=command,
        versions=versions,
        config=settings,
    )
    write_json(folder / "results.json", {n: asdict(e) for n, e in results.items()})
    headlines = ["reward, aligned - base", "KL to the base", "aligned - base: recall@10"]
    summary = [(name, numbers[name]) for name in headlines if name in numbers]
    path = write_report(
        folder,
        title=f"{objective} alignment on {config.data.source}",
        summary=[*([("stopped by the alarm", alarm)] if alarm else []), *summary],
        tables=[table, ranking, *_shown(run, looker, first, after, config.evaluation.shown)],
        samples=[],
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:.3f}")
    report(f"report: {path}")


def _answers_table(
    first: Answers, after: Answers, clusters: Sequence[str]
) -> tuple[Table, dict[str, Estimate]]:
    """The recipe's own reward of the answers to the judge users, before and after, and the KL."""

    def of(answers: Answers) -> dict[str, Tensor]:
        return {
            "served": answers.reward_NW[:, 0],
            "mean of beams": answers.reward_NW.nanmean(1),
            "best of beams": answers.reward_NW.nan_to_num(-torch.inf).amax(1),
            "drawn": answers.reward_NS.nanmean(1),
        }

    results: dict[str, Estimate] = {}
    lines: list[list[Any]] = []
    for name, (before, now) in {n: (of(first)[n], of(after)[n]) for n in of(first)}.items():
        if not bool(before.isfinite().all() and now.isfinite().all()):
            continue
        label = "reward" if name == "served" else f"reward, {name}"
        results[f"{label}, {ALIGNED} - {BASE}"] = gain = paired_difference(
            before, now, seed=0, clusters=clusters
        )
        pair = [bootstrap_interval(x, seed=0, clusters=clusters) for x in (before, now)]
        lines.append([label, *pair, gain])
    kl = bootstrap_interval(after.kl_NS.mean(1), seed=0, clusters=clusters)
    results["KL to the base"] = kl
    lines.append(["KL to the base, nats a session", 0.0, kl, None])
    note = (
        f"{len(first.row_N)} requests of users who are not learnt from; 95 % bootstrap intervals over users. "
        "The reward is the one that was optimised, so it cannot say whether the sessions are better: "
        "`triptych judge recsys` asks judges that have never been trained on."
    )
    columns = ["measure", BASE, ALIGNED, f"{ALIGNED} - {BASE}"]
    return Table("The reward that was optimised", columns, lines, note), results


def _retrieval(
    run: OnlineRun, config: OnlineConfig, folder: Path, bar: Callable[[str, int], Progress]
) -> tuple[Table, dict[str, Estimate]]:
    """Ranking of real held-out items by the base and by the aligned model."""
    settings = config.evaluation.ranking
    users, histories, targets = tested(run.split)
    owners = run.base.owners(run.events.users)[users]
    rankings: dict[str, Tensor] = {}

    def rank(name: str, policy: Any) -> None:
        with bar(f"rank, {name}", len(users)) as progress:
            rankings[name] = ranked_items(
                policy,
                run.port.trie,
                histories,
                settings,
                window=run.port.window,
                owners=owners,
                progress=progress.update,
            )

    with run.rounds.frozen.active(run.policy) as base:
        rank(BASE, base)
    rank(ALIGNED, run.policy)
    tensors = {f"items.{name}": items.contiguous() for name, items in rankings.items()}
    save_file(
        tensors | {"users": torch.tensor(users), "targets": targets.contiguous()},
        folder / "rankings.safetensors",
    )
    rows = {n: [ranking_metrics(items, targets, tuple(settings.ks))] for n, items in rankings.items()}
    return ranking_table(rows, against=ALIGNED, note=ranking_note(settings, run.switches))


def _shown(run: OnlineRun, looker: Looker, first: Answers, after: Answers, most: int) -> list[Table]:
    """Some users' latest items and the sessions before and after, by title."""
    if not most:
        return []
    titles = run.base.titles

    def text(items: Tensor) -> str:
        return " | ".join(titles[i] for i in items.tolist() if i >= 0)

    num = len(looker.requests)
    lines = []
    for row in torch.linspace(0, num - 1, min(most, num)).long().unique().tolist():
        request = looker.requests[row]
        before, now = (text(a.served_NWm[row, 0]) for a in (first, after))
        lines.append([request.user, text(request.history[-5:]), before, now])
    columns = ["user", "latest items", f"session, {BASE}", f"session, {ALIGNED}"]
    return [Table("Sessions before and after", columns, lines, "Users who are not learnt from.")]
