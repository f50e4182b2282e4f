"""What an online run shows: held-out answers before and after, their judged reward, the KL that it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.modalities.llm.model import export
from triptych.modalities.llm.online import OnlineConfig, OnlineRun
from triptych.modalities.llm.plugs import JUDGES
from triptych.modalities.llm.sampling import Drawing
from triptych.modalities.llm.sampling_groups import completion_group, draw_for, drawn_group
from triptych.modalities.llm.turn_judges import PerTurn, TurnGap
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.groups import Group
from triptych.training.judging import build_judge
from triptych.training.order import key, longest_first
from triptych.training.quarantine import Quarantine
from triptych.training.references import unchanged
from triptych.training.report import SamplePair, Table, write_report
from triptych.training.round_state import named_slots
from triptych.training.stages import Judge, Live
from triptych.training.stats import Estimate, bootstrap_interval, paired_difference

MAIN = "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers to the held-out prompts by one model.

    scores: judge -> one number a prompt. kl: log policy - log base of each answer, an estimate of
    KL(policy || base) by its mean where the answers are the policy's own samples.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    scores: dict[str, list[float]]
    kl: list[float]
    lengths: list[float]


class HeldOut:
    """Answers held-out prompts and judges them; the judges are built once."""

    def __init__(self, run: OnlineRun, config: OnlineConfig, *, device: torch.device):
        self.run, self.config, self.device = run, config, device
        settings = config.evaluation
        order = sorted(range(len(run.data.held_out)), key=lambda i: run.data.held_out[i].key)
        chosen = sorted(order[: settings.num_prompts])
        self.prompts = [run.data.held_out[i] for i in chosen]
        self.clusters = [run.data.clusters[i] for i in chosen]
        main = run.rounds.stages[-1].main.judge
        # Of answers in turns, each is judged by itself; here there is one.
        main = main.of if isinstance(main, PerTurn | TurnGap) else main
        self.judges: dict[str, Judge] = {}
        if main is not None and "score" in main.gives and not main.needs and named_slots(main) <= {"frozen"}:
            self.judges[MAIN] = main
        for name, plug in settings.further_judges.items():
            judge = build_judge(plug, JUDGES)
            if "score" not in judge.gives or judge.needs:
                raise ValueError(f"evaluation.further_judges.{name} must score single answers by themselves")
            self.judges[name] = judge

    def live(self) -> Live:
        """A round of its own for judges and draws, which leaves no memory behind."""
        return Live(
            policy=self.run.policy,
            port=self.run.rounds.port,
            references={"frozen": self.run.rounds.frozen},
            device=self.device,
            seed=key("held out", self.config.run.seed),
        )

    @torch.no_grad()
    def answers(self, *, base: bool = False, best_of: int = 1) -> Answers:
        """The policy's answers, or the base model's; the best of several by the main judge, if so asked."""
        live = self.live()
        with unchanged(self.run.policy):
            groups = self._groups(live, base=base, num_candidates=best_of)
            if best_of > 1:
                groups = [_best(g, s) for g, s in zip(groups, self._scores(MAIN, groups, live), strict=True)]
            scores = {name: [float(s[0]) for s in self._scores(name, groups, live)] for name in self.judges}
            kl = [0.0] * len(groups) if base else self._log_ratios(groups, live)
        return Answers(
            prompts=tuple(p.text for p in self.prompts),
            texts=tuple(g.candidates[0].text for g in groups),
            scores=scores,
            kl=kl,
            lengths=[float(g.count[0]) for g in groups],
        )

    def metrics(self, policy: Any) -> dict[str, float]:
        """Held-out means for the log, under the names that rounds have."""
        found = self.answers()
        values = {f"held_out/{name}": _mean(s) for name, s in found.scores.items() if name != MAIN}
        if MAIN in found.scores:
            estimate = self.estimate(found.scores[MAIN])
            values |= {
                "reward": estimate.mean,
                "reward_low": estimate.low,
                "reward_high": estimate.high,
            }
        return values | {"kl": _mean(found.kl), "length": _mean(found.lengths)}

    def estimate(self, values: Sequence[float]) -> Estimate:
        """Mean with its 95 % interval over clusters of prompts."""
        return bootstrap_interval(torch.tensor(values), seed=0, clusters=self.clusters)

    def _groups(self, live: Live, *, base: bool, num_candidates: int) -> list[Group]:
        settings, policy = self.config.evaluation, self.run.policy
        greedy = settings.temperature == 0
        drawing = Drawing(
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0 if greedy and num_candidates == 1 else settings.temperature or 1.0,
            batch_size=settings.batch_size,
        )
        ids = [p.ids for p in self.prompts]
        # The same seed for base and policy: what differs between their answers is the weights.
        seeds = [key("answer", self.config.run.seed, p.key) for p in self.prompts]
        options = {"drawing": drawing, "num_candidates": num_candidates, "seeds": seeds}
        if base:
            with self.run.rounds.frozen.active(policy) as reference:
                drawn = draw_for(ids, reference, live, **options)
        else:
            drawn = draw_for(ids, policy, live, **options)
        keep = {"origin": "policy", "with_logp": True, "with_proposal": False}
        tokenizer = self.run.tokenizer
        return [drawn_group(p, d, tokenizer, **keep) for p, d in zip(self.prompts, drawn, strict=True)]

    def _scores(self, name: str, groups: Sequence[Group], live: Live) -> list[Tensor]:
        found: list[Tensor] = []
        for verdict in self.judges[name](groups, live):
            assert verdict.score is not None
            found.append(verdict.score)
        return found

    def _log_ratios(self, groups: Sequence[Group], live: Live) -> list[float]:
        """log policy - log base of each answer, at the policy's own temperature."""
        port, out = self.run.rounds.port, [0.0] * len(groups)
        order = longest_first([port.length(g.context, g.candidates) for g in groups])
        size = self.config.optim.micro_batch_size
        for start in range(0, len(order), size):
            cut = order[start : start + size]
            batch = port.collate([(groups[i].context, groups[i].candidates) for i in cut], [0] * len(cut))
            batch = batch.to(self.device)
            terms = port.terms(self.run.policy, batch) - self.run.rounds.frozen(port, self.run.policy, batch)
            for i, value in zip(cut, terms.sum(-1).tolist(), strict=True):
                out[i] = value
        return out


