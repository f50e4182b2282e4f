"""Iterative Preference Alignment and its rivals on ML-100k, judged by a ground truth none was trained on.

    python -m triptych.scripts.experiments.recsys_alignment --save
    python -m triptych.scripts.experiments.recsys_alignment --arms dpo ntp     # train some alone

Logs, two reward models and one base come first; then every arm changes one thing of the recipe
`recipes/recsys/online/movielens_ipa.yaml`. A run that is finished is not run again, one that was interrupted
goes on: runs/evidence/recsys_alignment/<arm>-<seed>.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import torch
from matplotlib.figure import Figure

from triptych.scripts import (
    judge_recsys,
    log_sessions,
    train_recsys,
    train_recsys_online,
    train_session_reward,
)
from triptych.scripts.experiments.common import (
    ASSETS,
    ROOT,
    Claim,
    Outcome,
    command,
    report,
    save,
    stopwatch,
    verdict,
)
from triptych.scripts.judge_recsys import FIGURE_NOTE
from triptych.training.stats import Estimate

NAME = "recsys_alignment"
RECIPES = ROOT / "scripts" / "recipes"
RUNS = ROOT / "runs" / "evidence" / NAME
PAPER = "OneRec, Deng et al. 2025, arXiv 2502.18965"
SEEDS = 3
DATA = "movielens-100k"
FEW = {"source": {"name": "beams", "options": {"num_candidates": 8}}}
DRAWN = {"source": {"name": "policy", "options": {"num_candidates": 8}}}


def _objective(name: str, reference: str = "stage", **options: Any) -> dict[str, Any]:
    return {"objective": {"name": name, "options": options, "reference": reference}}


# What each arm changes of the recipe; 'dpo' is IPA as it is.
ARMS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ntp": {"weight": 0.0},
    "random": {"judge": {"name": "random", "options": {}}},
    "shuffled": {},
    "other_user": {},
    "ipo": _objective("ipo", tau=0.1, reduce="sum"),
    "cdpo": _objective("dpo", beta=0.1, label_smoothing=0.1),
    "robust": _objective("robust_dpo", beta=0.1, label_smoothing=0.1),
    "cpo": _objective("cpo", "none", beta=0.1),
    "simpo": _objective("simpo", "none", beta=2.0, gamma=0.5),
    "s_dpo": FEW | _objective("softmax_dpo", beta=0.1),
    "ranked": FEW | _objective("plackett_luce", beta=0.1),
    "grpo": DRAWN | _objective("grpo", "none", clip=0.2),
    "ecpo": DRAWN | _objective("ecpo", "none", clip=0.2, delta=0.1),
    "gbpo": DRAWN | _objective("gbpo", "none"),
    "dpo_drawn": {"source": {"name": "beams", "options": {"num_candidates": 32, "how": "gumbel"}}},
}
CONTROLS = ("ntp", "random", "shuffled", "other_user")
SMALL = {
    "rounds": {"num_rounds": 1, "num_contexts": 32},
    "evaluation.requests": 8,
    "evaluation.alarm_requests": 8,
}
LABELS = {"dpo": "IPA (DPO)", "dpo_drawn": "DPO, drawn candidates", "ntp": "next tokens alone"}
OBJECTIVES = ("dpo", "ipo", "cdpo", "robust", "cpo", "simpo", "s_dpo", "ranked", "grpo", "ecpo", "gbpo")


def words(recipe: str, **options: Any) -> list[str]:
    """A recipe and what is changed of it, as a command line."""
    return ["--config", str(RECIPES / recipe), *flags(options)]


def prepare(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Logs, reward models and the base, where they are not there yet. changes: of each step."""
    logs = str(folder / "logs" / "logs.safetensors")
    if not (folder / "logs" / "report.html").is_file():
        options = {"output": str(folder / "logs")} | dict(changes.get("logs", {}))
        _done(log_sessions.main(words("recsys_logs/movielens_logs.yaml", **options)))
    for name in ("reward", "second_reward"):
        if not (folder / name / "report.html").is_file():
            options = {"logs": logs, "output": str(folder / name)} | dict(changes.get("reward", {}))
            _done(train_session_reward.main(words(f"recsys_reward/movielens_{name}.yaml", **options)))
    if not (folder / "base" / "model" / "model.safetensors").is_file():
        options = {"run.output_dir": str(folder / "base")} | dict(changes.get("base", {}))
        _done(train_recsys.main(words("recsys/movielens_sessions.yaml", **options)))


