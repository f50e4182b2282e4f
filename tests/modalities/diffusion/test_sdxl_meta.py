"""The real SDXL (2.57 billion parameters) through policy, likelihood, objective and backward, on meta."""

import math

import torch
from image_cases import draws

from triptych.modalities.diffusion.architectures import PUBLISHED, build_denoiser
from triptych.modalities.diffusion.likelihood import Collator, ElboLikelihood, Example
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig, adapt
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.schedule import Schedule
from triptych.objectives import Term, Terms, build
from triptych.training.loop import Task, referenced
from triptych.training.references import AdapterOff


def pair():
    """A pair at 1024 pixels: latents 4 x 128 x 128, 77 tokens of 2048 numbers, pooled 1280."""
    return Example(
        id="x",
        source="data[0]",
        kind="pair",
        latents=torch.zeros(2, 4, 128, 128),
        embeds=torch.zeros(77, 2048),
        pooled=torch.zeros(1280),
        time_ids=torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2),
        relevance=(1.0, 0.0),
        keys=("w", "l"),
    )


def test_the_published_sdxl_goes_from_a_pair_to_the_gradient_of_its_adapter():
    unet = build_denoiser(PUBLISHED["sdxl"])
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    config = ModelConfig(name_or_path="sdxl", lora=LoraConfig(r=8, alpha=8), gradient_checkpointing=True)
    with torch.device("meta"):
        policy = Denoiser(adapt(unet, config)).train()
    table = torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)
    schedule = Schedule("epsilon", 1000, table)
    task = Task(
        likelihood=ElboLikelihood(schedule=schedule, kernel="reference"),
        terms=Terms((Term(build("dpo", beta=5000.0)),)),
        references={"frozen": AdapterOff()},
        collate=Collator(schedule=schedule),
        examples=[pair()],
        lengths=[1],
        sources=["data[0]"],
    )
    batch = task.collate([pair()], draws(1)).to(torch.device("meta"))
    losses, _ = task.terms(referenced(task, policy, batch))
    assert losses.shape == (1,)
    assert policy.calls == [2, 2]
    losses.sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    assert math.prod(batch.stacks[0].latents.shape[1:]) == 65_536