def _best(group: Group, score: Tensor) -> Group:
    """The group with its best candidate alone."""
    best = int(score.argmax())
    return completion_group(group.context, [group.candidates[best]], origin="policy")


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values).mean())


def results_table(
    held_out: HeldOut, base: Answers, best: Answers | None, aligned: Answers
) -> tuple[Table, dict[str, Estimate]]:
    """Every judge's mean for the base, its best of n and the policy, with intervals, and gains by name."""
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}

    def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
        return paired_difference(
            torch.tensor(before), torch.tensor(after), seed=0, clusters=held_out.clusters
        )

    for name in aligned.scores:
        difference = gain(base.scores[name], aligned.scores[name])
        results[f"{name}, aligned - base"] = difference
        results[f"{name}, aligned"] = held_out.estimate(aligned.scores[name])
        chosen = None
        if best is not None:
            chosen = held_out.estimate(best.scores[name])
            results[f"{name}, best of {held_out.config.evaluation.best_of}"] = chosen
        first = held_out.estimate(base.scores[name])
        lines.append([name, first, chosen, results[f"{name}, aligned"], difference])
    lines.append(
        [
            "tokens",
            held_out.estimate(base.lengths),
            None if best is None else held_out.estimate(best.lengths),
            held_out.estimate(aligned.lengths),
            gain(base.lengths, aligned.lengths),
        ]
    )
    results["KL to the base"] = held_out.estimate(aligned.kl)
    lines.append(["KL to the base, nats", 0.0, None, results["KL to the base"], None])
    n = held_out.config.evaluation.best_of
    note = (
        f"{len(aligned.texts)} held-out prompts, the same for all, one answer each; 95 % bootstrap intervals "
        f"over prompts that belong together. Best of {n}: the base's best of {n} answers by the judge that "
        "trains ('reward'), which needs no training. The KL is estimated from the policy's own answers."
    )
    columns = ["measure", "base", f"best of {n} of the base", "aligned", "aligned - base"]
    return Table("Held-out prompts", columns, lines, note), results