def train(arm: str, seed: int, folder: Path, changes: Mapping[str, Any]) -> Path:
    """Run one arm to its end, unless it has been; its folder."""
    out = folder / f"{arm}-{seed}"
    if (out / "results.json").is_file():
        return out
    own = {"name": "reward_model", "options": {"model": str(folder / "reward" / "model")}}
    judge: dict[str, Any] = own
    if arm == "shuffled":
        judge = {"name": "shuffled", "options": {"of": own}}
    if arm == "other_user":
        judge = {"name": "reward_model", "options": own["options"] | {"whose": "other"}}  # type: ignore[operator]
    alarm = {"name": "reward_model", "options": {"model": str(folder / "second_reward" / "model")}}
    options: dict[str, Any] = {
        "base": str(folder / "base" / "model"),
        "judge": judge,
        "evaluation.logs": str(folder / "logs" / "logs.safetensors"),
        # Controls optimise no reward, so there is none that could be hacked.
        "evaluation.alarm": None if arm in ("random", "shuffled") else alarm,
        "run.seed": seed,
        "run.output_dir": str(out),
    }
    changed = options | ARMS[arm] | dict(changes)
    code = train_recsys_online.main(words("recsys/online/movielens_ipa.yaml", **changed))
    if code not in (0, train_recsys_online.ALARMED):
        raise SystemExit(code)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out


def _done(code: int) -> None:
    if code:
        raise SystemExit(code)


