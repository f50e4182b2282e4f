"""Self-improvement at inference: y <- policy(x, y), a few times, and what a judge says of every step.

    python scripts/improve.py --config runs/pit/config.yaml --adapter runs/pit/model --num_steps 3
    python scripts/improve.py --config runs/pit/config.yaml --adapter runs/pit/model --prompts mine.jsonl

The policy answers a prompt, is shown its answer and the request of the recipe's `turns` source, answers
again, and so on; every step sees the latest answer alone (PIT, Wang et al. 2023, arXiv 2310.00898). Prints a
table and writes it with all answers to <run.output_dir>/samples/improve.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from triptych.modalities.llm.model import load_trained
from triptych.modalities.llm.online import OnlineConfig, OnlineRun, set_up_online, stages_of
from triptych.modalities.llm.online_outcome import MAIN, HeldOut, write_json
from triptych.modalities.llm.prompt_data import PromptData
from triptych.modalities.llm.sampling import Drawing, Drawn
from triptych.modalities.llm.sampling_groups import draw_for, drawn_group
from triptych.modalities.llm.sampling_turns import Turns, request_ids
from triptych.modalities.llm.turn_judges import PerTurn, TurnGap
from triptych.scripts.common import cache_dir, errors_in_one_line, parse, quiet_libraries
from triptych.training.groups import Group, scores_of
from triptych.training.judges import Gap
from triptych.training.judging import judged
from triptych.training.order import key
from triptych.training.quarantine import Quarantine
from triptych.training.stages import Judge, Live, Stage
from triptych.training.stats import Estimate, paired_difference

HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Config(OnlineConfig):
    """An online run's configuration, the folder that it exported, and how to improve.

    prompts: 'held_out', the run's own, or a file of prompts. first: who gives the first answer. follow_up:
    the request, where the recipe has no source `turns` or another one is wanted. Answers are drawn as
    evaluation.max_new_tokens and evaluation.temperature say.
    """

    adapter: str
    num_steps: int = 3
    prompts: str = HELD_OUT
    num_prompts: int = 100
    first: Literal["policy", "base"] = "policy"
    follow_up: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one judge says of the answers of one step.

    improved, worsened: shares of answers with a higher or lower score than those that they were made of;
    None at the first step. gain: over the first answers.
    """

    step: int
    judge: str
    score: Estimate
    improved: float | None = None
    worsened: float | None = None
    gain: Estimate | None = None


def request_of(config: Config, stages: Sequence[Stage], tokenizer: Any) -> np.ndarray:
    """Tokens between an answer and the next one, [N], as the recipe's `turns` source renders them."""
    turns = [s.main.source for s in stages if isinstance(s.main.source, Turns)]
    follow_up = config.follow_up if config.follow_up is not None else turns[-1].follow_up if turns else None
    if not follow_up:
        raise ValueError("follow_up is not given, and the recipe has no source 'turns' to take it from")
    return request_ids(follow_up, tokenizer, chat=turns[-1].chat if turns else "auto")


def next_prompt(prompt: np.ndarray, answer: np.ndarray, request: np.ndarray) -> np.ndarray:
    """Prompt, answer and request; the request brings the end of the answer where both have it."""
    repeated = len(request) > 1 and answer[-1] == request[0]
    return np.concatenate([prompt, answer, request[int(repeated) :]])


@torch.no_grad()
def improved(held_out: HeldOut, config: Config, request: np.ndarray) -> list[list[Group]]:
    """Answers of every step, [num_steps + 1][prompts] groups of one candidate."""
    run, settings, live = held_out.run, held_out.config.evaluation, held_out.live()
    drawing = Drawing(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
    )
    prompts, tokenizer = held_out.prompts, run.tokenizer
    asked, steps = [p.ids for p in prompts], list[list[Group]]()
    for step in range(config.num_steps + 1):
        seeds = [key("improve", config.run.seed, step, p.key) for p in prompts]
        how: dict[str, Any] = {"drawing": drawing, "num_candidates": 1, "seeds": seeds}
        drawn: list[list[Drawn]]
        if step == 0 and config.first == "base":
            with run.rounds.frozen.active(run.policy) as base:
                drawn = draw_for(asked, base, live, **how)
        else:
            drawn = draw_for(asked, run.policy, live, **how)
        asked = [next_prompt(p.ids, d[0].ids, request) for p, d in zip(prompts, drawn, strict=True)]
        keep = {"origin": "policy", "with_logp": True, "with_proposal": False}
        steps.append([drawn_group(p, d, tokenizer, **keep) for p, d in zip(prompts, drawn, strict=True)])
    return steps


