import json
import signal

import image_material
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import PIXELS, tiny_sd3, tiny_sd15, write_pipeline

from triptych.modalities.diffusion.rollout import Sampling, generate
from triptych.scripts import draw_images
from triptych.scripts.draw_images import content_of

PROMPTS = ["a red cat", "a blue dog", "an old cat", "a red dog", "dogs"]
PACE = f"num_steps: 2, height: {PIXELS}, width: {PIXELS}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny pipelines of different families, and a file of prompts."""
    folder = tmp_path_factory.mktemp("models")
    write_pipeline(tiny_sd15(), folder / "old")
    write_pipeline(tiny_sd3(), folder / "flow")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]), "utf-8")
    return folder


def entries(models, **changes):
    """`old` draws two pictures of a prompt with guidance, two prompts a batch; `flow` one, without."""
    found = {
        "old": f"name_or_path: {models / 'old'}, num_per_prompt: 2, guidance: 3.0, batch_size: 4, {PACE}",
        "flow": f"name_or_path: {models / 'flow'}, guidance: 1.0, {PACE}",
    }
    found |= changes
    return "{" + ", ".join(f"{name}: {{{entry}}}" for name, entry in found.items() if entry) + "}"


def command(models, out, *more, **changes):
    given = ["--prompts", str(models / "prompts.txt"), "--models", entries(models, **changes)]
    return [*given, "--output_dir", str(out), *more]