def base_answers(
    held_out: HeldOut, folder: Path, *, identity: str, report: Callable[[str], None]
) -> tuple[Answers, Answers | None]:
    """The base model's answers and its best of n, kept in samples/base.json across restarts."""
    path = folder / "samples" / "base.json"
    if path.is_file():
        saved = json.loads(path.read_text("utf-8"))
        if saved["identity"] == identity:
            best = None if saved["best"] is None else _answers(saved["best"])
            return _answers(saved["base"]), best
    report(f"the base model answers {len(held_out.prompts)} held-out prompts")
    base = held_out.answers(base=True)
    n = held_out.config.evaluation.best_of
    best = held_out.answers(base=True, best_of=n) if n > 1 and MAIN in held_out.judges else None
    write_json(
        path,
        {"identity": identity, "base": asdict(base), "best": None if best is None else asdict(best)},
    )
    return base, best


def _answers(saved: Mapping[str, Any]) -> Answers:
    return Answers(**{**saved, "prompts": tuple(saved["prompts"]), "texts": tuple(saved["texts"])})


def finish_online(
    held_out: HeldOut | None,
    run: OnlineRun,
    config: OnlineConfig,
    *,
    base: tuple[Answers, Answers | None] | None,
    average: Mapping[str, Tensor],
    quarantine: Quarantine,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
) -> None:
    """Judge the aligned model, export it with its card (and the average policy), and write report.html."""
    folder = Path(config.run.output_dir)
    tables: list[Table] = []
    results: dict[str, Estimate] = {}
    pairs: list[SamplePair] = []
    if held_out is not None and base is not None:
        report("the aligned model answers the same prompts")
        aligned = held_out.answers()
        write_json(folder / "samples" / "aligned.json", asdict(aligned))
        table, results = results_table(held_out, *base, aligned)
        tables, pairs = [table], _pairs(base[0], aligned)
    export(run.policy.model, run.tokenizer, folder / "model")
    if average:
        _export_average(run, average, folder / "average_model")
    numbers = {name: f"{value:.3f}" for name, value in results.items()}
    objective = run.rounds.stages[-1].main.terms.main.objective.spec.name
    write_card(
        folder / "model",
        base_model=config.model.name_or_path,
        library_name="peft" if config.model.lora else "transformers",
        tags=["preference-alignment", "online", objective],
        datasets=[config.data.source],
        license=None,
        metrics=numbers,
        command=command,
        versions=versions,
        config=settings,
    )
    write_json(folder / "results.json", {n: asdict(e) for n, e in results.items()})
    headlines = [f"{MAIN}, aligned - base", f"{MAIN}, aligned", "KL to the base"]
    path = write_report(
        folder,
        title=f"online {objective} on {config.data.source}",
        summary=[(name, numbers[name]) for name in headlines if name in numbers],
        tables=tables,
        samples=pairs,
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:.3f}")
    report(f"report: {path}")


def _pairs(base: Answers, aligned: Answers) -> list[SamplePair]:
    found: list[SamplePair] = []
    for i, prompt in enumerate(base.prompts[:40]):
        scores = {name: (base.scores[name][i], aligned.scores[name][i]) for name in aligned.scores}
        found.append(SamplePair(prompt, base.texts[i], aligned.texts[i], scores=scores))
    return found


@torch.no_grad()
def _export_average(run: OnlineRun, average: Mapping[str, Tensor], folder: Path) -> None:
    """The mean of the policies at the rounds' ends, as a model of its own."""
    named = dict(run.policy.named_parameters())
    now = {name: named[name].detach().clone() for name in average}
    for name, value in average.items():
        named[name].copy_(value)
    export(run.policy.model, run.tokenizer, folder)
    for name, value in now.items():
        named[name].copy_(value)
