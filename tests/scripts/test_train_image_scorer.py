"""The script end to end on tiny models: what it learns, writes, resumes and refuses; and its recipes."""

import json
from pathlib import Path

import image_material
import pytest
import scorer_material
import torch
import yaml
from image_material import RECIPES, events, losses, weights, words
from tiny_diffusion import write_pipeline

from triptych.modalities.diffusion.image_scoring import build_scorer
from triptych.modalities.diffusion.latent_reward import load_latent_reward
from triptych.modalities.diffusion.scorer_config import ScorerTrainingConfig
from triptych.modalities.diffusion.step_scorer import load_step_scorer
from triptych.scripts import train_image_scorer
from triptych.scripts.common import parse

NAMES = ("pickscore_train", "spm_sd15", "spm_sdxl", "lrm_sdxl")
ONLINE = {"spm_sd15": "spo_sd15", "spm_sdxl": "spo_sdxl", "lrm_sdxl": "lpo_sdxl"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = scorer_material.write_material(tmp_path_factory.mktemp("scorer-runs"))
    scorer_material.write_encoded_pairs(folder / "many", "sd15", 80)
    write_pipeline(image_material.tiny_sdxl(), folder / "sdxl-fp16", variant="fp16")
    splits = folder / "splits"
    for split, num in (("train", 16), ("validation_unique", 6)):
        scorer_material.write_pictures(splits / split, num, ties=1, spoilt=0)
        # Prompts of their own.
        rows = (splits / split / "metadata.jsonl").read_text().replace("cat", f"{split} cat")
        (splits / split / "metadata.jsonl").write_text(rows)
    return folder


def arguments(material, out, kind, **changes):
    groups = {
        "clip": {"pictures.source": material / "pictures", "pictures.eval_share": 0.3},
        "step": {"model.name_or_path": material / "sd15", "data.source": material / "pairs-sd15"},
        "latent": {"model.name_or_path": material / "sd15", "data.source": material / "many"},
    }[kind]
    if kind != "clip":
        groups |= {"data.eval_share": 0.3, "scorer.time_bins": 3}
    if kind != "latent":
        groups |= {"scorer.clip": material / "clip"}
    common = {
        "scorer.type": kind,
        "optim.lr": 2e-3,
        "optim.batch_size": 8,
        "optim.micro_batch_size": 4,
        "optim.num_steps": 4,
        "run.output_dir": out,
    }
    return words(common | groups | {k.replace("__", "."): v for k, v in changes.items()})


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


@pytest.mark.parametrize(("kind", "num_steps"), [("clip", 20), ("step", 20), ("latent", 40)])
def test_a_scorer_learns_what_is_preferred_and_shows_it(material, tmp_path, capsys, kind, num_steps):
    out = tmp_path / "run"
    args = arguments(material, out, kind, optim__num_steps=num_steps)
    assert train_image_scorer.main(args) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"report: {out / 'report.html'}"
    first, last = events(out, "eval")[0], events(out, "eval")[-1]
    found = results(out)
    assert last["rewards/accuracies"] > 0.9
    assert last["loss"] < 0.8 * first["loss"]
    # What the report says is what the last evaluation measured.
    assert found["accuracy"]["mean"] == last["rewards/accuracies"]
    assert found["log-loss"]["mean"] == pytest.approx(last["loss"], abs=1e-5)
    by_time = [v["mean"] for name, v in found.items() if name.startswith("accuracy, times")]
    page = (out / "report.html").read_text()
    if kind == "clip":
        assert by_time == []
        assert "Accuracy by time" not in page
    else:
        assert len(by_time) == 3
        # Least noise first.
        assert by_time[0] > 0.9
        assert page.count("Accuracy by time") >= 2
        assert "data:image/png;base64," in page
    assert "<script" not in page
    assert "build_scorer" in (out / "model" / "README.md").read_text() or kind != "clip"
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if kind == "clip":
        options = {"name_or_path": str(out / "model"), "device": "cpu"}
        scorer = build_scorer({"name": "pickscore", "options": options})
        images = [scorer_material.picture(bright, 500 + bright) for bright in (True, False)]
        light, dark = scorer(images, ["cat number 99"] * 2).tolist()
        assert light > dark
    elif kind == "step":
        assert load_step_scorer(out / "model").image_size == scorer_material.SIDE
    else:
        assert load_latent_reward(out / "model").guidance == 7.5


class Stops(train_image_scorer.StopSignal):
    """A signal after the second step."""

    number = 15

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls == 2


@pytest.mark.parametrize("kind", ["clip", "step", "latent"])
def test_a_stopped_run_goes_on_to_the_same_weights_losses_and_results(material, tmp_path, monkeypatch, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_image_scorer.main(arguments(material, whole, kind)) == 0
    monkeypatch.setattr(train_image_scorer, "StopSignal", Stops)
    assert train_image_scorer.main(arguments(material, parts, kind)) == 128 + 15
    assert not (parts / "model").exists()
    monkeypatch.undo()
    assert [e["step"] for e in events(parts, "train")] == [1, 2]
    assert train_image_scorer.main(arguments(material, parts, kind)) == 0
    assert losses(parts) == losses(whole)
    assert weights(parts, 4) == weights(whole, 4)
    assert results(parts) == results(whole)
    # Frozen models are in no checkpoint.
    assert b"up_blocks" not in weights(whole, 4)[:200_000]


def test_the_cut_into_micro_batches_changes_nothing_but_rounding(material, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out, size in ((whole, 8), (cut, 3)):
        args = arguments(material, out, "step", optim__micro_batch_size=size, optim__num_steps=2)
        assert train_image_scorer.main(args) == 0
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-3)


def test_the_saved_configuration_given_back_repeats_the_run(material, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_image_scorer.main(arguments(material, first, "latent", optim__num_steps=2)) == 0
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["scorer"]["type"] == "latent"
    args = ["--config", str(first / "config.yaml"), "--run.output_dir", str(second)]
    assert train_image_scorer.main(args) == 0
    assert weights(second, 2) == weights(first, 2)


def read(name):
    path = RECIPES / f"{name}.yaml"
    return parse(ScorerTrainingConfig, ["--config", str(path)], prog="train_image_scorer", doc="A recipe.")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_read_as_it_stands(name):
    config = read(name)
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    assert config.run.output_dir == f"runs/{name}"
    assert config.optim.batch_size % config.optim.micro_batch_size == 0
    assert config.scorer.weigh == "prompts"
    assert config.chosen_objective().terms().slots() == ()
    if name in ONLINE:
        judged = (RECIPES / "online" / f"{ONLINE[name]}.yaml").read_text()
        assert f"reward: runs/{name}/model" in judged


def test_the_recipes_have_the_published_settings():
    pick, sd15, sdxl, latent = (read(name) for name in NAMES)
    assert (pick.optim.lr, pick.optim.batch_size, pick.optim.num_steps) == (3e-6, 128, 4000)
    assert pick.optim.warmup * pick.optim.num_steps == 500
    assert (sd15.optim.lr, sd15.optim.weight_decay, sd15.optim.num_steps) == (3e-6, 0.3, 8000)
    assert (sdxl.optim.lr, sdxl.optim.weight_decay, sdxl.optim.num_steps) == (1e-6, 0.3, 7000)
    assert {c.scorer.strength_of_guidance() for c in (sd15, sdxl)} == {5.0}
    assert latent.scorer.strength_of_guidance() == 7.5
    assert latent.noise.values == list(range(1, 952, 50))
    assert {c.optim.precision for c in (pick, sd15, sdxl, latent)} == {"bf16"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_two_steps_on_tiny_models(material, tmp_path, name):
    config, out = read(name), tmp_path / "run"
    changes = {
        "config": RECIPES / f"{name}.yaml",
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "optim.num_steps": 2,
        "run.output_dir": out,
        "run.log_every": 1,
        "scorer.time_bins": 2,
    }
    if config.scorer.clip is not None:
        changes |= {"scorer.clip": material / "clip", "scorer.processor": "null"}
    if config.pictures is not None:
        changes |= {"pictures.source": material / "splits"}
    else:
        family = "sd15" if "sd15" in name else "sdxl"
        stored = family if config.model.variant is None else f"{family}-fp16"
        changes |= {
            "model.name_or_path": material / stored,
            "data.source": material / f"pairs-{family}",
            "data.eval_share": 0.3,
        }
    assert train_image_scorer.main(words(changes)) == 0
    assert [e["step"] for e in events(out, "train")] == [1, 2]
    assert all(e["grad_norm"] > 0 for e in events(out, "train"))
    assert (out / "report.html").is_file()
    assert {p.suffix for p in (out / "model").glob("*.safetensors")} == {".safetensors"}
    assert torch.isfinite(torch.tensor(losses(out))).all()


REFUSED = [
    ("step", {"model__name_or_path": "no-such-folder/x/"}, "model.name_or_path"),
    ("step", {"pictures__source": "x"}, "scorer.type=step does not use pictures"),
    ("clip", {"scorer__guidance": 2.0}, "scorer.type=clip does not use scorer.guidance"),
    ("clip", {"pictures__source": "/no/such"}, "does not exist"),
    ("clip", {"pictures__ties": "drop", "pictures__keep": "[margin]"}, "has no margin"),
    ("clip", {"scorer__clip": "/no/such"}, "scorer.processor: cannot load the image processor"),
    ("step", {"data__source": "/no/such"}, "no encoded data set"),
    ("step", {"noise__values": "[5000]"}, "noise.values has 5000"),
    ("latent", {"model__dtype": "float16"}, "model.dtype=float16 has too few bits"),
    ("latent", {"optim__lr": -1}, "optim.lr=-1.0 must be positive"),
    ("latent", {"scorer__typ": "clip"}, "scorer"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_a_users_mistake_ends_in_one_line(material, tmp_path, capsys, kind, changes, message):
    with pytest.raises(SystemExit) as left:
        train_image_scorer.main(arguments(material, tmp_path / "run", kind, **changes))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert message in lines[-1]
    assert not (tmp_path / "run" / "model").exists()


def test_another_setting_is_refused_on_resuming_and_named(material, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_image_scorer.main(arguments(material, out, "latent", optim__num_steps=2)) == 0
    with pytest.raises(SystemExit):
        train_image_scorer.main(arguments(material, out, "latent", optim__num_steps=2, scorer__weigh="pairs"))
    assert "scorer.weigh: 'prompts' in the checkpoint, 'pairs' now" in capsys.readouterr().err
