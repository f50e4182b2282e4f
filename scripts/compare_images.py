"""Draw the same prompts from the same noise with a base model and with what several runs made of it.

    python scripts/compare_images.py --model.name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --prompts held_out.txt --output_dir runs/compare \
        --models '{"dpo": "runs/sdxl_dpo_lora", "spo": "runs/spo_sdxl"}'

The folder holds report.html with a row of pictures a prompt and a column a model, what is measured of them,
and every picture under samples/. Pictures that are there are not drawn again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.modalities.diffusion.export import LORA_FILE, part_of
from triptych.modalities.diffusion.gallery import Pictures, Studio, side_by_side
from triptych.modalities.diffusion.measures import diversity
from triptych.modalities.diffusion.model import ModelConfig, family, load_pipeline, locate
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.prompts import read_prompts
from triptych.modalities.diffusion.rollout import Embedded, SampleConfig, denoiser_of, embed
from triptych.modalities.diffusion.scene import Scene
from triptych.scripts.common import (
    as_dict,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_diffusers,
    versions,
)
from triptych.training.atomic import write_json
from triptych.training.evaluation import estimate
from triptych.training.report import Figure, Table, write_report
from triptych.training.stats import Estimate, paired_difference

ROOT = Path(__file__).resolve().parent.parent
BASE = "base"
_DIGITS = ".3g"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared.

    models: name -> folder of a run, or of what it exported; the base is always the first column. prompts: a
    file of prompts, best ones that no run trained on; the first sample.num_prompts are drawn.
    """

    model: ModelConfig
    models: dict[str, str]
    prompts: str
    output_dir: str
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if not self.models or BASE in self.models:
            raise ValueError(f"models must name at least one folder of a run, and none '{BASE}'")
        if not self.sample.num_prompts:
            raise ValueError("sample.num_prompts=0 leaves nothing to compare")


def run(config: CompareConfig) -> int:
    """Draw, measure and report; returns the exit code."""
    folder = Path(config.output_dir)
    exported = {name: _exported(name, Path(place)) for name, place in config.models.items()}
    prompts = tuple(read_prompts(Path(config.prompts))[: config.sample.num_prompts])
    source = locate(config.model, root=ROOT)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    columns: dict[str, Pictures] = {}
    embedded: Embedded | None = None
    for name, place in {BASE: None, **exported}.items():
        pipeline = _pipeline(source, config.model, place)
        if embedded is None:
            embedded = embed(pipeline, prompts)
        columns[name] = _drawn(config, name, pipeline, embedded, source, place)
    table, results = compare(columns)
    write_json(folder / "results.json", {name: asdict(value) for name, value in results.items()})
    note = "Every row starts from one noise. Nothing was chosen: the first prompts of the file, in order."
    path = write_report(
        folder,
        title=f"{', '.join(columns)}: {len(prompts)} prompts from the same noise",
        summary=[(name, f"{value:{_DIGITS}}") for name, value in list(results.items())[:4]],
        tables=[table],
        images=[Figure("The same noise", side_by_side(columns), note)],
        samples=[],
        quarantine_counts={},
        config=as_dict(config),
        command=command_line(),
        versions=versions(),
        trained=False,
    )
    for name, value in results.items():
        print(f"  {name}: {value:{_DIGITS}}", file=sys.stderr)
    print(f"report: {path}", file=sys.stderr)
    return 0


def _exported(name: str, place: Path) -> Path:
    """The folder with the weights of a run; ValueError where there is none."""
    for folder in (place / "model", place):
        if (folder / LORA_FILE).is_file() or any(
            (folder / part).is_dir() for part in ("unet", "transformer")
        ):
            return folder
    raise ValueError(
        f"models.{name}: {place} holds no {LORA_FILE}, unet or transformer; is the run finished?"
    )


def _pipeline(source: str, config: ModelConfig, place: Path | None) -> Any:
    """The pipeline with a run's weights, on the device."""
    pipeline = load_pipeline(source, config)
    denoiser: Any = denoiser_of(pipeline)
    part = part_of(denoiser)
    if place is not None and (place / LORA_FILE).is_file():
        denoiser.load_lora_adapter(str(place), weight_name=LORA_FILE, prefix=part, use_safetensors=True)
    elif place is not None:
        whole = type(denoiser).from_pretrained(
            str(place / part), use_safetensors=True, torch_dtype=denoiser.dtype
        )
        pipeline.register_modules(**{part: whole})
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipeline


def _drawn(
    config: CompareConfig, name: str, pipeline: Any, embedded: Embedded, source: str, place: Path | None
) -> Pictures:
    denoiser: nn.Module = denoiser_of(pipeline)
    scene = Scene(
        policy=Denoiser(denoiser),
        source=source,
        family=family(source, revision=config.model.revision),
        base_hash=source,
        model=config.model,
        sample=config.sample,
        precision="float32",
        prompts=embedded.prompts,
    )
    bar = progress("pictures", enabled=True)
    weights = BASE if place is None else _hash(place)
    studio = Studio(scene, made=(pipeline, embedded))
    return studio.pictures(Path(config.output_dir) / "samples" / name, weights, lambda total: bar(total, 0))


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def compare(columns: Mapping[str, Pictures]) -> tuple[Table, dict[str, Estimate]]:
    """Each measure of the base, and each model's paired difference to it, as a table and by name."""
    base, *others = columns
    first, clusters = columns[base], columns[base].clusters()
    lines: list[list[Any]] = []
    results: dict[str, Estimate] = {}
    for measure, before in first.scores.items():
        line: list[Any] = [measure, estimate(torch.tensor(before), clusters=clusters)]
        for name in others:
            gain = paired_difference(before, columns[name].scores[measure], seed=0, clusters=clusters)
            results[f"{measure}, {name} - base"] = gain
            line.append(gain)
        lines.append(line)
    if first.num_per_prompt > 1:
        spreads = {name: diversity(pictures.groups()) for name, pictures in columns.items()}
        line = ["diversity", estimate(torch.tensor(spreads[base], dtype=torch.float64))]
        for name in others:
            gain = paired_difference(spreads[base], spreads[name], seed=0, clusters=first.prompts)
            results[f"diversity, {name} - base"] = gain
            line.append(gain)
        lines.append(line)
    shown = [[f"{c:{_DIGITS}}" if isinstance(c, Estimate) else c for c in line] for line in lines]
    note = (
        f"{len(first.images)} pictures of {len(first.prompts)} prompts, from the same noise for all models; "
        "95 % bootstrap intervals over prompts. Diversity: mean pixel distance "
        "between pictures of one prompt."
    )
    heads = ["measure", base, *(f"{name} - {base}" for name in others)]
    return Table("Pictures", heads, shown, note), results


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(CompareConfig, args, prog="compare_images", doc=__doc__ or "")
        quiet_diffusers()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
