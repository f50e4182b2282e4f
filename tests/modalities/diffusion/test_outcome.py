import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import learner_of, make_run, move, no_bar

from triptych.modalities.diffusion.export import KOHYA_FILE, LORA_FILE
from triptych.modalities.diffusion.gallery import Gallery, Pictures, Studio, sample_base
from triptych.modalities.diffusion.measures import brightness, redness
from triptych.modalities.diffusion.outcome import HeldOutDrift, finish, held_out_table
from triptych.modalities.diffusion.picture_report import judge, snippet
from triptych.modalities.diffusion.rollout import generate
from triptych.training.quarantine import Quarantine


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


ROWS = {
    "loss": double(0.5, 0.7, 0.6, 0.8),
    "rewards/accuracies": double(1, 0, 1, 0.5),
    "rewards/margins": double(0.4, -0.2, 0.3, 0),
    "ranking/accuracy": double(1, 0, 1, 1),
    "ranking/reference": double(0, 0, 1, 1),
}


def test_the_held_out_table_has_the_means_worked_by_hand():
    table, results = held_out_table(ROWS, ["a", "b", "c", "d"])
    rows = {line[0]: line[1:] for line in table.rows}
    assert list(rows) == ["reward accuracy", "ELBO ranking accuracy", "reward margin", "loss"]
    base, aligned, difference = rows["reward accuracy"]
    assert (base, aligned.mean, difference) == (0.5, 0.625, None)
    base, aligned, difference = rows["ELBO ranking accuracy"]
    assert (base.mean, aligned.mean, difference.mean) == (0.5, 0.75, 0.25)
    assert rows["reward margin"][1].mean == pytest.approx(0.125)
    assert rows["loss"][1].mean == pytest.approx(0.65)
    assert results["ELBO ranking accuracy, aligned - base"].mean == 0.25
    assert table.note.startswith("4 held-out samples")
    assert "its own reference" in table.note
    free, _ = held_out_table(ROWS, ["a", "b", "c", "d"], referenced=False)
    assert free.rows[0][:2] == ["reward accuracy", None]
    assert "its own reference" not in free.note


def test_intervals_are_over_clusters_and_lists_have_their_own_lines():
    lists = {"loss": ROWS["loss"], "ranking/top1": double(1, 1, 0, 1), "ranking/ndcg": double(1, 0.8, 0.6, 1)}
    table, results = held_out_table(lists | {"rewards/accuracies": ROWS["rewards/accuracies"]}, list("aabb"))
    assert [line[0] for line in table.rows] == ["reward accuracy", "top-1 of lists", "NDCG of lists", "loss"]
    assert results["reward accuracy"].n == 2
    # Cluster means are 0.5 and 0.75.
    assert 0.5 <= results["reward accuracy"].low <= results["reward accuracy"].high <= 0.75


def flat(*colour):
    return Image.new("RGB", (4, 4), colour)


