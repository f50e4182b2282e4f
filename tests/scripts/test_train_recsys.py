import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from triptych.modalities.recsys.exported import load
from triptych.scripts import evaluate_recsys, recommend, train_recsys

RECIPES = Path(train_recsys.__file__).parent / "recipes" / "recsys"


def write_events(path, *, users=30, items=24):
    """Users who walk in steps of one along a circle of items, from where they please."""
    choice = random.Random(0)
    lines = ["user,item,timestamp"]
    for u in range(users):
        start, length = choice.randrange(items), choice.randint(8, 14)
        lines += [f"p{u},film {(start + t) % items},{t}" for t in range(length)]
    path.write_text("\n".join(lines) + "\n")
    return path


def words(folder, events, **options):
    settings = {
        "data.source": events,
        "run.output_dir": folder,
        "optim.num_epochs": 2,
        "run.save_every": 2,
        "run.eval_every": 0,
        "model.width": 16,
        "model.heads": 2,
        "model.kernel": "chunked",
        "model.dropout": 0.0,
        "model.decoder_dropout": "null",
        "ids.make.codebook_size": 4,
        "ids.make.dim": 8,
        "ids.make.levels": 2,
        "evaluation.width": 20,
        "evaluation.bars": '["MostPop", "Rules"]',
    }
    found = ["--config", str(RECIPES / "movielens_onerec_lazy.yaml")]
    for name, value in (settings | options).items():
        found += [f"--{name}", str(value)]
    return found


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a small file of events that has learnt what comes next."""
    folder = tmp_path_factory.mktemp("recsys")
    events = write_events(folder / "events.csv")
    run = folder / "run"
    options = {"optim.num_epochs": 60, "optim.batch_size": 8, "optim.micro_batch_size": 4}
    assert train_recsys.main(words(run, events, **options)) == 0
    return run


def test_a_users_csv_trains_to_a_model_that_knows_what_comes_next(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["this model: recall@5"]["mean"] > 0.9
    assert results["this model: recall@5"]["mean"] > results["MostPop: recall@5"]["mean"] + 0.3
    report = (trained / "report.html").read_text()
    for text in ("Ranking of held-out items", "Recommendations", "Semantic ids", "film 3", "Leave one out"):
        assert text in report
    assert {p.name for p in (trained / "model").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "items.json",
        "index.json",
        "README.md",
    }


def test_it_recommends_from_the_exported_folder_alone(trained, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    shutil.copytree(trained / "model", folder)
    history = "film 4,film 5,film 6,film 7,never seen"
    assert recommend.main(["--model", str(folder), "--history", history, "--num", "3", "--width", "20"]) == 0
    shown = capsys.readouterr()
    assert "film 8" in shown.out
    assert "film 7" not in shown.out
    assert "left out, not in the catalogue: never seen" in shown.err


def test_exported_models_of_several_seeds_are_compared_in_one_table(trained, tmp_path, capsys):
    events = str(trained.parent / "events.csv")
    names = {"walker": [str(trained / "model")] * 2}
    options = ["--evaluation.width", "20", "--evaluation.bars", '["MostPop"]', "--output", str(tmp_path)]
    options += ["--evaluation.session_items", "2"]
    assert evaluate_recsys.main(["--data.source", events, "--models", json.dumps(names), *options]) == 0
    alone, both = (json.loads((p / "results.json").read_text()) for p in (trained, tmp_path))
    for name in ("recall@5", "ndcg@10"):
        assert both[f"walker: {name}"] == alone[f"this model: {name}"]
        assert both[f"MostPop: {name}"] == alone[f"MostPop: {name}"]
    assert both["walker, sessions: legal"]["mean"] == 1
    assert both["walker, sessions: items repeated"]["mean"] == 0
    assert "walker (2 seeds)" in capsys.readouterr().out
    assert load_file(tmp_path / "rankings.safetensors")["walker/1"].shape == (30, 20)


def test_a_catalogue_with_other_items_is_matched_by_name(trained, tmp_path, capsys):
    lines = (trained.parent / "events.csv").read_text().replace("film 23,", "film x,").splitlines()
    other = tmp_path / "other.csv"
    # Another order of items, another first item, and one that the model does not know.
    other.write_text("\n".join([lines[0], "new,film x,0", "new,film 9,1", "new,film 10,2", *lines[1:]]))
    options = ["--evaluation.width", "20", "--output", str(tmp_path)]
    models = json.dumps({"walker": [str(trained / "model")]})
    assert evaluate_recsys.main(["--data.source", str(other), "--models", models, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["walker: recall@5"]["mean"] > 0.8
    assert "1 of 24 items are not in its catalogue" in capsys.readouterr().out


def test_validation_events_are_learnt_from_when_only_tests_are_held_out(tmp_path, capsys):
    events = write_events(tmp_path / "events.csv", users=10)
    made = {}
    for name in ("validation_and_test", "test"):
        options = {"session.hold_out": name, "optim.num_epochs": 1, "evaluation.bars": "[]"}
        assert train_recsys.main(words(tmp_path / name, events, **options)) == 0
        made[name] = capsys.readouterr()
    assert "learns from training events" in made["validation_and_test"].err
    assert "learns from training and validation events" in made["test"].err


def test_a_file_of_histories_is_answered_line_by_line(trained, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    rows = [{"user": "x", "history": ["film 1", "film 2"]}, {"user": "y", "history": []}]
    asked.write_text("\n".join(map(json.dumps, rows)) + "\nnonsense\n")
    out = tmp_path / "found.jsonl"
    options = ["--num", "2", "--width", "20", "--session_items", "2", "--output", str(out)]
    assert recommend.main(["--model", str(trained / "model"), "--histories", str(asked), *options]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["user"] for line in lines] == ["x", "y"]
    for line in lines:
        assert [len(set(one["items"])) for one in line["recommended"]] == [2, 2]
        assert line["recommended"][0]["logp"] >= line["recommended"][1]["logp"]
    assert "asked.jsonl:3" in capsys.readouterr().err


def test_what_is_loaded_is_what_was_trained(trained):
    made = load(trained / "model")
    for name, value in made.policy.state_dict().items():
        assert torch.equal(value, weights(trained)[name]), name
    assert len(made.items) == 24
    assert not made.policy.training


def test_a_folder_that_is_no_recommender_or_damaged_is_named(trained, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SystemExit):
        recommend.main(["--model", str(folder), "--history", "film 1"])
    assert "do not fit config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recommend.main(["--model", str(tmp_path), "--history", "film 1"])
    assert "config.json: cannot be read" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    events = write_events(tmp_path / "events.csv", users=12)
    options = {"optim.batch_size": 4, "optim.micro_batch_size": 4, "model.dropout": 0.2}
    train_recsys.main(words(tmp_path / "whole", events, **options))
    train_recsys.main(words(tmp_path / "half", events, **options))
    checkpoints = sorted((tmp_path / "half" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    train_recsys.main(words(tmp_path / "half", events, **options))
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "half")[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {
            "model.kind": "sasrec",
            "model.context": "causal",
            "model.encoder_layers": 1,
            "model.item_vectors": "false",
        },
        {"model.context": "bidirectional", "model.encoder_layers": 1, "model.history_tokens": "codes"},
        {"model.experts": '{"num_experts": 4, "top_k": 2, "balance_rate": 0.01}', "session.items": 3},
    ],
)
def test_the_other_forms_train_too(tmp_path, options):
    if options.get("model.history_tokens") == "codes":
        options = options | {"model.item_vectors": "false"}
    events = write_events(tmp_path / "events.csv", users=10)
    assert train_recsys.main(words(tmp_path / "run", events, **{"optim.num_epochs": 0.5}, **options)) == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective.name": "dpo", "objective.options": '{"beta": 0.1}'}, "dpo"),
        (
            {
                "model.kind": "sasrec",
                "model.context": "causal",
                "model.encoder_layers": 1,
                "session.items": 2,
                "model.item_vectors": "false",
            },
            "one item",
        ),
        ({"session.hold_out": "test", "run.eval_every": 2}, "set run.eval_every=0"),
        ({"evaluation.bars": '["KNN"]'}, "evaluation.bars=KNN; valid: MostPop"),
        (
            {"model.kind": "sasrec", "model.context": "causal", "model.encoder_layers": 1},
            "model.kind=sasrec has the items' vectors alone",
        ),
        ({"model.item_features": '["genre"]'}, "no feature 'genre'; they have none"),
        (
            {"model.item_vectors": "false", "model.tables": "torchrec"},
            "model.tables=torchrec has nothing to hold",
        ),
        ({"data.source": "nowhere.csv"}, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, options, message):
    events = write_events(tmp_path / "events.csv", users=10)
    with pytest.raises(SystemExit):
        train_recsys.main(words(tmp_path / "run", events, **options))
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_runs_on_a_users_file_with_one_override(tmp_path, recipe):
    events = write_events(tmp_path / "events.csv", users=40, items=70)
    words_ = [
        "--config",
        str(recipe),
        "--data.source",
        str(events),
        "--run.output_dir",
        str(tmp_path / "run"),
    ]
    short = ["--optim.num_steps", "2", "--run.eval_every", "0"]
    if "ids: {path:" in recipe.read_text():
        short += ["--ids.path", "null"]
    assert train_recsys.main([*words_, *short]) == 0
