"""What is shown of a trained image model: pictures beside the base's, artefacts with their card, a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.export import (
    LORA_FILE,
    export_full,
    export_kohya,
    export_lora,
    export_persons,
    part_of,
)
from triptych.modalities.diffusion.gallery import Pictures, Studio, side_by_side
from triptych.modalities.diffusion.grids import png, readable
from triptych.modalities.diffusion.measures import diversity
from triptych.modalities.diffusion.model import ASSET, pipeline_class
from triptych.modalities.diffusion.scene import Scene
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.evaluation import estimate
from triptych.training.report import Figure, SamplePair, Table, write_report
from triptych.training.stats import Estimate, paired_difference

_MAX_STEPS_SHOWN = 4
_MAX_SAMPLES = 12
# Measures differ by orders of magnitude: sharpness is a hundredth where colourfulness is fifty.
_DIGITS = ".3g"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the report of a run shows. results: estimates by name; the first few are its headlines."""

    tables: list[Table]
    results: dict[str, Estimate]
    samples: list[SamplePair]
    figures: list[Figure]

    def __add__(self, other: Findings) -> Findings:
        """These, then the other's."""
        return Findings(
            tables=self.tables + other.tables,
            results=self.results | other.results,
            samples=self.samples + other.samples,
            figures=self.figures + other.figures,
        )


def compare(
    studio: Studio, base: Pictures, aligned: Pictures, *, folder: Path, step: int, drift: float | None
) -> Findings:
    """The aligned model's pictures beside the base's. step: the last; folder: the run's."""
    table, results = judge(base, aligned, drift=drift, seed=studio.scene.seed)
    along = studio.along_the_way(folder, before=step)
    return Findings(
        tables=[table],
        results=results,
        samples=_sample_pairs(base, aligned),
        figures=[_figure(base, along, aligned)],
    )


def publish_run(
    scene: Scene,
    folder: Path,
    findings: Findings,
    *,
    objective: str,
    dataset: str,
    state: Mapping[str, Tensor] | None,
    tags: Sequence[str] = (),
    quarantine_counts: Mapping[str, int],
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
) -> None:
    """Export the artefacts with their card, and write results.json and report.html."""
    results = findings.results
    export_model(scene, folder / "model", state)
    write_card(
        folder / "model",
        base_model=scene.model.name_or_path,
        library_name="diffusers",
        tags=[
            "preference-alignment",
            *tags,
            objective,
            scene.family,
            *(["lora"] if scene.model.lora else []),
        ],
        datasets=[dataset],
        license=None,
        metrics={name: f"{value:{_DIGITS}}" for name, value in results.items()},
        command=command,
        versions=versions,
        config=settings,
        snippet=snippet(scene),
    )
    write_json(folder / "results.json", {name: asdict(value) for name, value in results.items()})
    path = write_report(
        folder,
        title=f"{' '.join([*tags, objective])} on {dataset}",
        summary=_summary(results),
        tables=[_with_digits(table) for table in findings.tables],
        samples=findings.samples,
        images=findings.figures,
        config=settings,
        quarantine_counts=quarantine_counts,
        command=command,
        versions=versions,
    )
    for name, value in results.items():
        report(f"  {name}: {value:{_DIGITS}}")
    report(f"report: {path}")


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


def snippet(scene: Scene) -> str:
    """Python that loads the artefact in diffusers."""
    name = scene.model.name_or_path
    name = f"assets/{name.removeprefix(ASSET)}" if name.startswith(ASSET) else name
    kind, part = pipeline_class(scene.family), part_of(scene.policy.model)  # type: ignore[arg-type]
    made = kind.__name__
    options = {k: v for k in ("revision", "variant") if (v := getattr(scene.model, k)) is not None}
    extra = "".join(f", {k}={v!r}" for k, v in (options | _absent(scene)).items())
    if scene.model.lora is not None:
        lines = [
            f"from diffusers import {made}\n",
            f"pipe = {made}.from_pretrained({name!r}, use_safetensors=True{extra})",
            f'pipe.load_lora_weights(".", weight_name="{LORA_FILE}")',
        ]
    elif scene.model.persons is not None:
        lines = [
            "from pathlib import Path\n",
            f"from diffusers import {made}",
            "from triptych.modalities.diffusion.export import load_persons",
            "from triptych.modalities.diffusion.persons import Users, drawn_for\n",
            f"pipe = {made}.from_pretrained({name!r}, use_safetensors=True{extra})",
            'load_persons(pipe.unet, ".")',
            f"users = Users.load(Path({scene.model.persons.users!r}))",
        ]
    else:
        model = type(scene.policy.model).__name__
        lines = [
            f"from diffusers import {made}, {model}\n",
            f'{part} = {model}.from_pretrained(".", subfolder="{part}", use_safetensors=True)',
            f"pipe = {made}.from_pretrained({name!r}, {part}={part}, use_safetensors=True{extra})",
        ]
    if scene.model.prediction in ("epsilon", "v"):
        told = {"epsilon": "epsilon", "v": "v_prediction"}[scene.model.prediction]
        lines.append(f'pipe.scheduler.register_to_config(prediction_type="{told}")')
    prompt = scene.prompts[0] if scene.prompts else "a photo of an astronaut"
    steps, guidance = scene.sample.num_steps, scene.sample.guidance
    call = f"image = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]"
    if scene.model.persons is not None:
        shown = scene.model.persons.shown
        user = "next(iter(users.vectors.values()))" if shown is None else f"users[{shown!r}]"
        call = f"with drawn_for(pipe, {user}):\n    {call}"
    return "\n".join([*lines, call]) + "\n"


def _absent(scene: Scene) -> dict[str, None]:
    """Parts that a saved SD3 pipeline without T5 does not list, and that diffusers wants to be told of."""
    path = Path(scene.source) / "model_index.json"
    if scene.family != "sd3" or not path.is_file():
        return {}
    listed = json.loads(path.read_text("utf-8"))
    return {n: None for n in ("text_encoder_3", "tokenizer_3") if listed.get(n, [None])[0] is None}


def export_model(scene: Scene, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the policy: a LoRA for diffusers (and kohya's tools), its attention to users, or all of it.

    state: the gathered weights of a sharded policy.
    """
    model: nn.Module = scene.policy.model
    if scene.model.persons is not None:
        export_persons(model, folder, state=state)
        return
    if scene.model.lora is None:
        export_full(model, folder, state=state)
        return
    made = pipeline_class(scene.family)  # type: ignore[arg-type]
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
