from pathlib import Path

from triptych.objectives import names
from triptych.scripts import methods
from triptych.scripts.objectives import main, markdown

README = Path(__file__).resolve().parents[2] / "README.md"


def between(text: str, mark: str) -> str:
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_readme_table_of_objectives_is_the_registrys():
    assert between(README.read_text("utf-8"), "objectives") == markdown(), "run: triptych objectives table"


def test_every_objective_names_its_formula_and_its_source():
    rows = [line.split(" | ") for line in markdown().splitlines()[2:]]
    assert len(rows) == len(names())
    assert all(formula.strip() and paper.strip() for _, _, formula, paper, _ in rows)


def test_objectives_show_prints_formula_range_and_paper(capsys):
    assert main(["show", "sigmoid"]) == 0
    out = capsys.readouterr().out
    assert "dpo  (Pair)" in out
    assert "beta: (0, inf], required" in out
    assert "arXiv 2305.18290" in out
    assert "also called: sigmoid" in out


def test_readme_table_of_methods_is_that_of_the_recipes():
    text = README.read_text("utf-8")
    assert between(text, "methods") == methods.markdown(), "run: triptych methods table llm"
    for modality in ("diffusion", "recsys"):
        assert between(text, f"methods-{modality}") == methods.markdown(modality), (
            f"run: triptych methods table {modality}"
        )


def test_every_online_recipe_names_its_method_and_its_paper():
    for row in methods.rows():
        assert row["method"], row["recipe"]
        assert "arXiv" in row["paper"] or row["paper"] == "-", row["recipe"]
    assert len(methods.rows()) >= 25


def test_methods_are_printed_with_their_plug_points(capsys):
    assert methods.main([]) == 0
    out = capsys.readouterr().out
    assert "sppo: SPPO" in out
    assert "objective  sppo(beta=0.05) against stage" in out
