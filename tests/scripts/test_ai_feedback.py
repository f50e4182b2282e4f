import json
import signal
from pathlib import Path

import image_material
import numpy as np
import pytest
import yaml
from image_material import PIXELS, RECIPES, words

from triptych.modalities.diffusion.image_scoring import build_scorer
from triptych.modalities.diffusion.shards import EncodedDataset
from triptych.scripts import ai_feedback, draw_images, encode_images, label_images, train_diffusion
from triptych.scripts.ai_feedback import FeedbackConfig, with_paths
from triptych.scripts.common import parse

OWN = ["openmoji_ai_feedback", "synpic_rankdpo_sdxl", "ai_feedback_dpo_sd15"]
PROMPTS = ["a red cat", "a blue dog", "an old cat", "a red dog", "dogs", "a cow", "two cats", "a blue cat"]
MEASURES = ("redness", "saturation", "brightness")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny pipeline of each family, prompts, and pairs as Pick-a-Pic has them."""
    folder = tmp_path_factory.mktemp("material")
    with image_material.aside(folder):
        for family in ("sd15", "sdxl", "sd3"):
            image_material.write_model(folder / family, family)
        image_material.write_pairs(folder / "pickapic")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    return folder


def painter(material, family, **more):
    variant = {"variant": "fp16"} if family == "sdxl" else {}
    pace = {"num_steps": 2, "height": PIXELS, "width": PIXELS, "guidance": 2.0}
    return {"name_or_path": str(material / family)} | variant | pace | more


def command(recipe, material, out, family, *more, **changes):
    """A recipe's command line with what the size of the stand-ins demands."""
    settings = {
        "config": RECIPES / f"{recipe}.yaml",
        "output_dir": out,
        "label.scorers": yaml.safe_dump(
            {m: {"name": "measure", "options": {"measure": m}} for m in MEASURES}
        ),
        "encode.model.name_or_path": material / family,
        "encode.resolution": PIXELS,
        "encode.bucket_step": 8,
        "train.model.name_or_path": material / family,
        "train.model.dtype": "float32",
        "train.optim.batch_size": 2,
        "train.optim.micro_batch_size": 2,
        "train.optim.num_steps": 2,
        "train.optim.precision": "float32",
        "train.data.eval_share": 0.3,
        "train.run.log_every": 1,
        "train.run.save_every": 1,
        "train.sample.num_prompts": 1,
        "train.sample.num_steps": 2,
    }
    if family == "sdxl":
        settings |= {"encode.model.variant": "fp16", "train.model.variant": "fp16"}
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [*words(settings), *more]


def small(material, out, *more, **changes):
    """The recipe of the project's own model with tiny models in its place."""
    models = {
        "strong": painter(material, "sd15", num_per_prompt=2),
        "weak": painter(material, "sd15", guidance=1.0),
    }
    given = {
        "draw__prompts": material / "prompts.txt",
        "draw__models": yaml.safe_dump(models),
        "label__min_margin": 0,
    }
    return command("openmoji_ai_feedback", material, out, "sd15", *more, **given | changes)


@pytest.fixture
def ran(monkeypatch):
    """The stages that are run, in order."""
    found = []
    for name, script in [
        ("draw", draw_images),
        ("label", label_images),
        ("encode", encode_images),
        ("train", train_diffusion),
    ]:
        real = script.run
        monkeypatch.setattr(
            script, "run", lambda config, name=name, real=real: found.append(name) or real(config)
        )
    return found


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def read(recipe, *more):
    args = with_paths(["--config", str(RECIPES / f"{recipe}.yaml"), *more])
    return parse(FeedbackConfig, args, prog="ai_feedback", doc="A recipe.")