def judges_of(held_out: HeldOut, stages: Sequence[Stage]) -> dict[str, Judge]:
    """Judges of single answers: the recipe's own, of turns or gaps the one below, and the held-out ones."""
    judges = {name: judge for name, judge in held_out.judges.items() if name != MAIN}
    main = stages[-1].main.judge
    while isinstance(main, PerTurn | TurnGap | Gap):
        main = main.of
    if main is not None and "score" in main.gives and not main.needs:
        judges = {MAIN: main} | judges
    if not judges:
        raise ValueError("no judge scores single answers: name some in evaluation.further_judges")
    return judges


def table_of(
    steps: Sequence[Sequence[Group]], judges: dict[str, Judge], held_out: HeldOut, live: Live
) -> tuple[list[Step], dict[str, list[list[float]]]]:
    """A line for every judge and step, and all scores, judge -> [steps][prompts]."""
    lines: list[Step] = []
    table: dict[str, list[list[float]]] = {}
    for name, judge in judges.items():
        scores: list[Tensor] = [
            torch.cat([scores_of(g) for g in judged(judge, groups, live)]) for groups in steps
        ]
        table[name] = [s.tolist() for s in scores]
        for i, score in enumerate(scores):
            line = Step(step=i, judge=name, score=held_out.estimate(table[name][i]))
            if i:
                better, worse = (score > scores[i - 1]).float(), (score < scores[i - 1]).float()
                gain = paired_difference(scores[0], score, seed=0, clusters=held_out.clusters)
                line = replace(line, improved=float(better.mean()), worsened=float(worse.mean()), gain=gain)
            lines.append(line)
    return lines, table


def from_file(run: OnlineRun) -> OnlineRun:
    """The run with all its prompts held out."""
    prompts = run.data.train
    texts = tuple(p.text for p in prompts)
    data = PromptData(train=(), held_out=prompts, clusters=texts, fingerprint=run.data.fingerprint)
    return replace(run, data=data)


def run(config: Config) -> int:
    """Improve, judge and print; returns the exit code."""
    accelerator = Accelerator(mixed_precision="bf16" if config.optim.precision == "bf16" else "no")
    stages, evaluation = stages_of(config), replace(config.evaluation, num_prompts=config.num_prompts)
    own = config.prompts == HELD_OUT
    data = config.data if own else replace(config.data, source=config.prompts, eval_fraction=0.0)
    asked = replace(config, data=data, evaluation=evaluation if own else replace(evaluation, num_prompts=0))
    online = set_up_online(
        asked,
        stages,
        device=accelerator.device,
        cache_dir=cache_dir(),
        quarantine=Quarantine(),
        report=lambda line: print(line, file=sys.stderr),
    )
    load_trained(online.policy.model, Path(config.adapter))
    asked = replace(asked, evaluation=evaluation)
    held_out = HeldOut(online if own else from_file(online), asked, device=accelerator.device)
    judges, request = judges_of(held_out, stages), request_of(config, stages, online.tokenizer)
    steps = improved(held_out, config, request)
    lines, scores = table_of(steps, judges, held_out, held_out.live())
    for line in lines:
        print(f"step {line.step}  {line.judge} {line.score:.3f}", end="" if line.step else "\n")
        if line.step:
            print(f"  improved {line.improved:.2f}, worsened {line.worsened:.2f}, gain {line.gain:.3f}")
    texts = [[g.candidates[0].text for g in groups] for groups in steps]
    found = {"prompts": [p.text for p in held_out.prompts], "answers": texts, "scores": scores}
    path = Path(config.run.output_dir) / "samples" / "improve.json"
    write_json(path, {"steps": [asdict(line) for line in lines], **found})
    print(f"{len(held_out.prompts)} prompts; written to {path}", file=sys.stderr)
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="improve", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
