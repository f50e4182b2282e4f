"""Whole diffusion runs on tiny pipelines and random encoded pairs, set up as the training script does it."""

import hashlib

import torch
from accelerate import Accelerator
from tiny_diffusion import FIRST_WIDTH, LATENT, MAX_TOKENS, PROJECTION, SECOND_WIDTH, TINY, write_pipeline

from triptych.modalities.diffusion.data import DataConfig
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig
from triptych.modalities.diffusion.rollout import SampleConfig
from triptych.modalities.diffusion.setup import DiffusionConfig, EvaluationConfig, set_up
from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.logs import Progress
from triptych.training.loop import make_learner

CHANNELS = {"sd15": 4, "sdxl": 4, "sd3": 16}
WIDTHS = {"sd15": FIRST_WIDTH, "sdxl": FIRST_WIDTH + SECOND_WIDTH, "sd3": 48}
POOLED = {"sd15": None, "sdxl": PROJECTION, "sd3": 2 * PROJECTION}


def write_encoded(folder, family, *, num_contexts=12, candidates=2, resolution=None):
    """Random latents of pairs, or of lists with k candidates, each with a prompt of its own."""
    draw = torch.Generator().manual_seed(0)

    def prompt():
        pooled = POOLED[family]
        return EncodedPrompt(
            torch.randn(MAX_TOKENS, WIDTHS[family], generator=draw),
            None if pooled is None else torch.randn(pooled, generator=draw),
        )

    contexts, prompts = [], {}
    for i in range(num_contexts):
        text = f"a {['red', 'blue', 'old'][i % 3]} cat number {i}"
        prompts[prompt_hash(text)] = prompt()
        size = candidates
        contexts.append(
            EncodedContext(
                id=f"{i:032x}",
                source=f"made:{i}",
                kind="pair" if size == 2 else "list",
                prompt=text,
                group=None,
                latents=torch.randn(size, CHANNELS[family], LATENT, LATENT, generator=draw),
                time_ids=((32, 32, 0, 0, 32, 32),) * size,
                contents=tuple(hashlib.sha256(f"{i} {k}".encode()).hexdigest() for k in range(size)),
                relevance=tuple(float(size - 1 - k) for k in range(size)),
            )
        )
    writer = ShardWriter(folder, {"made": family}, empty=prompt())
    writer.write(contexts, prompts)
    writer.finish({"family": family} | ({} if resolution is None else {"resolution": resolution}))
    return folder


def make_run(folder, family="sd15", *, lora=True, objective="dpo", candidates=2, resolution=None, **sample):
    """(run, config) in `folder`; the model and the data are written once."""
    model, data = folder / f"model-{family}", folder / f"data-{family}-{candidates}-{resolution}"
    if not model.is_dir():
        write_pipeline(TINY[family](), model)
    if not data.is_dir():
        write_encoded(data, family, candidates=candidates, resolution=resolution)
    config = DiffusionConfig(
        model=ModelConfig(
            name_or_path=str(model),
            lora=LoraConfig(r=2, alpha=4.0) if lora else None,
            reference="adapter_off" if lora else "frozen_copy",
        ),
        data=DataConfig(source=str(data), eval_share=0.5),
        objective=ObjectiveConfig(
            name=objective,
            options={} if objective == "sft" else {"beta": 100.0},
            reference="none" if objective == "sft" else "frozen",
        ),
        optim=OptimConfig(lr=1e-2, batch_size=2, micro_batch_size=2, num_steps=2),
        run=RunConfig(output_dir=str(folder / "run")),
        evaluation=EvaluationConfig(micro_batch_size=4),
        sample=SampleConfig(**{"num_prompts": 3, "num_steps": 2, "guidance": 2.0} | sample),
    )
    run = set_up(
        config,
        config.objective.terms(),
        device=torch.device("cpu"),
        cache_dir=folder / "cache",
        root=folder,
        report=lambda line: None,
    )
    return run, config


def learner_of(run, config):
    accelerator = Accelerator(cpu=True)
    return make_learner(run.policy, config.optim, accelerator), accelerator


def move(policy, by=0.2):
    """Change every trained weight, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=draw))


class Silent:
    def write(self, text):
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


def no_bar(label, total):
    return Progress(total, label=label, stream=Silent(), enabled=False, clock=lambda: 0.0)
