"""The path of a user with Pick-a-Pic and SDXL, on stand-ins: encode, train, be interrupted, export, look."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import image_material
import pytest
import torch
import yaml
from _pytest.capture import SysCapture
from diffusers import StableDiffusionXLPipeline
from image_material import RECIPES, SCRIPT, arguments, events, losses, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_diffusion import denoiser_inputs

from triptych.modalities.diffusion.export import KOHYA_FILE, LORA_FILE
from triptych.modalities.diffusion.model import ModelConfig, adapt, load_denoiser
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.setup import DiffusionConfig, set_up
from triptych.modalities.diffusion.shards import EncodedDataset
from triptych.scripts import train_diffusion
from triptych.scripts.common import parse
from triptych.training.checkpoint import load_checkpoint
from triptych.training.order import Draw, window
from triptych.training.references import trained

# The recipe asks for bfloat16, whose rounding would hide small mistakes.
EXACT = {"model__dtype": "float32", "optim__precision": "float32"}
PICTURES = {"sample__num_prompts": 2, "run__eval_every": 2, "run__save_every": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny SDXL pipeline, and pairs and lists encoded for it by the offline step, in float32."""
    folder = tmp_path_factory.mktemp("material")
    model = image_material.write_model(folder / "sdxl", "sdxl")
    exact = {"dtype": "float32", "prompt_dtype": "float32", "model__text_dtype": "float32"}
    pairs = image_material.write_pairs(folder / "pickapic")
    lists = image_material.write_lists(folder / "ranked")
    with image_material.aside(folder):
        image_material.encode(model, pairs, folder / "pairs", **exact)
        image_material.encode(model, lists, folder / "lists", **exact)
    return folder


def command(material, out, *, recipe="sdxl_dpo_lora", data="pairs", **changes):
    return arguments(recipe, material, out, data=data, **(EXACT | changes))


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """The folder of the recipe's run, with pictures on its way, and its standard error."""
    folder = tmp_path_factory.mktemp("finished")
    heard = SysCapture(2)
    heard.start()
    try:
        with image_material.aside(folder):
            assert train_diffusion.main(command(material, folder / "run", **PICTURES)) == 0
        said = heard.snap()
    finally:
        heard.done()
    return folder / "run", said


def pipeline(material):
    return StableDiffusionXLPipeline.from_pretrained(material / "sdxl", variant="fp16", use_safetensors=True)


def trained_policy(material, out, step):
    """The policy as the loop had it, from its checkpoint."""
    config = yaml.safe_load((out / "config.yaml").read_text())["model"]
    lora = config.pop("lora")
    model = ModelConfig(**config | {"gradient_checkpointing": False})
    assert lora["r"] == 64
    policy = Denoiser(adapt(load_denoiser(str(material / "sdxl"), model), model)).eval()
    saved = load_checkpoint(out / "checkpoints" / f"step-{step:08d}").tensors["policy"]
    with torch.no_grad():
        for name, parameter in trained(policy).items():
            parameter.copy_(saved.pop(name))
    assert not saved
    return policy.model


def output(unet):
    with torch.no_grad():
        return unet(**denoiser_inputs("sdxl")).sample


def test_the_encoded_data_is_what_the_parquet_files_say(material):
    data = EncodedDataset(material / "pairs")
    assert data.num_records == 18  # of 21 rows two are ties and one has no label
    assert data.facts["left_out"] == {"has no label": 1, "is a tie": 2}
    records = [data.record(i) for i in range(18)]
    assert {r["kind"] for r in records} == {"pair"}
    # Each image of a pair keeps its own size, and both are shown at one place.
    sizes = {tuple(ids[:2]) for r in records for ids in r["time_ids"]}
    assert len(sizes) == len(image_material.SIZES)
    assert {tuple(ids[4:]) for r in records for ids in r["time_ids"]} == {(32, 32)}
    assert any(c.endswith(":mirrored") for r in records for c in r["contents"])


