"""Every recipe of the diffusion panel, as it stands and for two steps on a tiny model of its family."""

import math

import image_material
import pytest
import torch
import yaml
from image_material import RECIPES

from triptych.modalities.diffusion.encoding import EncodeConfig
from triptych.modalities.diffusion.persons import Users
from triptych.modalities.diffusion.setup import DiffusionConfig
from triptych.modalities.diffusion.shards import EncodedDataset
from triptych.objectives import spec
from triptych.scripts import train_diffusion
from triptych.scripts.common import parse

ALL = sorted(RECIPES.glob("*.yaml"))
SECTIONS = {p: set(yaml.safe_load(p.read_text())) for p in ALL}
# Recipes of train_diffusion; others draw and label first, or train a scorer.
TRAIN = [p for p, has in SECTIONS.items() if {"data", "objective"} <= has and not has & {"scorer", "label"}]
ENCODE = [p for p in ALL if p.stem.startswith("encode_")]
# The loss of an untrained policy: -log sigmoid(0), 1 - sigmoid(0); the others' depends on the data.
AT_THE_START = {"dpo": math.log(2), "rank_dpo": math.log(2), "kto": 0.5}


def read(path, config_type=DiffusionConfig):
    return parse(config_type, ["--config", str(path)], prog="train_diffusion", doc="A recipe.")


def family_of(path):
    return next((f for f in ("sd15", "sd3", "sdxl") if path.stem.startswith(f)), "sdxl")


def write_users(data, path):
    """Vectors of everybody whose pairs were encoded."""
    groups = set(EncodedDataset(data).column("group").to_pylist()) - {None}
    assert len(groups) > 1
    Users({name: torch.randn(2, 6) for name in sorted(groups)}).save(path)
    return path


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny pipeline of each family, and data encoded for each; for SDXL lists, too."""
    folder = tmp_path_factory.mktemp("recipes")
    pairs = image_material.write_pairs(folder / "pickapic")
    lists = image_material.write_lists(folder / "ranked")
    with image_material.aside(folder):
        for family in ("sd15", "sdxl", "sd3"):
            model = image_material.write_model(folder / family, family)
            image_material.encode(model, pairs, folder / f"pairs-{family}")
        image_material.encode(folder / "sdxl", lists, folder / "lists-sdxl")
    return folder


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_a_recipe_is_read_as_it_stands_and_its_objective_is_built(path):
    config = read(path)
    assert config.objective.terms().main.objective.spec.name == spec(config.objective.name).name
    # The demo's recipe works in the demo's folder.
    in_the_demo = config.run.output_dir.startswith("runs/demo/images/")
    assert in_the_demo if "demo" in config.data.source else config.run.output_dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")
    # The name says what is trained, and how.
    assert (config.objective.name.replace("_", "") if config.model.persons is None else "ppd") in path.stem
    assert path.stem.endswith("_full") <= (config.model.lora is None)
    assert path.stem.endswith("_lora") <= (config.model.lora is not None)


@pytest.mark.parametrize("path", ENCODE, ids=lambda p: p.stem)
def test_a_recipe_of_the_offline_step_is_read_as_it_stands(path):
    config = read(path, EncodeConfig)
    assert path.read_text().startswith("# ")
    # What it writes is what the recipes of training read.
    assert config.output_dir in {read(p).data.source for p in TRAIN}


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_a_recipe_runs_two_steps_on_a_tiny_model_of_its_family(path, material, tmp_path):
    config, family, out = read(path), family_of(path), tmp_path / "run"
    data = f"lists-{family}" if config.data.form == "lists" else f"pairs-{family}"
    changes = {
        "optim__num_steps": 2,
        "sample__num_prompts": min(config.sample.num_prompts, 1),
        # Where nothing is held out, nothing is here.
        "data__eval_share": 0.3 if config.data.eval_share else 0.0,
    }
    if config.model.variant is None and family == "sdxl":
        changes["model__variant"] = "fp16"
    if config.model.persons is not None:
        changes["model__persons__users"] = write_users(material / data, tmp_path / "users.safetensors")
    args = image_material.arguments(path.stem, material, out, data=data, family=family, **changes)
    assert train_diffusion.main(args) == 0
    steps = image_material.events(out, "train")
    assert [e["step"] for e in steps] == [1, 2]
    assert all(e["grad_norm"] > 0 for e in steps)
    if config.objective.name in AT_THE_START:
        assert steps[0]["loss"] == pytest.approx(AT_THE_START[config.objective.name], abs=1e-6)
    assert bool(image_material.events(out, "eval")) == bool(config.sample.num_prompts)
    assert (out / "report.html").is_file()
    assert len(list((out / "samples" / "base").glob("*.png"))) == config.sample.num_per_prompt


def test_there_are_recipes_of_every_family_and_method():
    assert {family_of(p) for p in TRAIN} == {"sd15", "sdxl", "sd3"}
    assert {read(p).objective.name for p in TRAIN} >= {"dpo", "rank_dpo", "mapo", "kto", "sft"}
    assert ENCODE
