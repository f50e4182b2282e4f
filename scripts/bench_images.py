"""One step of Diffusion-DPO here and as diffusers' script does it, and lists against pairs, side by side.

    python scripts/bench_images.py                # about 4 minutes on one CPU core (Linux)

step: the project's own small SDXL-class pipeline with a LoRA, one step of 16 pairs (forward and backward of
the policy, reference, clipping, AdamW). 'diffusers' re-enacts the step of its train_diffusion_dpo_sdxl.py: at
every step it encodes the images with the VAE and the prompts with both text encoders, and runs the reference
by switching the adapter off. Here latents and prompts come from the offline step; the reference is live or a
table. Times, noise and latents are the same (the posterior's mean), and the losses must agree before anything
is compared. What encoding costs depends on the model: the small pipeline is measured with its own VAE and
with untrained ones that cost as much of a UNet forward as SDXL's (0.72) and SD 1.5's (1.40) do.
lists: 4 lists of 4 against the same lists as 24 pairs, the reference a table.
Each case is a process of its own with one thread: CPU seconds, least of the steps after the first, and peak
memory over what the imported libraries take, models included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triptych.scripts.common import quiet_diffusers, versions
from triptych.scripts.measuring import STEPS, as_child, measure, run_child, say

ROOT = Path(__file__).resolve().parent.parent
NUM_PAIRS = 16
NUM_LISTS = 4
# Channels of the autoencoder: its encoder's work over that of a forward of the UNet is 0.67 and 1.38.
AUTOENCODERS = {"its own": None, "SDXL's share": (32, 64, 64), "SD 1.5's share": (48, 96, 80)}
BETA = 5000.0
LR = 1e-4


def main() -> int:
    """Run the benchmarks, print their tables, write runs/bench/images.json."""
    parser = argparse.ArgumentParser(prog="bench_images", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="asset:openmoji_sdxl")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    quiet_diffusers()
    if options.child:
        as_child(options.child, CHILDREN)
        return 0
    results: dict[str, Any] = {}
    for name, channels in AUTOENCODERS.items():
        with tempfile.TemporaryDirectory() as folder:
            run_child(__file__, "prepare", model=options.model, folder=folder, channels=channels)
            work = {"model": f"{folder}/model", "folder": folder}
            results[name] = {"step": _step(name, work)}
            if channels is None:
                results[name]["lists"] = _lists(work)
    report = {"versions": versions(), "device": f"CPU, 1 thread of {os.cpu_count()}", **results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "images.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


def _step(autoencoder: str, work: dict[str, str]) -> dict[str, Any]:
    theirs = run_child(__file__, "diffusers", **work)
    ours = {
        name: run_child(__file__, "triptych", cached=name == "cached", **work) for name in ("live", "cached")
    }
    for name, found in ours.items():
        gap = max(abs(a - b) for a, b in zip(theirs["losses"], found["losses"], strict=True))
        if gap > 2e-4:
            raise SystemExit(
                f"losses of '{name}' differ by {gap:.2g}: {theirs['losses']} and {found['losses']}"
            )
        say(
            f"DPO step, {NUM_PAIRS} pairs, VAE: {autoencoder}, reference {name}",
            diffusers=f"{theirs['seconds']:.2f} s, {theirs['megabytes']:.0f} MiB",
            triptych=f"{found['seconds']:.2f} s, {found['megabytes']:.0f} MiB",
            time=f"{theirs['seconds'] / found['seconds']:.2f}x less",
            memory=f"{theirs['megabytes'] / found['megabytes']:.2f}x less",
            losses=f"equal to {gap:.1e}",
        )
    return {"diffusers": theirs, **ours}


def _lists(work: dict[str, str]) -> dict[str, Any]:
    lists, pairs = (run_child(__file__, "lists", as_pairs=flag, **work) for flag in (False, True))
    say(
        f"{NUM_LISTS} lists of 4, {6 * NUM_LISTS} comparisons",
        lists=f"{lists['seconds']:.2f} s, {lists['megabytes']:.0f} MiB",
        as_pairs=f"{pairs['seconds']:.2f} s, {pairs['megabytes']:.0f} MiB",
        time_a_comparison=f"{pairs['seconds'] / lists['seconds']:.2f}x less",
    )
    return {"lists": lists, "pairs": pairs}


def _prepare(model: str, folder: str, channels: tuple[int, ...] | None) -> dict[str, Any]:
    """Pictures of noise with prompts, as PNG files, and their encoded form: lists of 4, and pairs."""
    import numpy as np
    from PIL import Image

    from triptych.scripts.encode_images import main as encode

    _make_pipeline(model, Path(folder) / "model", channels)
    model = f"{folder}/model"
    rng = np.random.default_rng(0)
    images = Path(folder) / "images"
    images.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "lists": []}
    for i in range(NUM_PAIRS):
        names = [f"{i}-{k}.png" for k in range(4)]
        for name in names:
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(images / name)
        rows["pairs"].append({"prompt": f"picture {i}", "chosen": names[0], "rejected": names[1]})
        rows["lists"].append({"prompt": f"picture {i}", "images": names, "scores": [4, 3, 2, 1]})
    for form, lines in rows.items():
        text = "".join(json.dumps(r) + "\n" for r in lines)
        for name in (f"{form}.jsonl", "metadata.jsonl"):
            (images / name).write_text(text, "utf-8")
        code = encode(
            f"--model.name_or_path={model} --data.source={images} --resolution=64 --dtype=float32 "
            f"--prompt_dtype=float32 --output_dir={folder}/{form}".split()
        )
        if code:
            raise SystemExit(code)
    return {}


def _make_pipeline(model: str, folder: Path, channels: tuple[int, ...] | None) -> None:
    """The pipeline with an untrained autoencoder of these channels in the place of its own."""
    import torch
    from diffusers import AutoencoderKL

    from triptych.modalities.diffusion.model import ModelConfig, load_pipeline, locate

    config = ModelConfig(name_or_path=model)
    pipeline = load_pipeline(locate(config, root=ROOT), config)
    if channels is not None:
        torch.manual_seed(0)
        blocks = len(channels)
        pipeline.vae = AutoencoderKL(
            block_out_channels=channels,  # type: ignore[arg-type]
            down_block_types=("DownEncoderBlock2D",) * blocks,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * blocks,  # type: ignore[arg-type]
            latent_channels=pipeline.vae.config.latent_channels,
            norm_num_groups=16,
            scaling_factor=1.0,
        )
    pipeline.save_pretrained(folder)


def _config(model: str, data: str, objective: str, options: dict[str, Any], batch: int, **more: Any) -> Any:
    from triptych.modalities.diffusion.data import DataConfig
    from triptych.modalities.diffusion.model import LoraConfig, ModelConfig
    from triptych.modalities.diffusion.setup import DiffusionConfig
    from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig

    cached = more.pop("cached", True)
    return DiffusionConfig(
        model=ModelConfig(name_or_path=model, lora=LoraConfig(r=8, alpha=8), cache_reference=cached),
        data=DataConfig(source=data, eval_share=0.0, dropout=0.0, **more),
        objective=ObjectiveConfig(name=objective, options=options),
        optim=OptimConfig(
            lr=LR, batch_size=batch, micro_batch_size=batch, num_steps=STEPS, schedule="constant", warmup=0.0
        ),
        run=RunConfig(output_dir="."),
    )


def _set_up(config: Any, folder: str) -> tuple[Any, Any]:
    import torch
    from accelerate import Accelerator

    from triptych.modalities.diffusion.setup import fill_references, set_up
    from triptych.scripts.common import progress

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    run = set_up(
        config,
        config.objective.terms(),
        device=accelerator.device,
        cache_dir=Path(folder),
        root=ROOT,
        report=lambda line: None,
    )
    fill_references(
        run, accelerator, report=lambda line: None, bar=lambda label, n: progress(label, enabled=False)(n, 0)
    )
    return run, accelerator


def _our_step(config: Any, folder: str) -> Callable[[], float]:
    from triptych.training.loop import make_learner, train_step
    from triptych.training.meters import Meter

    run, accelerator = _set_up(config, folder)
    learner = make_learner(run.policy, config.optim, accelerator)
    meter = Meter(accelerator.device)

    def step() -> float:
        train_step(run.task, learner, config.optim, accelerator, seed=0, num_steps=STEPS, meter=meter)
        return meter.read(lambda t: t)["loss"]

    return step


def _triptych(model: str, folder: str, cached: bool) -> dict[str, Any]:
    config = _config(model, f"{folder}/pairs", "dpo", {"beta": BETA}, NUM_PAIRS, cached=cached)
    # The imports, and the table where there is one, are no part of a step.
    _set_up(config, folder)
    return measure(lambda: _our_step(config, folder))


def _list_case(model: str, folder: str, as_pairs: bool) -> dict[str, Any]:
    name, options = ("dpo", {"beta": BETA}) if as_pairs else ("plackett_luce", {"beta": BETA})
    form = "pairs" if as_pairs else "lists"
    size = (6 if as_pairs else 1) * NUM_LISTS
    config = _config(model, f"{folder}/lists", name, options, size, form=form, max_train=size)
    _set_up(config, folder)
    return measure(lambda: _our_step(config, folder))


def _diffusers(model: str, folder: str) -> dict[str, Any]:
    _set_up(_config(model, f"{folder}/pairs", "dpo", {"beta": BETA}, NUM_PAIRS, cached=False), folder)
    return measure(lambda: _their_step(model, folder))


def _their_step(model: str, folder: str) -> Callable[[], float]:
    """The step of diffusers' research_projects/diffusion_dpo script for SDXL, on the same batches."""
    import torch
    import torch.nn.functional as F

    from triptych.modalities.diffusion.model import load_pipeline, locate
    from triptych.modalities.diffusion.openmoji import pixels_of
    from triptych.training.order import window

    config = _config(model, f"{folder}/pairs", "dpo", {"beta": BETA}, NUM_PAIRS, cached=False)
    run, _ = _set_up(config, folder)
    unet = run.policy.model
    pipeline = load_pipeline(locate(config.model, root=ROOT), config.model, denoiser=unet)
    vae, trained = pipeline.vae, [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    pictures = {r["prompt"]: r for r in _lines(Path(folder) / "images" / "pairs.jsonl")}
    count = iter(range(STEPS))
    unet.train()

    def step() -> float:
        draws = window(seed=0, step=next(count), num_samples=NUM_PAIRS, batch_size=NUM_PAIRS)
        batch = run.task.collate([run.task.examples[d.index] for d in draws], draws)
        (stack,) = batch.stacks
        prompts = [run.data.train.dataset.record(d.index)["prompt"] for d in draws]
        names = [pictures[p][side] for p in prompts for side in ("chosen", "rejected")]
        pixels = pixels_of([_open(Path(folder) / "images" / name) for name in names])
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        noise, times = stack.noise, stack.times.long()
        noisy = pipeline.scheduler.add_noise(latents, noise, times)
        conditions = {
            "text_embeds": pooled.repeat_interleave(2, 0),
            "time_ids": stack.time_ids,
        }
        embeds = embeds.repeat_interleave(2, 0)

        def losses() -> Any:
            said = unet(noisy, times, embeds, added_cond_kwargs=conditions).sample
            errors = F.mse_loss(said.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
            return errors[0::2] - errors[1::2]

        model_diff = losses()
        unet.disable_adapters()
        with torch.no_grad():
            ref_diff = losses()
        unet.enable_adapters()
        loss = -F.logsigmoid(-0.5 * BETA * (model_diff - ref_diff)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": _prepare,
    "triptych": _triptych,
    "diffusers": _diffusers,
    "lists": _list_case,
}

if __name__ == "__main__":
    raise SystemExit(main())