def made(*colours, k=2):
    images = tuple(flat(*c) for c in colours)
    prompts = tuple(f"prompt {i}" for i in range(len(colours) // k))
    return Pictures(prompts, k, images, {"redness": redness(images), "brightness": brightness(images)})


GREY, RED, WHITE, BLACK = (51, 51, 51), (255, 0, 0), (255,) * 3, (0,) * 3


def test_pictures_are_compared_in_pairs_of_one_noise_with_intervals_over_prompts():
    base = made(GREY, GREY, BLACK, WHITE)
    aligned = made(RED, GREY, WHITE, WHITE)
    table, results = judge(base, aligned, drift=0.25, seed=0)
    rows = {line[0]: line[1:] for line in table.rows}
    assert list(rows) == ["redness", "brightness", "diversity", "drift"]
    before, after, gain, higher = rows["redness"]
    assert (before.mean, after.mean, gain.mean) == (0, 0.25, 0.25)
    # One picture of four is redder, three tie: (1 + 3 / 2) / 4. Two prompts are two units.
    assert (higher.mean, gain.n, higher.n) == (0.625, 2, 2)
    assert (gain.low, gain.high) == (0, 0.5)
    assert rows["brightness"][2].mean == pytest.approx((0.299 - 0.2 + 1) / 4)
    # Distances of prompt 0: 0, then sqrt((0.8^2 + 0.2^2 + 0.2^2) / 3); of prompt 1: 1, then 0.
    far = np.sqrt(0.72 / 3)
    assert rows["diversity"][2].mean == pytest.approx((far - 1) / 2)
    assert results["diversity, aligned - base"].n == 2
    assert rows["drift"] == [0.0, 0.25, None, None]
    assert "4 pictures of 2 held-out prompts" in table.note


def test_single_pictures_have_no_diversity_and_an_unknown_drift_no_line():
    table, results = judge(made(GREY, RED, k=1), made(RED, RED, k=1), drift=None, seed=0)
    assert [line[0] for line in table.rows] == ["redness", "brightness"]
    assert set(results) == {"redness, aligned - base", "brightness, aligned - base"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("outcome")


def finished(folder, out, family="sd15", **options):
    """A run that was moved, and looked at once on its way, and what `finish` reported."""
    run, config = make_run(folder, family, measures=["brightness", "warm_share"], **options)
    object.__setattr__(config.run, "output_dir", str(out))
    base = sample_base(Studio(run.scene()), out, report=lambda line: None, bar=no_bar)
    learner, accelerator = learner_of(run, config)
    move(run.policy, by=0.05)
    Gallery(Studio(run.scene()), out, base, no_bar, HeldOutDrift(run)).look(run.policy, 1)
    move(run.policy, by=0.05)
    learner.step = 2
    lines = []
    finish(
        run,
        learner,
        config,
        accelerator,
        quarantine=Quarantine(),
        studio=Studio(run.scene()),
        base=base,
        settings={"model": {"name_or_path": config.model.name_or_path}},
        command="python scripts/train_diffusion.py",
        versions={"torch": "2"},
        report=lines.append,
        bar=no_bar,
    )
    return run, config, lines


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize(("family", "lora"), [("sd15", True), ("sdxl", True), ("sdxl", False), ("sd3", True)])
def test_the_cards_code_loads_the_artefact_and_draws_the_very_pictures_of_the_run(
    folder, tmp_path, monkeypatch, family, lora
):
    _, config, _ = finished(folder, tmp_path, family, lora=lora)
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "use_safetensors=True" in code
    monkeypatch.chdir(tmp_path / "model")
    namespace = {}
    exec(compile(code.rsplit("image = ", 1)[0], "card", "exec"), namespace)
    about = json.loads((tmp_path / "samples" / "step-000002" / "samples.json").read_text("utf-8"))
    kept = [Image.open(tmp_path / "samples" / "step-000002" / f"{i:05d}.png") for i in range(6)]
    drawn = generate(namespace["pipe"], about["prompts"], config.sample.sampling())
    assert np.abs(pixels(drawn) - pixels(kept)).max() <= 1
    base = [Image.open(tmp_path / "samples" / "base" / f"{i:05d}.png") for i in range(6)]
    assert np.abs(pixels(drawn) - pixels(base)).max() > 1
    assert repr(about["prompts"][0]) in code


def test_a_finished_run_leaves_results_artefacts_pictures_and_a_report(folder, tmp_path):
    _, _, lines = finished(folder, tmp_path)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {LORA_FILE, KOHYA_FILE, "README.md"}
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    names = {f"{m}, aligned - base" for m in ("brightness", "warm_share", "diversity")}
    assert set(results) == names | {"reward accuracy", "ELBO ranking accuracy, aligned - base"}
    scores = {}
    for which in ("base", "step-000002"):
        images = [Image.open(tmp_path / "samples" / which / f"{i:05d}.png") for i in range(6)]
        scores[which] = brightness(images)
    gain = results["brightness, aligned - base"]
    assert gain["mean"] == pytest.approx(np.mean(scores["step-000002"]) - np.mean(scores["base"]), abs=1e-6)
    assert gain["n"] == 3
    assert lines[-1].endswith("report.html")
    assert any(line.startswith("  warm_share, aligned - base: ") for line in lines)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "ELBO ranking accuracy" in page
    assert "Pictures on held-out prompts" in page
    row = re.search(r"<tr><th[^>]*><bdi>brightness</bdi></th>(.*?)</tr>", page, re.DOTALL)[1]
    shown = [float(n.replace("\u2212", "-")) for n in re.findall(r"<bdi>([^<]*)</bdi>", row)]
    expected = [np.mean(scores["base"]), np.mean(scores["step-000002"]), gain["mean"]]
    assert shown[:3] == pytest.approx(expected, rel=5e-3)
    pictures = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([\w+/=]+)", page)]
    widths = sorted(Image.open(io.BytesIO(data)).width for data in pictures)
    # Three prompts before and after, magnified to 96 pixels, and a sheet with base, step 1 and aligned.
    assert widths == [96] * 6 + [150 + 20 + 3 * 96 + 2 * 6]


def test_a_run_without_pictures_still_has_results_and_artefacts(folder, tmp_path):
    finished(folder, tmp_path, "sd3", num_prompts=0)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {LORA_FILE, "README.md"}
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert set(results) == {"reward accuracy", "ELBO ranking accuracy, aligned - base"}
    assert "data:image" not in (tmp_path / "report.html").read_text("utf-8")
    assert not (tmp_path / "samples").exists()


def test_the_reports_last_pictures_are_those_of_the_last_look(folder, tmp_path, monkeypatch):
    run, config = make_run(folder)
    object.__setattr__(config.run, "output_dir", str(tmp_path))
    base = sample_base(Studio(run.scene()), tmp_path, report=lambda line: None, bar=no_bar)
    learner, accelerator = learner_of(run, config)
    move(run.policy)
    Gallery(Studio(run.scene()), tmp_path, base, no_bar, HeldOutDrift(run)).look(run.policy, 2)
    learner.step = 2

    def never(*args, **options):
        raise AssertionError("the pictures of the last look are there")

    monkeypatch.setattr("triptych.modalities.diffusion.gallery.generate", never)
    finish(
        run,
        learner,
        config,
        accelerator,
        quarantine=Quarantine(),
        studio=Studio(run.scene()),
        base=base,
        settings={},
        command="",
        versions={},
        report=lambda line: None,
        bar=no_bar,
    )
    assert (tmp_path / "report.html").is_file()


def test_code_names_the_shipped_model_by_its_folder_and_a_prediction_that_was_overruled(folder):
    run, config = make_run(folder, num_prompts=1)
    for name, value in (("name_or_path", "asset:emoji"), ("prediction", "v"), ("revision", "abc")):
        object.__setattr__(config.model, name, value)
    code = snippet(run.scene())
    assert "from_pretrained('assets/emoji', use_safetensors=True, revision='abc')" in code
    assert 'register_to_config(prediction_type="v_prediction")' in code
