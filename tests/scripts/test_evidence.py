"""EVIDENCE.md is what its stored results give, and says what did not hold."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from triptych.scripts import evidence
from triptych.scripts.experiments import EXPERIMENTS, LONG
from triptych.scripts.experiments.common import (
    FAMILIES,
    ROOT,
    Claim,
    Outcome,
    load,
    main,
    over_seeds,
    save,
    verdict,
)


def claim(**changed):
    given = {
        "family": "Online preferences",
        "method": "DPO",
        "paper": "Rafailov et al. 2023, arXiv 2305.18290",
        "statement": "a | b",
        "result": "0.5 [0.4, 0.6]",
        "holds": True,
        "what": "a toy",
        "command": "python -m toy",
    }
    return Claim(**(given | changed))


def outcome(*claims, figure=None):
    return Outcome(claims=claims, figure=figure, caption="A line. More.", seconds=1.25)


def line(figure):
    figure.subplots().plot([0, 1], [1, 2])


@pytest.fixture
def folder(tmp_path):
    assets = tmp_path / "assets" / "evidence"
    other = claim(family="Policy gradients", method="P3O", holds=False)
    save("cyclic_game", outcome(claim(), other, claim(method="IPO", holds=None), figure=line), assets)
    return tmp_path


def test_the_committed_page_is_what_the_committed_results_give():
    if not (ROOT / "EVIDENCE.md").is_file():
        pytest.skip("EVIDENCE.md has not been made")
    assert evidence.main(["--check"]) == 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_registered_experiment_is_a_module_that_names_its_own_command(name):
    found = importlib.util.find_spec(f"triptych.scripts.experiments.{name}")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text("utf-8")
    assert re.search(rf"^    python -m triptych\.scripts\.experiments\.{name}\b", source, re.MULTILINE)
    assert re.search(r"^def run\(\*, seeds: int, quick: bool = False\) -> Outcome:", source, re.MULTILINE)


def test_a_stored_outcome_is_read_back_as_it_was(folder):
    found = load(folder / "assets" / "evidence" / "cyclic_game.json")
    assert [c.holds for c in found.claims] == [True, False, None]
    assert found.claims[0] == claim()
    assert (found.figure, found.seconds, found.caption) == ("cyclic_game.png", 1.2, "A line. More.")
    assert {"torch", "python"} <= found.versions.keys()
    png = (folder / "assets" / "evidence" / "cyclic_game.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_the_page_has_a_table_a_family_with_what_failed_in_it(folder):
    page = evidence.render(evidence.stored(folder / "assets" / "evidence"))
    assert "3 claims: 1 yes, 1 in part, 1 no." in page
    first, second = page.index("## Online preferences"), page.index("## Policy gradients")
    assert FAMILIES.index("Online preferences") < FAMILIES.index("Policy gradients")
    assert first < page.index("**DPO**") < page.index("**IPO**") < second < page.index("**P3O**")
    assert r"**DPO**: a \| b |" in page
    assert "| **no** |" in page
    assert "show relations, not benchmark numbers" in page.replace("\n", " ")
    assert page.count("![A line](assets/evidence/cyclic_game.png)") == 1


def test_every_row_of_every_table_has_as_many_cells_as_its_head(folder):
    page = evidence.render(evidence.stored(folder / "assets" / "evidence"))
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in page.splitlines() if row.startswith("|")]
    assert widths == [7] * 4 + [7] * 3 + [6] * 3


def test_check_fails_until_the_page_is_rendered_and_after_it_was_edited(folder, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "EXPERIMENTS", ("cyclic_game",))
    where = ["--output", str(folder)]
    assert evidence.main(["--check", *where]) == 1
    assert evidence.main(["--render", *where]) == 0
    assert evidence.main(["--check", *where]) == 0
    page = folder / "EVIDENCE.md"
    page.write_text(page.read_text("utf-8").replace("**no**", "**yes**"), "utf-8")
    assert evidence.main(["--check", *where]) == 1
    assert "EVIDENCE.md is not current" in capsys.readouterr().err


def test_check_names_the_results_that_are_not_there(folder, capsys):
    assert evidence.main(["--check", "--output", str(folder)]) == 1
    assert "no stored result of online_ipo" in capsys.readouterr().err


def test_results_of_long_experiments_are_included_and_may_be_absent(folder):
    assets = folder / "assets" / "evidence"
    save(LONG[0], outcome(claim(family="A real language model", method="GRPO")), assets)
    assert "## A real language model" in evidence.render(evidence.stored(assets))


def test_a_result_of_no_experiment_is_refused(folder):
    assets = folder / "assets" / "evidence"
    (assets / "cyclic_game.json").rename(assets / "old_name.json")
    with pytest.raises(ValueError, match="results of old_name, which no experiment writes"):
        evidence.stored(assets)


def test_a_result_whose_figure_is_gone_is_refused(folder):
    assets = folder / "assets" / "evidence"
    (assets / "cyclic_game.png").unlink()
    with pytest.raises(ValueError, match=r"cyclic_game.png is missing; run --only cyclic_game"):
        evidence.stored(assets)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "cyclic_game.json"
    path.write_text(json.dumps({"name": "cyclic_game"}), "utf-8")
    with pytest.raises(ValueError, match=r"cyclic_game\.json is no stored experiment"):
        load(path)


def test_a_family_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="family is 'Games'; valid: Self-play and games, Online"):
        claim(family="Games")


def test_quick_results_never_become_the_evidence(capsys):
    with pytest.raises(SystemExit):
        evidence.main(["--quick", "--output", str(ROOT)])
    assert "--quick results are not evidence" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("toy", lambda **_: outcome(claim()), "doc", ["--quick", "--save"])
    assert "--quick results are not evidence" in capsys.readouterr().err


def test_an_unknown_experiment_is_named_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evidence.main(["--only", "cyclic_gane", "--output", str(tmp_path)])
    assert (
        "there is no experiment 'cyclic_gane'; there are cyclic_game, online_ipo" in capsys.readouterr().err
    )


def test_an_experiment_prints_its_claims_and_stores_them_on_request(tmp_path, capsys):
    main("toy", lambda **_: outcome(claim(holds=None)), "doc", ["--save", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "holds:  in part" in shown
    assert (tmp_path / "toy.json").is_file()
    assert not (tmp_path / "toy.png").exists()


def test_few_seeds_get_the_wider_interval_of_students_t():
    few = over_seeds([0.0, 1.0])
    assert few.mean == 0.5
    # t(1) at 97.5 % is 12.706, s / sqrt(2) is 0.5.
    assert few.high - few.mean == pytest.approx(6.353, abs=1e-3)
    many = over_seeds([0.0, 1.0] * 50)
    assert many.n == 100
    assert many.high - many.mean == pytest.approx(0.098, abs=0.02)


def test_a_verdict_is_in_part_when_some_parts_hold():
    assert verdict(True, True) is True
    assert verdict(True, False) is None
    assert verdict(False, False) is False
