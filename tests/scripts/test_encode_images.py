import signal

import encode_cases
import pytest

from triptych.modalities.diffusion import parts
from triptych.modalities.diffusion.shards import EncodedDataset
from triptych.scripts import encode_images


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny SDXL pipeline and two parquet files as Pick-a-Pic's, with a tie and a broken image."""
    folder = tmp_path_factory.mktemp("material")
    encode_cases.write_model(folder / "sdxl")
    rows = encode_cases.many_rows(10)
    rows[2]["label_0"] = rows[2]["label_1"] = 0.5
    rows[4]["jpg_1"] = b"no image"
    rows[5]["caption"] = "b" * 40
    encode_cases.write_parquet(folder / "pickapic" / "train-0.parquet", rows[:5])
    encode_cases.write_parquet(folder / "pickapic" / "train-1.parquet", rows[5:])
    return folder


def command(material, out, *more):
    source = str(material / "pickapic" / "*.parquet")
    given = {
        "model.name_or_path": material / "sdxl",
        "data.source": source,
        "output_dir": out,
        "bucket_step": 8,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


def test_the_command_of_the_readme_encodes_and_says_what_it_made(material, tmp_path, capsys):
    out = tmp_path / "encoded"
    assert encode_images.main(command(material, out)) == 0
    data = EncodedDataset(out)
    assert data.num_records == 8
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"{out}: 8 contexts (8 pair) for sdxl"
    assert lines[1].startswith("latents: 16 images (")
    assert lines[2].endswith("an image, prompts included")
    assert lines[3] == "persons or groups: named by 8 contexts"
    assert lines[4] == "prompts longer than CLIP reads: 1, read up to there"
    assert lines[5].startswith("3 records left out: 1 is a tie (first at train-0.parquet[2])")
    assert "layout pickapic (detected), 2 files" in said.err
    assert "encode 10/10 (100 %)" in said.err
    assert (out / "config.yaml").is_file()
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 3


def test_its_configuration_is_a_recipe_that_gives_the_same_data(material, tmp_path):
    assert encode_images.main(command(material, tmp_path / "a", "--flip", "0.5", "--crop", "random")) == 0
    config = ["--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")]
    assert encode_images.main(config) == 0
    one, two = (encode_cases.tree(tmp_path / name) for name in "ab")
    assert one.pop("config.yaml") != two.pop("config.yaml")
    assert one == two


def test_a_trial_of_the_first_records_says_what_all_would_take(material, tmp_path, capsys):
    assert encode_images.main(command(material, tmp_path / "out", "--data.max_records", "3")) == 0
    assert "all 10 rows would take about" in capsys.readouterr().out


def test_a_signal_stops_it_and_the_same_command_goes_on(material, tmp_path, capsys, monkeypatch):
    real, seen = parts.Part.add, []

    def add(self, cut):
        seen.append(cut)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGTERM)
        real(self, cut)

    more = ("--contexts_per_part", "2")
    monkeypatch.setattr(parts.Part, "add", add)
    assert encode_images.main(command(material, tmp_path / "out", *more)) == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert encode_images.main(command(material, tmp_path / "out", *more)) == 0
    assert encode_images.main(command(material, tmp_path / "whole", *more)) == 0
    one, two = (encode_cases.tree(tmp_path / name) for name in ("out", "whole"))
    assert one.pop("config.yaml") != two.pop("config.yaml")
    assert one == two


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.vae_dtype", "float16"], "float16: SDXL's VAE overflows"),
        (["--data.source", "https://example.org/a.parquet"], "is a URL"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all: does not exist"),
        (["--model.name_or_path", "/nowhere/at/all"], "no such folder"),
        (["--resolution", "100"], "resolution=100 must be a multiple of bucket_step=8"),
        (["--bucketstep", "8"], "did you mean bucket_step?"),
        (["--flip", "2"], "flip=2.0 is a probability"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(material, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        encode_images.main(command(material, tmp_path / "out", *more))
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