def run(
    *,
    seeds: int = SEEDS,
    quick: bool = False,
    folder: Path = RUNS,
    arms: Sequence[str] = tuple(ARMS),
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Train every arm with every seed and let the judges speak. changes: of the steps, for small runs."""
    steps, seeds = changes or {}, min(seeds, SEEDS)
    folder = folder.with_name(f"{folder.name}_quick") if quick else folder
    data = str(steps.get("logs", {}).get("data.source", DATA))
    with stopwatch() as seconds:
        prepare(folder, steps)
        more = SMALL if quick else steps.get("arm", {})
        runs = {arm: [train(arm, seed, folder, more) for seed in range(seeds)] for arm in arms}
        return judged(folder, runs, data, seconds)


def judged(
    folder: Path, runs: Mapping[str, Sequence[Path]], data: str, seconds: Callable[[], float]
) -> Outcome:
    """What the judges say of trained arms."""
    out = folder / "verdict"
    options = {
        "logs": str(folder / "logs" / "logs.safetensors"),
        "oracle": str(folder / "logs" / "oracle"),
        "other_oracle": str(folder / "logs" / "other_oracle"),
        "data": {"source": data},
        "runs": {arm: [str(run) for run in folders] for arm, folders in runs.items()},
        "output": str(out),
    } | ({"control": "ntp"} if "ntp" in runs else {})
    _done(judge_recsys.main(flags(options)))
    stored = json.loads((out / "results.json").read_text("utf-8"))
    found = {name: Estimate(**value) for name, value in stored.items()}
    numbers = sorted({len(folders) for folders in runs.values()})
    what = (
        f"ML-100k, sessions of 5 by a lazy decoder; 4 rounds of 2,000 requests, "
        f"{' or '.join(map(str, numbers))} seeds of the alignment from one base; "
        f"{found['oracle: base: gold'].n} requests of users whom nothing was trained on, intervals over users"
    )
    caption = (
        "Gains over the base by the ground truth, which no training asks, of the session that is served and "
        "of sessions drawn from the policy, and by the reward that is optimised. " + FIGURE_NOTE
    )
    return Outcome(
        claims=claims(found, list(runs), what),
        figure=partial(_picture, out / "verdict.png"),
        caption=caption,
        seconds=seconds(),
        size=(11.0, 3.8),
    )


def claims(found: Mapping[str, Estimate], arms: Sequence[str], what: str) -> list[Claim]:
    """What the verdict says, a line a relation."""

    def gain(arm: str, name: str = "gold - base", judge: str = "oracle") -> Estimate:
        return found[f"{judge}: {arm}: {name}"]

    def claim(statement: str, result: str, holds: bool | None, paper: str = PAPER) -> Claim:
        return Claim(
            family="A generative recommender",
            method="Iterative Preference Alignment",
            paper=paper,
            statement=statement,
            result=result,
            holds=holds,
            what=what,
            command=command(NAME),
        )

    over = {a: gain(a, "gold - ntp") for a in arms if f"oracle: {a}: gold - ntp" in found}
    ipa, lines = gain("dpo"), list[Claim]()
    if "dpo" in over:
        lines.append(
            claim(
                "raises the ground truth's reward of the served session over going on with next tokens alone",
                f"{over['dpo']:.3f}; over the base {ipa:.3f}, where a second oracle says "
                f"{gain('dpo', judge='other oracle'):.3f}",
                over["dpo"].low > 0,
            )
        )
    if rivals := {a: gain(a) for a in CONTROLS if a in arms}:
        text = "; ".join(f"{LABELS.get(a, a)} {e:.3f}" for a, e in rivals.items())
        lines.append(
            claim(
                "owes its gain over the base to the reward: it is above that of next tokens alone, random "
                "pairs, shuffled rewards and the reward of another user",
                f"IPA {ipa:.3f}; {text}",
                verdict(*(ipa.low > e.high for e in rivals.values())),
            )
        )
    cheap = {n: gain(n) for n in (judge_recsys.BY_REWARD, judge_recsys.BY_ITEMS, judge_recsys.UPPER)}
    lines.append(
        claim(
            "gains more than choosing one of the base's 16 beams, by the same reward or by items' means",
            f"IPA {ipa:.3f}; " + "; ".join(f"{n} {e:.3f}" for n, e in cheap.items()),
            verdict(*(ipa.low > cheap[n].high for n in (judge_recsys.BY_REWARD, judge_recsys.BY_ITEMS))),
        )
    )
    recall = gain("dpo", "recall - base")
    lines.append(
        claim(
            "does not lower recall@10 of real held-out items", f"{recall:.3f} to the base's", recall.high >= 0
        )
    )
    if len(tried := [a for a in OBJECTIVES if a in over]) > 1:
        ranked = sorted(tried, key=lambda a: -gain(a).mean)
        text = "; ".join(f"{LABELS.get(a, a)} {gain(a):.3f} at KL {gain(a, 'kl').mean:.2f}" for a in ranked)
        lines.append(
            claim(
                f"is one of {len(tried)} objectives on the same rounds, none of them tuned: each gains over "
                "next tokens alone",
                f"over the base: {text}",
                verdict(*(over[a].low > 0 for a in tried)),
            )
        )
    if "dpo_drawn" in over and "dpo" in over:
        drawn = gain("dpo_drawn")
        lines.append(
            claim(
                "learns more from candidates drawn without replacement than from beams, near copies",
                f"drawn {drawn:.3f} at KL {gain('dpo_drawn', 'kl').mean:.2f}; beams {ipa:.3f} at KL "
                f"{gain('dpo', 'kl').mean:.2f}",
                drawn.low > ipa.high,
                "Kool et al. 2019, arXiv 1903.06059",
            )
        )
    return lines


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line."""
    return [w for n, v in options.items() for w in (f"--{n}", v if isinstance(v, str) else json.dumps(v))]


def _picture(path: Path, figure: Figure) -> None:
    """The judges' figure as it is."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(matplotlib.image.imread(path))
    axes.axis("off")


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=NAME, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try that it works")
    parser.add_argument("--save", action="store_true", help=f"store the results in {ASSETS}")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    outcome = run(seeds=options.seeds, quick=options.quick, arms=options.arms)
    report(outcome)
    if options.save:
        save(NAME, outcome, ASSETS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
