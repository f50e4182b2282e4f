"""What a text run leaves behind: samples before and after, held-out results, exported model and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from triptych.modalities.llm.model import export
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.records import Record
from triptych.modalities.llm.rewards import Measure, sentiment_classifier, vader
from triptych.modalities.llm.rollout import Sampling, generate
from triptych.modalities.llm.setup import SampleConfig, TextConfig, TextRun
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.evaluation import estimate, evaluate
from triptych.training.logs import Progress
from triptych.training.loop import Learner
from triptych.training.quarantine import Quarantine
from triptych.training.references import unwrapped
from triptych.training.report import SamplePair, Table, write_report
from triptych.training.sharding import is_sharded, outside_root, whole_state
from triptych.training.stats import Estimate, paired_difference

MODES = ("greedy", "sampled")


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one model: prompts as shown, the cluster of each, and mode -> completions."""

    prompts: tuple[str, ...]
    clusters: tuple[str, ...]
    completions: dict[str, list[str]]


def sample_base(
    text: TextRun,
    config: TextConfig,
    folder: Path,
    *,
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> Samples | None:
    """Completions of the model as it is before training, kept in samples/base.json across restarts."""
    if not config.sample.num_prompts or text.data.held_out is None:
        return None
    path = folder / "samples" / "base.json"
    wanted = _identity(text, config)
    if path.is_file():
        saved = json.loads(path.read_text("utf-8"))
        if saved.pop("identity") == wanted:
            return Samples(tuple(saved["prompts"]), tuple(saved["clusters"]), saved["completions"])
    report(f"sampling the base model on {config.sample.num_prompts} held-out prompts")
    samples = _sample(text, config, bar)
    write_json(path, {"identity": wanted} | asdict(samples))
    return samples


def finish(
    text: TextRun,
    learner: Learner,
    config: TextConfig,
    accelerator: Accelerator,
    *,
    quarantine: Quarantine,
    base_samples: Samples | None,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> None:
    """Evaluate, sample, export the model with its card, and write report.html. Every rank calls it."""
    folder = Path(config.run.output_dir)
    rows = None
    if text.eval_task is not None:
        size = config.evaluation.micro_batch_size
        rows = evaluate(
            text.eval_task, learner.policy, accelerator, micro_batch_size=size, seed=config.run.seed
        )
    policy = unwrapped(learner.policy)
    assert isinstance(policy, TokenPolicy)
    aligned = None
    # A sharded model can only be sampled and gathered by all ranks together.
    takes_part = accelerator.is_main_process or is_sharded(policy)
    if takes_part and text.data.held_out is not None and config.sample.num_prompts:
        report("sampling the aligned model on the same prompts")
        with outside_root(policy):
            aligned = _sample(text, config, bar)
    state = whole_state(policy.model)
    if not accelerator.is_main_process:
        return
    referenced = text.task.terms.main.slot != "none"
    held_out = held_out_table(rows, text.data.eval_clusters, referenced=referenced) if rows else None
    judged: list[Table] = []
    pairs: list[SamplePair] = []
    results: dict[str, Estimate] = held_out[1] if held_out else {}
    if base_samples is not None and aligned is not None:
        write_json(folder / "samples" / "aligned.json", asdict(aligned))
        measures = _measures(text, config.sample, report)
        table, found, pairs = _judge(base_samples, aligned, measures, config.run.seed)
        judged, results = ([table] if table else []), results | found
    export(policy.model, text.tokenizer, folder / "model", state=state)
    numbers = {name: f"{value:.3f}" for name, value in results.items()}
    write_card(
        folder / "model",
        base_model=config.model.name_or_path,
        library_name="peft" if config.model.lora else "transformers",
        tags=["preference-alignment", config.objective.name],
        datasets=[config.data.source],
        license=None,
        metrics=numbers,
        command=command,
        versions=versions,
        config=settings,
    )
    write_json(folder / "results.json", {n: asdict(e) for n, e in results.items()})
    path = write_report(
        folder,
        title=f"{config.objective.name} on {config.data.source}",
        summary=[(label, numbers[name]) for name, label in HEADLINES.items() if name in numbers],
        tables=[*([held_out[0]] if held_out else []), *judged],
        samples=pairs,
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:.3f}")
    report(f"report: {path}")


HEADLINES = {
    "reward accuracy": "Held-out reward accuracy",
    "ranking accuracy, aligned - base": "Ranking accuracy over the base",
    "sentiment sampled, aligned - base": "Sentiment of samples over the base",
    "vader sampled, aligned - base": "VADER of samples over the base",
}
_HELD_OUT = {
    "ranking accuracy": ("ranking/reference", "ranking/accuracy"),
    "ranking accuracy per token": ("ranking/reference_per_term", "ranking/accuracy_per_term"),
}


def held_out_table(
    rows: Mapping[str, Tensor], clusters: Sequence[str], *, referenced: bool = True
) -> tuple[Table, dict[str, Estimate]]:
    """Held-out results of base and aligned model, 95 % intervals over clusters, as a table and by name.

    referenced: whether rewards are relative to the base; those of reference-free objectives are not, and
    the base's own are not known from `rows`.
    """
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    if "rewards/accuracies" in rows:
        results["reward accuracy"] = estimate(rows["rewards/accuracies"], clusters=clusters)
        ties = 0.5 if referenced else None
        lines.append(["reward accuracy", ties, results["reward accuracy"], None])
    for name, (before, after) in _HELD_OUT.items():
        if before not in rows or after not in rows:
            continue
        gain = paired_difference(rows[before], rows[after], seed=0, clusters=clusters)
        results[f"{name}, aligned - base"] = gain
        base, aligned = (estimate(rows[key], clusters=clusters) for key in (before, after))
        lines.append([name, base, aligned, gain])
    for name in ("rewards/margins", "loss"):
        if name in rows:
            lines.append([name, None, estimate(rows[name], clusters=clusters), None])
    note = (
        f"{len(next(iter(rows.values())))} held-out samples; 95 % bootstrap intervals over items or prompts. "
        "Reward accuracy: share of pairs whose chosen candidate has the higher implicit reward"
        f"{' (the base is its own reference, so all its rewards are ties)' if referenced else ''}. "
        "Ranking accuracy compares log-probabilities. Ties count one half."
    )
    return Table("Held-out data", ["measure", "base", "aligned", "difference"], lines, note), results


def _judge(
    base: Samples, aligned: Samples, measures: Mapping[str, Measure], seed: int
) -> tuple[Table | None, dict[str, Estimate], list[SamplePair]]:
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    scores: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    clusters = base.clusters
    for mode in MODES:
        before, after = base.completions[mode], aligned.completions[mode]
        for name, measure in measures.items():
            first, second = measure(before), measure(after)
            scores[mode, name] = (first, second)
            gain = paired_difference(first, second, seed=seed, clusters=clusters)
            results[f"{name} {mode}, aligned - base"] = gain
            a, b = (estimate(torch.tensor(v), clusters=clusters) for v in (first, second))
            lines.append([f"{name}, {mode}", a, b, gain])
        words = [[float(len(t.split())) for t in texts] for texts in (before, after)]
        a, b = (estimate(torch.tensor(v), clusters=clusters) for v in words)
        gain = paired_difference(*words, seed=seed, clusters=clusters)
        lines.append([f"words, {mode}", a, b, gain])
    note = (
        f"{len(base.prompts)} held-out prompts, the same for both; sampled: temperature as configured. "
        "'sentiment' is a classifier fitted on other items' texts, VADER a human-rated lexicon; "
        "neither took part in training."
    )
    table = Table("Generated text", ["measure", "base", "aligned", "difference"], lines, note)
    pairs = []
    for i, prompt in enumerate(base.prompts):
        for mode in MODES:
            shown = {n: (v[0][i], v[1][i]) for (m, n), v in scores.items() if m == mode}
            texts = (base.completions[mode][i], aligned.completions[mode][i])
            pairs.append(SamplePair(f"[{mode}] {prompt}", *texts, scores=shown))
    return table, results, pairs[:40]


def _measures(text: TextRun, config: SampleConfig, report: Callable[[str], None]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    if "sentiment" in config.judges:
        found["sentiment"], auc = sentiment_classifier(text.data.judge_texts, text.data.judge_labels)
        report(f"judge: sentiment classifier fitted on other items' reviews, AUC {auc:.3f} on unseen ones")
    if "vader" in config.judges:
        found["vader"] = vader()
    return found


def _sample(text: TextRun, config: TextConfig, bar: Callable[[str, int], Progress]) -> Samples:
    chosen = _prompts(text, config.sample)
    completions = {}
    for mode in MODES:
        sampling = Sampling(
            max_new_tokens=config.sample.max_new_tokens,
            temperature=config.sample.temperature if mode == "sampled" else 0.0,
            top_p=config.sample.top_p,
            batch_size=config.sample.batch_size,
        )
        ids = [p.ids for p in chosen]
        with bar(mode, len(ids)) as progress:
            completions[mode] = generate(
                text.policy.model,
                text.tokenizer,
                ids,
                sampling,
                seed=config.run.seed,
                progress=progress.update,
            )
    return Samples(tuple(p.shown for p in chosen), tuple(p.cluster for p in chosen), completions)


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: list[int]
    shown: str
    cluster: str


def _prompts(text: TextRun, config: SampleConfig) -> list[_Prompt]:
    """Held-out prompts in order, without repeats, with a candidate's opening words where asked for."""
    assert text.data.held_out is not None
    found: dict[tuple[int, ...], _Prompt] = {}
    zipped = zip(text.data.held_out, text.data.eval_records, text.data.eval_clusters, strict=True)
    for i, (example, record, cluster) in enumerate(zipped):
        ids = example.prompt_ids.tolist()
        if config.opening_words:
            opening = _opening(record, i % len(record.candidates), config.opening_words)
            ids = ids + text.tokenizer(opening, add_special_tokens=False)["input_ids"]
        shown = text.tokenizer.decode(np.asarray(ids), skip_special_tokens=True)
        found.setdefault(tuple(ids), _Prompt(ids, shown, cluster))
    return list(found.values())[: config.num_prompts]


def _opening(record: Record, which: int, num_words: int) -> str:
    candidate = record.candidates[which]
    if not isinstance(candidate, str):
        raise ValueError("sample.opening_words needs plain text candidates, not conversations; set it to 0")
    lead = " " if candidate.startswith(" ") else ""
    return lead + " ".join(candidate.split()[:num_words])


def _identity(text: TextRun, config: TextConfig) -> str:
    facts = [asdict(config.sample), config.run.seed, text.base_hash, text.data.fingerprint]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
