import random
from pathlib import Path

import pytest
import torch

from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import leave_one_out
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.tokenise import TokeniseConfig, tokenise
from triptych.scripts import tokenise_items
from triptych.training.quarantine import Quarantine

RECIPES = Path(tokenise_items.__file__).parent / "recipes" / "recsys_ids"


def events(path):
    """Users who walk along a circle of items, with an item that only a held-out event has."""
    choice, lines = random.Random(0), ["user,item,timestamp"]
    for u in range(25):
        start = choice.randrange(20)
        lines += [f"p{u},film {(start + t) % 20},{t}" for t in range(9)]
    lines.append("p0,film new,99")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("method", ["balanced", "kmeans", "rq_vae"])
def test_ids_are_made_written_and_read_again(tmp_path, capsys, method):
    words = ["--data.source", str(events(tmp_path / "events.csv")), "--output", str(tmp_path / "out")]
    make = ["--make.method", method, "--make.dim", "6", "--make.levels", "2", "--make.codebook_size", "4"]
    assert tokenise_items.main([*words, *make]) == 0
    said = capsys.readouterr().out
    assert "relative MSE" in said
    ids = SemanticIds.read(tmp_path / "out" / "index.json")
    assert len(ids.items) == 21
    assert "film new" in ids.items
    assert len(ids.codes_IL.unique(dim=0)) == 21
    report = (tmp_path / "out" / "report.html").read_text()
    for text in ("Items that share their first code", "Items a code", "film 3", "level 2"):
        assert text in report
    tokenise_items.main([*words, *make])
    again = SemanticIds.read(tmp_path / "out" / "index.json")
    assert torch.equal(again.codes_IL, ids.codes_IL)


def test_what_is_written_is_what_was_made_of_the_training_events(tmp_path):
    path = events(tmp_path / "events.csv")
    words = ["--data.source", str(path), "--output", str(tmp_path / "out"), "--make.dim", "6"]
    tokenise_items.main([*words, "--make.codebook_size", "4"])
    loaded = load_interactions(DataConfig(source=str(path)), quarantine=Quarantine(), report=print)
    made, *_ = tokenise(leave_one_out(loaded).train, TokeniseConfig(dim=6, codebook_size=4), print)
    read = SemanticIds.read(tmp_path / "out" / "index.json", loaded.items)
    assert read.items == made.items
    assert torch.equal(read.codes_IL, made.codes_IL)


@pytest.mark.parametrize("method", ["balanced", "rq_vae"])
def test_held_out_events_take_no_part(tmp_path, method):
    lines = events(tmp_path / "events.csv").read_text().splitlines()
    written = []
    for turn in (0, 5):
        # The last two events of the users from p5 on are of other items, which all stand in lines above.
        other = []
        for line in lines:
            user, item, time = line.split(",")
            if user not in ("user", "p0", "p1", "p2", "p3", "p4") and int(time) >= 7:
                item = f"film {(int(item.split()[1]) + turn) % 20}"
            other.append(f"{user},{item},{time}")
        (tmp_path / "events.csv").write_text("\n".join(other) + "\n")
        words = ["--data.source", str(tmp_path / "events.csv"), "--output", str(tmp_path / "out")]
        tokenise_items.main([*words, "--make.method", method, "--make.dim", "6", "--make.codebook_size", "4"])
        written.append((tmp_path / "out" / "index.json").read_text())
    assert other != lines
    assert written[0] == written[1]


def test_rows_left_out_are_said(tmp_path, capsys):
    path = events(tmp_path / "events.csv")
    path.write_text(path.read_text() + "p1,,3\n")
    tokenise_items.main(
        ["--data.source", str(path), "--output", str(tmp_path / "out"), "--make.codebook_size", "4"]
    )
    assert "1 record left out: 1 is empty" in capsys.readouterr().out
    assert "is empty" in (tmp_path / "out" / "report.html").read_text()


def test_the_recipe_runs(tmp_path, capsys):
    words = ["--data.source", str(events(tmp_path / "events.csv")), "--output", str(tmp_path / "out")]
    assert tokenise_items.main(["--config", str(RECIPES / "movielens_tokenise.yaml"), *words]) == 0
    # 64 codes asked for, 21 items there are.
    assert "semantic ids: 21x21x21" in capsys.readouterr().out
    assert len(SemanticIds.read(tmp_path / "out" / "index.json").items) == 21


def test_a_setting_of_another_method_is_refused_in_one_line(tmp_path, capsys):
    words = ["--data.source", str(events(tmp_path / "events.csv")), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        tokenise_items.main([*words, "--make.method", "kmeans", "--make.rq_vae.latent", "8"])
    assert "ids.make.rq_vae is of method rq_vae, not of kmeans" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tokenise_items.main([*words, "--shown", "-1"])
    assert "shown=-1 must be at least 0" in capsys.readouterr().err
