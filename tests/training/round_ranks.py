"""What each process of a group does for `test_round_ranks`, in a module that they can import."""

from pathlib import Path

from accelerate import PartialState
from round_cases import Remembering, optim, run, stage, terms
from safetensors.torch import save_file
from toy import cpu_accelerator

from triptych.training.references import trained
from triptych.training.stages import Keep

# 7 contexts and batches of 5: neither is even between two ranks.
# A large eps keeps the update near the size of the gradient: rounding stays rounding.
CONFIG = optim(batch_size=5, micro_batch_size=2, eps=0.05)


def stages():
    """References that move, a buffer, judges with and without a memory."""
    moving = stage(
        terms("dpo", beta=0.1, reference="stage"),
        keep=Keep(stage="each_round", buffer="last", buffer_rounds=1),
        num_rounds=2,
        num_contexts=7,
        num_epochs=1.5,
    )
    remembering = stage(terms("rloo", clip=0.2), judge=Remembering(), num_rounds=2, num_contexts=7)
    return [moving, remembering]


def whole(folder):
    """All rounds at once; then again, stopped once in the middle of a round."""
    folder, accelerator = Path(folder), cpu_accelerator()
    model, _, state = run(folder / "whole", stages(), config=CONFIG, accelerator=accelerator)
    run(folder / "cut", stages(), config=CONFIG, accelerator=accelerator, stop_after=4)
    again, *_ = run(folder / "cut", stages(), config=CONFIG, accelerator=accelerator)
    if PartialState().is_main_process:
        save_file({**_weights(model), "seen": state.memory["seen"]}, folder / "whole.safetensors")
        save_file(_weights(again), folder / "cut.safetensors")


def _weights(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}