def test_the_run_folder_holds_everything_that_is_promised(material, finished):
    out, said = finished
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["objective"] == yaml.safe_load((RECIPES / "sdxl_dpo_lora.yaml").read_text())[
        "objective"
    ] | {
        "reference": "frozen",
        "regularizers": [],
    }
    assert json.loads((out / "versions.json").read_text())["torch"] == importlib.metadata.version("torch")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-6)
    assert [e["step"] for e in events(out, "train")] == [1, 2, 3, 4]
    assert [e["step"] for e in events(out, "eval")] == [0, 2, 4]
    assert not list(out.rglob(".tmp*"))
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    lines = said.splitlines()
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert (
        "objective: dpo, beta 5000 on the mean of a 4x8x8 latent's squared error = 19.53 on its sum" in lines
    )
    assert not [line for line in lines if "Warning" in line]


def test_the_log_follows_reward_drift_and_diversity(finished):
    found = events(finished[0], "eval")
    names = {"loss", "rewards/accuracies", "drift", "diversity", "reward/colourfulness"}
    assert all(names <= e.keys() for e in found)
    assert found[0]["drift"] == 0
    assert 0 < found[1]["drift"] < found[2]["drift"]
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_pictures_stand_beside_the_bases(finished):
    folder = finished[0] / "samples"
    assert {p.name for p in folder.iterdir()} == {"base", "step-000002", "step-000004"}
    for name in ("base", "step-000002", "step-000004"):
        assert len(list((folder / name).glob("0*.png"))) == 4
    with Image.open(folder / "step-000004" / "grid.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 64
    with Image.open(folder / "base" / "00000.png") as one:
        assert one.size == (32, 32)


def test_the_report_is_one_file_with_curves_and_pictures(finished):
    report = (finished[0] / "report.html").read_text()
    assert "<script" not in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert report.count("<svg") >= 3
    assert report.count("data:image/png;base64,") >= 5
    for part in ("Held-out data", "Pictures", "drift", "diversity", "Pictures on held-out prompts"):
        assert part in report
    assert json.loads((finished[0] / "results.json").read_text())["reward accuracy"]["n"] > 1


def test_the_card_says_what_it_is_and_how_to_load_it(finished):
    card = (finished[0] / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    about = yaml.safe_load(card.split("---")[1])
    assert about["library_name"] == "diffusers"
    assert {"dpo", "sdxl", "lora"} <= set(about["tags"])
    assert "pipe.load_lora_weights" in card


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_the_lora_in_a_fresh_pipeline_is_bitwise_the_policy(material, finished, name):
    out, _ = finished
    pipe = pipeline(material)
    base = output(pipe.unet)
    pipe.load_lora_weights(out / "model", weight_name=name)
    expected = output(trained_policy(material, out, 4))
    assert torch.equal(output(pipe.unet), expected)
    assert not torch.equal(expected, base)
    with safe_open(out / "model" / LORA_FILE, framework="pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (about["unet.r"], about["unet.lora_alpha"]) == (64, 64)


def test_a_finished_run_started_again_trains_nothing(material, finished, tmp_path, capsys):
    out, _ = finished
    kept = {p: p.read_bytes() for p in [out / "metrics.jsonl", *(out / "checkpoints").rglob("*.*")]}
    exported = load_file(out / "model" / LORA_FILE)
    assert train_diffusion.main(command(material, out, **PICTURES)) == 0
    assert {p: p.read_bytes() for p in kept} == kept
    again = load_file(out / "model" / LORA_FILE)
    assert all(torch.equal(again[n], t) for n, t in exported.items())
    assert "resumed from checkpoints/step-00000004" in capsys.readouterr().err


def test_the_saved_configuration_given_back_repeats_the_run_bit_for_bit(material, finished, tmp_path):
    out, again = finished[0], tmp_path / "again"
    args = ["--config", str(out / "config.yaml"), "--run.output_dir", str(again)]
    assert train_diffusion.main(args) == 0
    assert (again / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    assert weights(again, 4) == weights(out, 4)


# Everything that draws: dropped prompts (the recipe's), places in the order, several draws, an average.
DRAWN = {
    "noise__stratified": "true",
    "noise__num_draws": 2,
    "noise__antithetic": "true",
    "optim__average": 0.9,
}


def environment():
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
def test_a_killed_run_started_again_equals_an_uninterrupted_one(material, tmp_path):
    num_steps, out, whole = 16, tmp_path / "run", tmp_path / "whole"
    long = DRAWN | {"optim__num_steps": num_steps, "run__save_every": 2, "run__eval_every": 8}
    long |= {"sample__num_prompts": 1, "sample__num_per_prompt": 1}
    started = [sys.executable, str(SCRIPT), *command(material, out, **long)]
    process = subprocess.Popen(started, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    limit = time.monotonic() + 200
    while not list((out / "checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    newest = max(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*"))
    assert newest < num_steps
    assert train_diffusion.main(command(material, out, **long)) == 0
    assert train_diffusion.main(command(material, whole, **long)) == 0
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    last = f"checkpoints/step-{num_steps:08d}"
    for name in ("policy", "average", "optimizer"):
        assert (out / last / f"{name}.safetensors").read_bytes() == (
            whole / last / f"{name}.safetensors"
        ).read_bytes()
    mine, theirs = (load_file(folder / "model" / LORA_FILE) for folder in (out, whole))
    assert all(torch.equal(mine[n], t) for n, t in theirs.items())


def test_a_signal_saves_and_leaves_and_the_same_command_ends_as_if_it_had_not_come(
    material, tmp_path, monkeypatch, capsys
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train_diffusion.main(command(material, whole, **DRAWN)) == 0
    real, seen = train_diffusion.fit, []

    def fit(task, *rest, **options):
        def collate(examples, draws):
            seen.append(draws)
            if len(seen) == 3:  # two micro-batches a step: in the middle of the second
                signal.raise_signal(signal.SIGTERM)
            return task.collate(examples, draws)

        return real(dataclasses.replace(task, collate=collate), *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(train_diffusion, "fit", fit)
        assert train_diffusion.main(command(material, out, **DRAWN)) == 128 + signal.SIGTERM == 143
    assert "stopped at step 2 of 4; the same command continues" in capsys.readouterr().err
    assert not (out / "model").exists()
    assert train_diffusion.main(command(material, out, **DRAWN)) == 0
    assert "resumed from checkpoints/step-00000002" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(out, 4) == weights(whole, 4)


@pytest.mark.slow
def test_two_processes_train_as_one(material, tmp_path):
    """With a live reference, and with a cached one of which each process computes its half."""
    kinds = {"live": {}, "cached": {"model__cache_reference": "true"}}
    lines = {}
    for name, changes in kinds.items():
        # A smaller beta and a larger eps: steps of the size of the gradient, not of its sign.
        changes = changes | {"optim__lr": 1e-3, "optim__eps": 1e-3, "sample__num_prompts": 1}
        changes["objective__options"] = "{beta: 500}"
        assert train_diffusion.main(command(material, tmp_path / f"one {name}", **changes)) == 0
        lines[name] = command(material, tmp_path / f"two {name}", **changes)
    (tmp_path / "lines.json").write_text(json.dumps(list(lines.values())))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
    ]
    launch += [str(Path(image_material.__file__)), str(tmp_path / "lines.json")]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "modalities" / "diffusion")]
    # A cache of their own: what one process computed must not serve two.
    given = environment() | {"OMP_NUM_THREADS": "1", "TRIPTYCH_CACHE": str(tmp_path / "other")}
    given |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(launch, env=given, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report: ") == 2
    for name in kinds:
        one, two = tmp_path / f"one {name}", tmp_path / f"two {name}"
        assert losses(two) == pytest.approx(losses(one), abs=2e-5)
        assert losses(two, "eval") == pytest.approx(losses(one, "eval"), abs=2e-5)
        mine, theirs = (load_file(folder / "model" / LORA_FILE) for folder in (one, two))
        for weight, value in mine.items():
            torch.testing.assert_close(theirs[weight], value, rtol=0, atol=2e-5, msg=weight)
        state = json.loads((two / "checkpoints" / "step-00000004" / "state.json").read_text())
        assert state["identity"]["num_ranks"] == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("reference: ")]
    total, computed = (int(word) for word in line.split() if word.isdigit())
    assert 0 < computed < total


@pytest.mark.parametrize(
    ("name", "changes", "data", "start"),
    [
        ("ipo", {"objective__options": "{tau: 0.01, reduce: sum}"}, "pairs", 50.0**2),
        ("simpo", {"objective__options": "{beta: 10.0, gamma: 0.0}"}, "pairs", None),
        ("kto", {"data__form": "labelled"}, "pairs", 0.5),
        ("rank_dpo", {"data__form": "lists"}, "lists", None),
        ("plackett_luce", {}, "lists", None),
        ("sft", {"data__form": "winners", "objective__options": "{}"}, "pairs", None),
        ("mapo", {"objective__options": "{beta: 2000, alpha: 0.05, gamma: 1.0}"}, "pairs", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_objective_is_a_change_of_one_line(material, tmp_path, name, changes, data, start):
    """At the start: ipo (0 - 1 / (2 tau))^2, kto 1 - sigmoid(0)."""
    out = tmp_path / "run"
    more = {"objective__name": name, "optim__num_steps": 2} | changes
    assert train_diffusion.main(command(material, out, data=data, **more)) == 0
    steps = events(out, "train")
    assert len(steps) == 2
    assert all(e["grad_norm"] > 0 for e in steps)
    if start is not None:
        assert steps[0]["loss"] == pytest.approx(start, rel=1e-6)
    assert (out / "model" / LORA_FILE).is_file()
    assert (out / "report.html").is_file()


def test_full_fine_tuning_leaves_a_model_that_a_pipeline_takes(material, tmp_path):
    out = tmp_path / "run"
    more = {"optim__num_steps": 2, "model__variant": "fp16"}
    assert train_diffusion.main(command(material, out, recipe="sdxl_dpo_full", **more)) == 0
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-6)
    pipe = pipeline(material)
    before = output(pipe.unet)
    model = type(pipe.unet).from_pretrained(out / "model", subfolder="unet", use_safetensors=True)
    saved = load_checkpoint(out / "checkpoints" / "step-00000002").tensors["policy"]
    assert all(torch.equal(p, saved[f"model.{n}"]) for n, p in model.named_parameters())
    assert not torch.equal(output(model.eval()), before)


def test_the_recipe_of_mapo_is_half_the_authors_loss(material, tmp_path):
    """loss = mean_w - beta_mapo logsigmoid(T (o_w - o_l)), o = s / (exp(s) - 1), s = snr * mean square.

    With snr_value 0.5, beta_mapo 0.1 and T = 2000 steps, as in the authors' script.
    """
    args = command(material, tmp_path, recipe="sdxl_mapo", model__gradient_checkpointing="false")
    config = parse(DiffusionConfig, args, prog="train_diffusion", doc="MaPO.")
    assert yaml.safe_load((RECIPES / "sdxl_mapo.yaml").read_text())["optim"]["num_steps"] == 2000
    terms = config.objective.terms()
    run = set_up(
        config,
        terms,
        device=torch.device("cpu"),
        cache_dir=tmp_path,
        root=tmp_path,
        report=lambda line: None,
    )
    assert run.references == {}
    draws = [Draw(i, 0, 100 + i, i) for i in range(6)]
    batch = run.task.collate([run.task.examples[d.index] for d in draws], draws)
    with torch.no_grad():
        loss_B, _ = terms({"none": run.task.likelihood(run.policy, batch)})
        (prediction,) = run.task.likelihood.predict(run.policy, batch)
    square = (prediction - batch.stacks[0].noise).double().square().mean((1, 2, 3)).reshape(6, 2)
    odds = 0.5 * square / (torch.exp(0.5 * square) - 1)
    ratio = torch.nn.functional.logsigmoid(2000 * (odds[:, 0] - odds[:, 1]))
    authors = square[:, 0] - 0.1 * ratio
    torch.testing.assert_close(loss_B.double(), authors / 2, rtol=1e-4, atol=1e-6)
    assert float(ratio.abs().max()) > 0


EVERY_STEP = {
    "run__save_every": 1,
    "run__keep_checkpoints": 9,
    "optim__num_steps": 3,
    "data__eval_share": 0.0,
}


@pytest.fixture(scope="module")
def clean(material, tmp_path_factory):
    """A run of three steps on good data, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("clean")
    with image_material.aside(folder):
        assert train_diffusion.main(command(material, folder / "run", **EVERY_STEP)) == 0
    return folder / "run"


def seen_third(num=18):
    """Index of a pair that the third step of four is the first to see, with the recipe's seed."""
    first, second, third = (
        [d.index for d in window(seed=0, step=step, num_samples=num, batch_size=4)] for step in range(3)
    )
    return next(i for i in third if i not in first + second)


def spoilt(material, folder, index):
    """The pairs again, with latents of one record that an overflowing VAE might have left."""
    shutil.copytree(material / "pairs", folder)
    data = EncodedDataset(folder)
    record = data.record(index)
    path = folder / f"part-{record['part']:05d}" / f"latents-{record['shape']}.safetensors"
    tensors = load_file(path)
    tensors["mean"][record["rows"][1], 0, 0, 0] = torch.nan
    save_file(tensors, path)
    return record["source"]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_record_that_is_not_finite_is_named_and_does_not_reach_the_weights(
    material, clean, tmp_path, capsys, action
):
    source = spoilt(material, tmp_path / "spoilt", seen_third())
    capsys.readouterr()
    out = tmp_path / "run"
    more = EVERY_STEP | {"data__source": tmp_path / "spoilt", "optim__on_nonfinite": action}
    if action == "stop":
        with pytest.raises(SystemExit) as left:
            train_diffusion.main(command(material, out, **more))
        assert left.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            f"error: step 3: the loss is not finite for {source}. The weights were not changed."
        )
        assert not (out / "checkpoints" / "step-00000003").exists()
        assert not (out / "model").exists()
    else:
        assert train_diffusion.main(command(material, out, **more)) == 0
        said = capsys.readouterr().err
        assert f"skipped a window: step 3: the loss is not finite for {source}." in said
        assert weights(out, 3) == weights(out, 2)
    assert weights(out, 2) == weights(clean, 2)
    assert weights(clean, 3) != weights(clean, 2)


def refusal(args, capsys):
    """The error of a run that ends with exit code 2: the last line, and the only one of its kind."""
    with pytest.raises(SystemExit) as left:
        train_diffusion.main(args)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert "Traceback" not in lines[-1]
    return lines[-1]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optim__lr": -1}, "optim.lr=-1.0 must be positive"),
        ({"model__lora__rank": 4}, "Option 'rank' is not accepted"),
        ({"objective__name": "dop"}, "no objective 'dop'"),
        ({"objective__options": "{}"}, "objective 'dpo' needs 'beta', which has no default"),
        (
            {"objective__name": "grpo", "objective__options": "{clip: 0.2}"},
            "no kind of image data is taken by grpo",
        ),
        ({"data__form": "lists"}, "data.form=lists makes list data, but the objective takes pair"),
        ({"data__source": "/no/such"}, "no encoded data set (dataset.json is missing)"),
        ({"data__dropout": 1.0}, "data.dropout=1.0 must be in [0, 1)"),
        ({"model__lora": "null"}, "model.reference=adapter_off needs model.lora"),
        ({"model__variant": "null"}, "no file named diffusion_pytorch_model.safetensors"),
        ({"noise__values": "[5000]"}, "noise.values has 5000; the model's times are 0 to 999"),
        ({"likelihood__min_snr": 5, "likelihood__space": "v"}, "space=v cannot be combined with it"),
        ({"sample__height": 33}, "sample.height=33 must be a positive multiple of 8"),
        ({"sample__measures": "[beauty]"}, "beauty"),
        ({"evaluation__micro_batch_size": 0}, "evaluation.micro_batch_size=0"),
        ({"model__kernel": "triton"}, "impl 'triton' cannot run"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_users_mistake_ends_in_one_line(material, tmp_path, capsys, changes, part):
    line = refusal(command(material, tmp_path / "run", **changes), capsys)
    assert part in line
    assert not (tmp_path / "run" / "model").exists()


def test_another_setting_is_refused_on_resuming_and_named(material, finished, capsys):
    line = refusal(command(material, finished[0], **PICTURES, noise__stratified="true"), capsys)
    assert "noise.stratified: False in the checkpoint, True now" in line
    assert "--run.resume_override=noise.stratified" in line
