import random

import pytest
import torch

from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.scripts import tokenise_items


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


def test_a_setting_of_another_method_is_refused_in_one_line(tmp_path, capsys):
    words = ["--data.source", str(events(tmp_path / "events.csv")), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        tokenise_items.main([*words, "--make.method", "kmeans", "--make.rq_vae.latent", "8"])
    assert "ids.make.rq_vae is of method rq_vae, not of kmeans" in capsys.readouterr().err