@pytest.mark.parametrize("recipe", OWN)
def test_a_recipe_is_read_as_it_stands_and_its_scorers_and_objective_are_built(recipe):
    config = read(recipe)
    assert config.output_dir == f"runs/{recipe}"
    assert config.train.run.output_dir == f"runs/{recipe}/run"
    assert config.train.objective.terms().main.objective.spec.name == config.train.objective.name
    for plug in config.label.scorers.values():
        build_scorer(plug)
    assert config.encode.model.name_or_path == config.train.model.name_or_path
    assert (config.label.form == "lists") == (config.train.objective.name == "rank_dpo")
    # What the result is judged by is in no label.
    assert "warm_share" not in json.dumps([plug.options for plug in config.label.scorers.values()])


def test_the_published_recipes_train_as_those_on_given_data_do():
    def training(name, section):
        found = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
        return {k: (found["train"] if section else found)[k] for k in ("model", "objective", "optim")}

    assert training("synpic_rankdpo_sdxl", True) == training("sdxl_rankdpo", False)
    published = training("sd15_dpo", False)
    published["optim"] |= {"num_steps": 1000}
    assert training("ai_feedback_dpo_sd15", True) == published


def test_paths_between_the_stages_come_from_one_folder(tmp_path):
    config = read("openmoji_ai_feedback", "--output_dir", str(tmp_path / "x"))
    pictures, labels, data = (str(tmp_path / "x" / name) for name in ("pictures", "labels", "data"))
    assert (config.draw.output_dir, config.label.data.source) == (pictures, pictures)
    assert (config.label.output_dir, config.encode.data.source) == (labels, labels)
    assert (config.encode.output_dir, config.train.data.source) == (data, data)
    config = read("ai_feedback_dpo_sd15", f"--output_dir={tmp_path}")
    assert (config.draw, config.label.data.source) == (None, "data/pickapic_v2")
    assert config.train.run.output_dir == str(tmp_path / "run")
    # A recipe may put a stage elsewhere, as long as the next one finds it.
    config = read("openmoji_ai_feedback", "--train.run.output_dir", "elsewhere")
    assert config.train.run.output_dir == "elsewhere"


def test_it_draws_labels_encodes_and_trains_and_then_has_nothing_left_to_do(material, tmp_path, ran, capsys):
    out = tmp_path / "out"
    assert ai_feedback.main(small(material, out, "--stop_after", "label")) == 0
    assert ran == ["draw", "label"]
    assert [row["prompt"] for row in rows_of(out / "pictures")] == PROMPTS
    labels = rows_of(out / "labels")
    assert {"chosen", "rejected", "strength", "phi"} <= labels[0].keys()
    capsys.readouterr()
    assert ai_feedback.main(small(material, out)) == 0
    assert ran == ["draw", "label", "encode", "train"]
    said = capsys.readouterr().err
    assert f"draw: complete, {out / 'pictures'}" in said
    assert f"label: complete, {out / 'labels'}" in said
    data = EncodedDataset(out / "data")
    assert data.num_records == len(labels)
    # The labels reach the encoded data.
    assert data.record(0)["strength"] == pytest.approx(labels[0]["strength"])
    assert [e["step"] for e in image_material.events(out / "run", "train")] == [1, 2]
    assert (out / "run" / "report.html").is_file()
    assert ai_feedback.main(small(material, out)) == 0
    assert ran == ["draw", "label", "encode", "train"]
    # How many at a time changes nothing that was made.
    assert ai_feedback.main(small(material, out, "--label.batch_size", "5", "--stop_after", "encode")) == 0
    assert ran == ["draw", "label", "encode", "train"]


