"""What a diffusion run leaves behind: held-out results, pictures, artefacts and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from triptych.modalities.diffusion.export import LORA_FILE, export_full, export_kohya, export_lora, part_of
from triptych.modalities.diffusion.gallery import (
    Bar,
    BaseSamples,
    Gallery,
    Pictures,
    Studio,
    sample_base,
    side_by_side,
    step_name,
    wanted,
    weights_hash,
)
from triptych.modalities.diffusion.grids import png, readable
from triptych.modalities.diffusion.measures import diversity
from triptych.modalities.diffusion.model import ASSET, pipeline_class
from triptych.modalities.diffusion.setup import DiffusionConfig, DiffusionRun
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.evaluation import estimate, evaluate
from triptych.training.loop import Learner
from triptych.training.quarantine import Quarantine
from triptych.training.references import unwrapped
from triptych.training.report import Figure, SamplePair, Table, write_report
from triptych.training.sharding import is_sharded, whole_state
from triptych.training.stats import Estimate, paired_difference

__all__ = ["Gallery", "finish", "held_out_table", "judge", "sample_base"]

_MAX_STEPS_SHOWN = 4
_MAX_SAMPLES = 12
# Measures differ by orders of magnitude: sharpness is a hundredth where colourfulness is fifty.
_DIGITS = ".3g"


def finish(
    run: DiffusionRun,
    learner: Learner,
    config: DiffusionConfig,
    accelerator: Accelerator,
    *,
    quarantine: Quarantine,
    base_samples: BaseSamples | None,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Bar,
) -> None:
    """Evaluate, sample, export the artefacts with their card, and write report.html. Every rank calls it."""
    folder = Path(config.run.output_dir)
    rows = None
    if run.eval_task is not None:
        size = config.evaluation.micro_batch_size
        rows = evaluate(
            run.eval_task, learner.policy, accelerator, micro_batch_size=size, seed=config.run.seed
        )
    policy = unwrapped(learner.policy)
    aligned, moved = None, None
    # A sharded model can only be sampled and gathered by all ranks together.
    if wanted(run, config) and (accelerator.is_main_process or is_sharded(policy)):
        studio = base_samples.studio if base_samples is not None else Studio(run, config)
        place = folder / "samples" / step_name(learner.step)
        aligned = studio.pictures(place, weights_hash(policy), lambda total: bar("aligned", total))
        moved = Gallery(run, config, folder, base_samples, bar).drift(policy)
    state = whole_state(run.policy.model)
    if not accelerator.is_main_process:
        return
    referenced = run.task.terms.main.slot != "none"
    tables, results = [], {}
    if rows:
        table, results = held_out_table(rows, run.data.eval_clusters, referenced=referenced)
        tables.append(table)
    pairs: list[SamplePair] = []
    figures: list[Figure] = []
    if base_samples is not None and aligned is not None:
        base = base_samples.pictures
        table, found = judge(base, aligned, drift=moved, seed=config.run.seed)
        tables.append(table)
        results = results | found
        pairs = _sample_pairs(base, aligned)
        along = base_samples.studio.along_the_way(folder, before=learner.step)
        figures = [_figure(base, along, aligned)]
    numbers = {name: f"{value:{_DIGITS}}" for name, value in results.items()}
    _export(run, config, folder / "model", state)
    write_card(
        folder / "model",
        base_model=config.model.name_or_path,
        library_name="diffusers",
        tags=[
            "preference-alignment",
            config.objective.name,
            run.family,
            *(["lora"] if config.model.lora else []),
        ],
        datasets=[config.data.source],
        license=None,
        metrics=numbers,
        command=command,
        versions=versions,
        config=settings,
        snippet=snippet(run, config),
    )
    write_json(folder / "results.json", {name: asdict(value) for name, value in results.items()})
    path = write_report(
        folder,
        title=f"{config.objective.name} on {config.data.source}",
        summary=_summary(results),
        tables=[_with_digits(table) for table in tables],
        samples=pairs,
        images=figures,
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:{_DIGITS}}")
    report(f"report: {path}")


_HELD_OUT = {
    "ELBO ranking accuracy": ("ranking/reference", "ranking/accuracy"),
}
_ALIGNED_ONLY = {
    "top-1 of lists": "ranking/top1",
    "NDCG of lists": "ranking/ndcg",
    "reward margin": "rewards/margins",
    "loss": "loss",
}


def held_out_table(
    rows: Mapping[str, Tensor], clusters: Sequence[str], *, referenced: bool = True
) -> tuple[Table, dict[str, Estimate]]:
    """Held-out results of base and aligned model, 95 % intervals over clusters, as a table and by name.

    referenced: whether rewards are relative to the base, so that all of the base's own are ties.
    """
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    if "rewards/accuracies" in rows:
        results["reward accuracy"] = estimate(rows["rewards/accuracies"], clusters=clusters)
        lines.append(["reward accuracy", 0.5 if referenced else None, results["reward accuracy"], None])
    for name, (before, after) in _HELD_OUT.items():
        if before in rows and after in rows:
            gain = paired_difference(rows[before], rows[after], seed=0, clusters=clusters)
            results[f"{name}, aligned - base"] = gain
            base, aligned = (estimate(rows[key], clusters=clusters) for key in (before, after))
            lines.append([name, base, aligned, gain])
    for name, key in _ALIGNED_ONLY.items():
        if key in rows:
            lines.append([name, None, estimate(rows[key], clusters=clusters), None])
    ties = " (the base is its own reference, so all its rewards are ties)" if referenced else ""
    note = (
        f"{len(next(iter(rows.values())))} held-out samples, each at one draw of times and noise; 95 % "
        "bootstrap intervals over prompts or persons. Reward accuracy: share of comparisons that the "
        f"implicit reward decides as the label does{ties}; ties count one half. It says how well the labels "
        "are told apart, not how good the pictures are."
    )
    return Table("Held-out data", ["measure", "base", "aligned", "difference"], lines, note), results


def judge(
    base: Pictures, aligned: Pictures, *, drift: float | None, seed: int
) -> tuple[Table, dict[str, Estimate]]:
    """Measures of both models' pictures and their paired differences, as a table and by name.

    drift: see `measures.drift`; None leaves its line out.
    """
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    clusters = base.clusters()
    for name, before in base.scores.items():
        after = aligned.scores[name]
        results[f"{name}, aligned - base"] = paired_difference(before, after, seed=seed, clusters=clusters)
        higher = [1.0 if b > a else 0.5 if a == b else 0.0 for a, b in zip(before, after, strict=True)]
        a, b = (estimate(torch.tensor(v), clusters=clusters) for v in (before, after))
        share = estimate(torch.tensor(higher), clusters=clusters)
        lines.append([name, a, b, results[f"{name}, aligned - base"], share])
    if base.num_per_prompt > 1:
        spread = [diversity(pictures.groups()) for pictures in (base, aligned)]
        gain = paired_difference(*spread, seed=seed, clusters=base.prompts)
        results["diversity, aligned - base"] = gain
        a, b = (estimate(torch.tensor(v, dtype=torch.float64)) for v in spread)
        lines.append(["diversity", a, b, gain, None])
    if drift is not None:
        lines.append(["drift", 0.0, drift, None, None])
    note = (
        f"{len(base.images)} pictures of {len(base.prompts)} held-out prompts, from the same noise for both; "
        "95 % bootstrap intervals over prompts. Higher: share of pictures that measure more than the base's. "
        "Diversity: mean pixel distance between pictures of one prompt. Drift: mean squared difference "
        "between the two models' predictions on held-out data."
    )
    return Table("Pictures", ["measure", "base", "aligned", "difference", "higher"], lines, note), results


def snippet(run: DiffusionRun, config: DiffusionConfig) -> str:
    """Python that loads the artefact in diffusers."""
    name = config.model.name_or_path
    name = f"assets/{name.removeprefix(ASSET)}" if name.startswith(ASSET) else name
    kind, part = pipeline_class(run.family), part_of(run.policy.model)  # type: ignore[arg-type]
    made = kind.__name__
    options = {k: v for k in ("revision", "variant") if (v := getattr(config.model, k)) is not None}
    extra = "".join(f", {k}={v!r}" for k, v in (options | _absent(run)).items())
    if config.model.lora is not None:
        lines = [
            f"from diffusers import {made}\n",
            f"pipe = {made}.from_pretrained({name!r}, use_safetensors=True{extra})",
            f'pipe.load_lora_weights(".", weight_name="{LORA_FILE}")',
        ]
    else:
        model = type(run.policy.model).__name__
        lines = [
            f"from diffusers import {made}, {model}\n",
            f'{part} = {model}.from_pretrained(".", subfolder="{part}", use_safetensors=True)',
            f"pipe = {made}.from_pretrained({name!r}, {part}={part}, use_safetensors=True{extra})",
        ]
    if config.model.prediction in ("epsilon", "v"):
        told = {"epsilon": "epsilon", "v": "v_prediction"}[config.model.prediction]
        lines.append(f'pipe.scheduler.register_to_config(prediction_type="{told}")')
    prompt = run.data.eval_prompts[0] if run.data.eval_prompts else "a photo of an astronaut"
    steps, guidance = config.sample.num_steps, config.sample.guidance
    call = f"image = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]"
    return "\n".join([*lines, call]) + "\n"


def _absent(run: DiffusionRun) -> dict[str, None]:
    """Parts that a saved SD3 pipeline without T5 does not list, and that diffusers wants to be told of."""
    path = Path(run.source) / "model_index.json"
    if run.family != "sd3" or not path.is_file():
        return {}
    listed = json.loads(path.read_text("utf-8"))
    return {n: None for n in ("text_encoder_3", "tokenizer_3") if listed.get(n, [None])[0] is None}


def _export(
    run: DiffusionRun, config: DiffusionConfig, folder: Path, state: Mapping[str, Tensor] | None
) -> None:
    model: nn.Module = run.policy.model
    if config.model.lora is None:
        export_full(model, folder, state=state)
        return
    made = pipeline_class(run.family)  # type: ignore[arg-type]
    export_lora(model, folder, made, state=state)
    if part_of(model) == "unet":
        export_kohya(model, folder, made, state=state)


def _figure(base: Pictures, along: Mapping[int, Pictures], aligned: Pictures) -> Figure:
    steps = sorted(along)
    steps = [s for s in steps if s > 0]
    if len(steps) > _MAX_STEPS_SHOWN:
        places = torch.linspace(0, len(steps) - 1, _MAX_STEPS_SHOWN).round().int().tolist()
        steps = [steps[i] for i in places]
    columns = {"base": base} | {f"step {s}": along[s] for s in steps} | {"aligned": aligned}
    note = "Every row starts from one noise. Nothing was chosen: the first held-out prompts in order."
    return Figure("Pictures on held-out prompts", side_by_side(columns), note)


def _sample_pairs(base: Pictures, aligned: Pictures) -> list[SamplePair]:
    """The first picture of each prompt."""
    pairs = []
    for i in range(0, len(base.images), base.num_per_prompt):
        scores = {name: (values[i], aligned.scores[name][i]) for name, values in base.scores.items()}
        shown = (png(readable(pictures.images[i])) for pictures in (base, aligned))
        pairs.append(SamplePair(base.prompts[i // base.num_per_prompt], *shown, scores=scores))
    return pairs[:_MAX_SAMPLES]


def _with_digits(table: Table) -> Table:
    """The table with three significant digits of every estimate."""
    rows = [[f"{c:{_DIGITS}}" if isinstance(c, Estimate) else c for c in row] for row in table.rows]
    return replace(table, rows=rows)


def _summary(results: Mapping[str, Estimate]) -> list[tuple[str, str]]:
    """At most four headline numbers: accuracy, then the pictures' measures."""
    first = ("reward accuracy", "ELBO ranking accuracy, aligned - base")
    names = [n for n in first if n in results] + [n for n in results if n not in first]
    return [(n[0].upper() + n[1:], f"{results[n]:{_DIGITS}}") for n in names[:4]]