def tree(folder):
    """All files by relative path but those that name the folder itself."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def rows_of(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "a"
    with image_material.aside(out.parent):
        assert draw_images.main(command(models, out)) == 0
    return out


def test_every_prompt_has_its_pictures_of_every_model(drawn):
    rows = rows_of(drawn)
    assert [row["prompt"] for row in rows] == PROMPTS
    for i, row in enumerate(rows):
        assert row["models"] == ["old", "old", "flow"]
        files = [f"images/old/{i:06d}-00.png", f"images/old/{i:06d}-01.png", f"images/flow/{i:06d}-00.png"]
        assert row["images"] == files
        # The k-th picture of a prompt has the same noise whoever draws it, and no other prompt has it.
        assert row["seeds"][0] == row["seeds"][2] != row["seeds"][1]
        assert pixels(drawn / files[0]).shape == (PIXELS, PIXELS, 3)
    assert len({seed for row in rows for seed in row["seeds"]}) == 2 * len(PROMPTS)
    assert len({data for name, data in tree(drawn).items() if name.endswith(".png")}) == 3 * len(PROMPTS)


def test_the_seed_in_the_list_is_that_of_the_pictures_noise(drawn):
    """Its generator, given to the pipeline itself, gives the picture."""
    row = rows_of(drawn)[3]
    pipeline = tiny_sd15()
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        row["prompt"],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=PIXELS,
        width=PIXELS,
        generator=torch.Generator().manual_seed(row["seeds"][1]),
    ).images[0]
    drawn_one = pixels(drawn / row["images"][1])
    assert np.abs(drawn_one - np.asarray(found, dtype=int)).max() <= 1
    # They are those that `generate` gives for the whole list.
    whole = generate(
        pipeline, PROMPTS, Sampling(num_steps=2, guidance=3.0, num_per_prompt=2, height=PIXELS, width=PIXELS)
    )
    assert np.abs(drawn_one - np.asarray(whole[7], dtype=int)).max() <= 1


def test_one_model_is_loaded_at_a_time_and_none_where_all_is_there(models, tmp_path, monkeypatch, capsys):
    real, loaded = draw_images.load_pipeline, []
    monkeypatch.setattr(draw_images, "load_pipeline", lambda *a: loaded.append(a[0]) or real(*a))
    out = tmp_path / "out"
    assert draw_images.main(command(models, out)) == 0
    assert loaded == [str(models / "old"), str(models / "flow")]
    before = tree(out)
    assert draw_images.main(command(models, out)) == 0
    assert len(loaded) == 2
    assert tree(out) == before
    said = capsys.readouterr()
    assert "old: all 10 pictures are there" in said.err
    assert "draw old 10/10 (100 %)" in said.err
    assert f"{out}: 15 pictures of 5 prompts by old, flow" in said.out


def test_a_signal_stops_it_and_the_same_command_gives_the_same_files(
    models, drawn, tmp_path, monkeypatch, capsys
):
    real, calls = draw_images.generate, []

    def generate(*args, **options):
        calls.append(options["first"])
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    out = tmp_path / "out"
    monkeypatch.setattr(draw_images, "generate", generate)
    assert draw_images.main(command(models, out)) == 128 + signal.SIGTERM
    assert "the same command draws the pictures that are missing" in capsys.readouterr().err
    assert calls == [0, 2]
    assert not (out / "metadata.jsonl").exists()
    assert len(list((out / "images" / "old").glob("*.png"))) == 8
    # A kill in the middle of a batch leaves some of its pictures, and half of one under another name.
    (out / "images" / "old" / "000003-01.png").unlink()
    (out / "images" / "old" / ".tmp-000003-01.png").write_bytes(b"half")
    assert draw_images.main(command(models, out)) == 0
    assert calls[2:] == [2, 4, 0]
    assert tree(out) == tree(drawn)


def test_another_model_is_added_without_drawing_the_others_again(models, drawn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert draw_images.main(command(models, out, flow="")) == 0
    real, loaded = draw_images.load_pipeline, []
    monkeypatch.setattr(draw_images, "load_pipeline", lambda *a: loaded.append(a[0]) or real(*a))
    assert draw_images.main(command(models, out)) == 0
    assert loaded == [str(models / "flow")]
    assert tree(out) == tree(drawn)


def test_other_settings_are_not_mixed_with_pictures_that_are_there(models, drawn, capsys):
    other = f"name_or_path: {models / 'old'}, num_per_prompt: 2, guidance: 4.0, batch_size: 4, {PACE}"
    with pytest.raises(SystemExit):
        draw_images.main(command(models, drawn, old=other))
    assert "images/old holds pictures of another drawing (guidance differ)" in capsys.readouterr().err
    # How many at a time is no such setting.
    same = f"name_or_path: {models / 'old'}, num_per_prompt: 2, guidance: 3.0, batch_size: 9, {PACE}"
    assert draw_images.main(command(models, drawn, old=same)) == 0


def test_prompts_are_spread_over_the_file(models, tmp_path):
    config = draw_images.DrawConfig(
        prompts=str(models / "prompts.txt"),
        models={"m": draw_images.PainterConfig(name_or_path="x", num_per_prompt=2)},
        output_dir="out",
        max_prompts=2,
    )
    assert config.texts() == [PROMPTS[0], PROMPTS[2]]


def test_content_of_a_path_is_what_it_holds_wherever_it_lies(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("one" if name != "c" else "two")
    a, b, c = (content_of(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert content_of(str(tmp_path / "a" / "x.txt")) != ""
    assert content_of("stabilityai/stable-diffusion-xl-base-1.0") == ""


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ((), {"old": ""}, "models draw 1 pictures of each prompt"),
        ((), {"flow": "name_or_path: /nowhere/at/all"}, "no such folder"),
        ((), {"../up": "name_or_path: x"}, "'../up' is no name of letters"),
        ((), {"flow": "name_or_path: x, num_steps: 0"}, "num_steps=0 must be at least 1"),
        (("--max_prompts", "0"), {}, "max_prompts=0 must be at least 1"),
        (("--prompts", "/nowhere.txt"), {}, "there is no such file of prompts"),
        (("--seeds", "1"), {}, "did you mean seed?"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(models, tmp_path, capsys, more, changes, message):
    with pytest.raises(SystemExit) as ended:
        draw_images.main(command(models, tmp_path / "out", *more, **changes))
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
