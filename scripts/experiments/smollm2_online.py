"""Online DPO, GRPO and RLOO on a real language model with a reward that is checked exactly.

    python -m triptych.scripts.experiments.smollm2_online --save
    python -m triptych.scripts.experiments.smollm2_online --methods rloo     # one of them alone

SmolLM2-135M-Instruct answers the built-in requests; the recipe is `recipes/llm/online/online_dpo.yaml`, of
which only the objective line changes. Every method runs by itself, goes on where it was interrupted, and is
not run again once its results are there: runs/evidence/smollm2_online/<method>.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from triptych.scripts import train_llm_online
from triptych.scripts.experiments.common import (
    ASSETS,
    COLOURS,
    DASHES,
    MARKERS,
    MUTED,
    ROOT,
    Claim,
    Outcome,
    command,
    report,
    save,
    stopwatch,
)
from triptych.training.logs import read_metrics
from triptych.training.stats import Estimate

NAME = "smollm2_online"
RECIPE = ROOT / "scripts" / "recipes" / "llm" / "online" / "online_dpo.yaml"
RUNS = ROOT / "runs" / "evidence" / NAME
KL = {"name": "kl", "weight": 0.05, "options": {"estimator": "k2"}}
# The objective lines; everything else is the recipe's.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "options": {"beta": 0.1}},
    "grpo": {"name": "grpo", "options": {"clip": 0.2}, "regularizers": [KL]},
    "rloo": {"name": "rloo", "options": {"clip": 0.2}, "regularizers": [KL]},
    # The same with a KL term 20 times as heavy: what is gained near the untrained model.
    "grpo_near": {"name": "grpo", "options": {"clip": 0.2}, "regularizers": [KL | {"weight": 1.0}]},
}
LABELS = {"dpo": "online DPO", "grpo": "GRPO", "rloo": "RLOO", "grpo_near": "GRPO, KL x 20"}
PAPERS = {
    "dpo": "Guo et al. 2024, arXiv 2402.04792",
    "grpo": "Shao et al. 2024, arXiv 2402.03300",
    "rloo": "Ahmadian et al. 2024, arXiv 2402.14740",
    "grpo_near": "Shao et al. 2024, arXiv 2402.03300",
}
# Small enough for a bounded policy: with it, a policy that had drifted to other text would be told apart.
KL_BOUND = 20.0
MINUTES = 20.0
SMALL = {
    "rounds": {"num_rounds": 2, "num_contexts": 4},
    "evaluation": {"num_prompts": 4, "max_new_tokens": 4, "best_of": 2},
    "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch_size": 4},
}


def train(method: str, folder: Path, changes: dict[str, Any]) -> None:
    """Run one method to its end, unless it has been; keeps the processor's time over interruptions."""
    if (folder / "results.json").is_file():
        return
    recipe = yaml.safe_load(RECIPE.read_text("utf-8")) | {"objective": OBJECTIVES[method]}
    for name, value in changes.items():
        recipe[name] = recipe[name] | value if isinstance(recipe.get(name), dict) else value
    recipe["run"] = recipe["run"] | {"output_dir": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    config, clock = folder / "recipe.yaml", folder / "cpu_seconds.json"
    config.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    before = json.loads(clock.read_text("utf-8")) if clock.is_file() else 0.0
    start = time.process_time()
    code = train_llm_online.main(["--config", str(config)])
    clock.write_text(json.dumps(before + time.process_time() - start) + "\n", "utf-8")
    if code:
        raise SystemExit(code)


def found(method: str, folder: Path) -> dict[str, Any]:
    """Results, curve and cost of one method."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    events = [e for e in read_metrics(folder / "metrics.jsonl") if "reward" in e]
    base = json.loads((folder / "samples" / "base.json").read_text("utf-8"))
    return {
        "method": method,
        "results": {name: Estimate(**value) for name, value in results.items()},
        "train": [(e["step"], e["reward"]) for e in events if e["split"] == "train"],
        "eval": [(e["step"], e["reward"], e["kl"]) for e in events if e["split"] == "eval"],
        "base": float(torch.tensor(base["base"]["scores"]["reward"]).mean()),
        "minutes": json.loads((folder / "cpu_seconds.json").read_text("utf-8")) / 60,
    }


def run(
    *, seeds: int = 1, quick: bool = False, methods: Sequence[str] = tuple(OBJECTIVES), **changes: Any
) -> Outcome:
    """Train every method, one seed each, and compare it with the untrained model and its best of n."""
    del seeds
    with stopwatch() as seconds:
        folder = RUNS if not quick else RUNS.with_name(f"{NAME}_quick")
        for method in methods:
            train(method, folder / method, (SMALL if quick else {}) | changes)
        rows = [found(m, folder / m) for m in methods]
        claims = [_claim(row) for row in rows]
        caption = (
            "Left: mean reward of each round's samples while training. Right: held-out prompts, on topics "
            "that training never mentions: the untrained model, its best of n, each method; 95 % intervals. "
            "The reward asks for form and mood alone, and that is what it gets: far from the untrained model "
            "answers are short and cheerful, and many of them mean nothing."
        )
        draw: Callable[[Figure], None] = partial(_draw, rows)
        return Outcome(claims=claims, figure=draw, caption=caption, seconds=seconds(), size=(10.0, 3.8))


def best_of(row: dict[str, Any]) -> tuple[str, Estimate]:
    """Name and reward of the base model's best of n."""
    return next((n.partition(", ")[2], e) for n, e in row["results"].items() if n.startswith("reward, best"))


def _claim(row: dict[str, Any]) -> Claim:
    results, method = row["results"], row["method"]
    gain, aligned, kl = (results[n] for n in ("reward, aligned - base", "reward, aligned", "KL to the base"))
    name, best = best_of(row)
    holds = gain.low > 0 and kl.high < KL_BOUND and row["minutes"] <= MINUTES
    return Claim(
        family="A real language model",
        method=LABELS[method],
        paper=PAPERS[method],
        statement=(
            "raises an exactly checked reward on held-out prompts over the untrained model, with the KL to "
            f"it below {KL_BOUND:g} nats an answer, within {MINUTES:g} processor minutes"
        ),
        result=(
            f"reward {row['base']:.3f} -> {aligned:.3f}, gain {gain:.3f}; {name} of the untrained model "
            f"{best:.3f}; KL {kl:.2f} nats; {row['minutes']:.1f} processor minutes"
        ),
        holds=holds,
        what=(
            f"SmolLM2-135M-Instruct, LoRA, {len(row['train'])} rounds of 16 prompts and 4 samples, 1 seed; "
            f"{gain.n} held-out topics, reward: 4 to 12 words, and half of VADER's sentiment"
        ),
        command=f"{command(NAME)} --methods {method}",
    )


def _draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        steps, rewards = zip(*row["train"], strict=True)
        mean = [
            sum(rewards[max(0, k - 2) : k + 3]) / len(rewards[max(0, k - 2) : k + 3])
            for k in range(len(rewards))
        ]
        left.plot(steps, rewards, color=COLOURS[i], alpha=0.25, linewidth=1)
        left.plot(steps, mean, color=COLOURS[i], linestyle=DASHES[i], label=LABELS[row["method"]])
    left.set_title("Samples while training")
    left.set_xlabel("optimizer step")
    left.set_ylabel("mean reward")
    left.legend()
    base = torch.tensor([row["base"] for row in rows]).mean().item()
    name, best = best_of(rows[0])
    right.axhline(base, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    right.text(-0.45, base, "untrained", color=MUTED, va="bottom", fontsize=9)
    right.axhspan(best.low, best.high, color=MUTED, alpha=0.15, linewidth=0)
    right.axhline(best.mean, color=MUTED, linewidth=1.2)
    right.text(-0.45, best.mean, f"{name}, untrained", color=MUTED, va="bottom", fontsize=9)
    for i, row in enumerate(rows):
        e = row["results"]["reward, aligned"]
        right.errorbar(
            [i],
            [e.mean],
            yerr=[[e.mean - e.low], [e.high - e.mean]],
            fmt=MARKERS[i],
            color=COLOURS[i],
            capsize=4,
        )
    right.set_xticks(range(len(rows)), [LABELS[row["method"]] for row in rows])
    right.set_xlim(-0.5, len(rows) - 0.4)
    right.set_title("Held-out prompts")
    right.set_ylabel("mean reward")
    right.grid(visible=False, axis="x")


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=NAME, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try that it works")
    parser.add_argument("--save", nargs="?", type=Path, const=ASSETS, help="store results and figure here")
    options = parser.parse_args(args)
    if options.save is not None and len(options.methods) < len(OBJECTIVES):
        parser.error("--save stores all methods together: leave --methods out")
    torch.set_num_threads(1)
    outcome = run(quick=options.quick, methods=options.methods)
    print(report(outcome))
    if options.save is not None:
        print(f"stored in {save(NAME, outcome, options.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
