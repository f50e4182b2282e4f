import sys
from pathlib import Path

import pytest

from triptych.scripts.plan import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modalities" / "diffusion"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_diffusion import tiny_sdxl, write_pipeline

    return str(write_pipeline(tiny_sdxl(), tmp_path_factory.mktemp("plan") / "sdxl"))


def table(output):
    """Label of a line -> the numbers behind it."""
    found = {}
    for line in filter(str.strip, output.splitlines()):
        label, *rest = [part for part in line.strip().split("  ") if part]
        values = [part.split()[0].replace(",", "") for part in rest]
        found[label] = [float(v) for v in values if v.replace(".", "", 1).isdigit()]
    return found


def test_a_plan_says_flops_memory_and_days_and_what_else_it_could_be(folder, capsys):
    arguments = [
        "--model",
        folder,
        "--num_pairs",
        "1000000",
        "--gpus",
        "8",
        "--gpu",
        "mi300x",
        "--lora_r",
        "4",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert f"{folder}, dpo: 32 x 32 pixels, LoRA of rank 4" in output
    for label in ("policy, forward and backward", "reference, adapter_off", "peak", "the run", "before it"):
        assert label in output
    assert "fits mi300x (192 GB)" in output
    assert "1,000,000 of a pair, 1 times over, on 8 x mi300x at 40% of 1307 TFLOP/s" in output
    found = table(output)
    # The columns are TFLOP, GB, days, and days before; the tiny model's are all but nothing.
    for label in ("as above", "every weight instead of LoRA", "with gradient checkpointing"):
        assert len(found[label]) == 4
    for label in ("reference from the cache", "encoding in every step"):
        assert len(found[label]) == 4


def test_numbers_of_a_plan_agree_with_each_other(folder, capsys):
    """At 512 pixels, where they have digits to show; the run at a rate of 1 TFLOP/s of a 3090."""
    arguments = ["--model", folder, "--resolution", "512", "--num_pairs", "86400", "--num_prompts", "100"]
    arguments += ["--gpus", "1", "--gpu", "3090", "--utilisation", str(1 / 71), "--alone"]
    assert main([*arguments, "--gradient_checkpointing"]) == 0
    found = table(capsys.readouterr().out)
    parts = ("policy, forward and backward", "reference, adapter_off", "VAE encoder", "text encoders")
    together = found["together"][0]
    assert sum(found[name][0] for name in parts) == pytest.approx(together, abs=0.02)
    assert found["VAE encoder"] == [0]
    assert found["the run"][0] == pytest.approx(together, abs=0.01)
    assert found["peak"][0] >= found["weights"][0] + found["activations"][0] > 0
    # 4 x 128 x 128 and 16 x 40 numbers of two bytes.
    assert found["encoded images and prompts"][0] == pytest.approx(2 * 86400 * 131_072 / 1e9, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sdxxl"], "--model=sdxxl; valid: sdxl, sd15, sd3-medium, or a pipeline's folder"),
        (["--method", "grpo"], "--method=grpo does not train on recorded images"),
        (["--method", "dpoo"], "Did you mean 'dpo'?"),
        (["--gpu", "h101"], "--gpu=h101; valid: a100"),
        (["--lora_r", "0", "--reference", "adapter_off"], "--reference=adapter_off needs LoRA"),
        (["--lora_r", "-1"], "model.lora.r=-1 must be at least 1"),
        (["--resolution", "1020"], "--resolution=1020 is not a multiple of 8"),
        (["--micro_batch_size", "0"], "--micro_batch_size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--alone"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