def test_other_labels_are_made_and_encoded_anew_without_drawing_or_scoring(
    material, tmp_path, ran, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert ai_feedback.main(small(material, out, "--stop_after", "encode")) == 0
    margins = [row["margin"] for row in rows_of(out / "labels")]
    best = margins.count(max(margins))
    assert best < len(margins)
    monkeypatch.setattr(label_images, "scores_of_images", lambda *args: pytest.fail("scored again"))
    again = small(material, out, "--stop_after", "encode", label__min_margin=max(margins))
    assert ai_feedback.main(again) == 0
    assert ran == ["draw", "label", "encode", "label", "encode"]
    assert "was made of other labels or settings and is made anew" in capsys.readouterr().err
    assert len(rows_of(out / "labels")) == EncodedDataset(out / "data").num_records == best


@pytest.mark.parametrize("stage", ["draw", "label", "encode"])
def test_a_stage_that_was_interrupted_goes_on(material, tmp_path, stage, ran, monkeypatch):
    out = tmp_path / "out"
    place, name = {
        "draw": (draw_images, "generate"),
        "label": (label_images, "scores_of_images"),
        "encode": (encode_images, "load_encoders"),
    }[stage]
    real, calls = getattr(place, name), []

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(place, name, interrupted)
    last = ["--stop_after", stage]
    assert ai_feedback.main(small(material, out, *last)) == 128 + signal.SIGTERM
    begun = list(ran)
    assert begun[-1] == stage
    assert ai_feedback.main(small(material, out, *last)) == 0
    assert ran == [*begun, stage]
    assert ai_feedback.main(small(material, out, *last)) == 0
    assert ran == [*begun, stage]


def test_lists_of_several_families_are_ranked(material, tmp_path):
    """Syn-Pic's recipe: three families draw, measures vote, rank_dpo learns."""
    models = {
        "sdxl": painter(material, "sdxl"),
        "sd3": painter(material, "sd3"),
        "sd15": painter(material, "sd15"),
    }
    changes = {"draw__prompts": material / "prompts.txt", "draw__models": yaml.safe_dump(models)}
    args = command("synpic_rankdpo_sdxl", material, tmp_path, "sdxl", **changes)
    assert ai_feedback.main(args) == 0
    rows = rows_of(tmp_path / "labels")
    assert all(len(row["images"]) == 3 and set(row["by_scorer"]) == set(MEASURES) for row in rows)
    data = EncodedDataset(tmp_path / "data")
    assert data.record(0)["relevance"] == pytest.approx(rows[0]["phi"])
    first = image_material.losses(tmp_path / "run")[0]
    # Normalised weights sum to one, and at the start every comparison costs log 2.
    assert first == pytest.approx(np.log(2), abs=1e-6)


def test_pairs_of_persons_become_a_scorers(material, tmp_path):
    """The AI-feedback form of Diffusion-DPO: given pairs, one scorer, all weights."""
    scorer = yaml.safe_dump({"pickscore": {"name": "measure", "options": {"measure": "redness"}}})
    changes = {"label__data__source": material / "pickapic", "label__scorers": scorer}
    assert ai_feedback.main(command("ai_feedback_dpo_sd15", material, tmp_path, "sd15", **changes)) == 0
    rows = rows_of(tmp_path / "labels")
    # Two ties of persons among them.
    assert len(rows) == image_material.NUM_PAIRS
    assert all(row["by_scorer"]["pickscore"][0] > row["by_scorer"]["pickscore"][1] for row in rows)
    assert image_material.losses(tmp_path / "run")[0] == pytest.approx(np.log(2), abs=1e-6)


def test_several_processes_may_train_only(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        ai_feedback.main(small(material, tmp_path / "out"))
    assert "draw runs as one process: first, without torchrun, --stop_after encode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label.by", "nobody"], "by=nobody is not one of votes, mean, bright"),
        (["--encode.data.source", "other"], "encode.data.source=other is not label.output_dir="),
        (["--label.data.source", "other"], "label.data.source=other is not draw.output_dir="),
        (["--stop_after", "nothing"], "stop_after"),
        (["--train.optim.learning_rate", "1"], "learning_rate"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        ai_feedback.main(["--config", str(RECIPES / "openmoji_ai_feedback.yaml"), *more])
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_without_a_folder_or_a_recipe_it_says_so(tmp_path, capsys):
    for args, message in (
        ([], "output_dir is not given"),
        (["--config", str(tmp_path / "no.yaml"), "--output_dir", "x"], "no.yaml"),
    ):
        with pytest.raises(SystemExit):
            ai_feedback.main(args)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        ai_feedback.main(["--help"])
    assert ended.value.code == 0
    assert Path(ai_feedback.__file__).is_file()
