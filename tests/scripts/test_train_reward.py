import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file

from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.reward_judges import RewardModelJudge
from triptych.modalities.llm.reward_model import load_reward_model
from triptych.objectives import spec
from triptych.scripts import train_reward
from triptych.scripts.common import parse
from triptych.training.groups import Group
from triptych.training.logs import read_metrics
from triptych.training.scorers import FeatureReward, IdealPoints, Vectors, load_scorer

RECIPES = sorted((Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "reward").glob("*.yaml"))
CPU = torch.device("cpu")


def arguments(out, **settings):
    common = {
        "optim.lr": 1e-2,
        "optim.batch_size": 8,
        "optim.micro_batch_size": 8,
        "optim.num_steps": 4,
        "run.output_dir": out,
    }
    settings = common | {name.replace("__", "."): value for name, value in settings.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def events(out, split="train"):
    return [e for e in read_metrics(Path(out) / "metrics.jsonl") if e["split"] == split]


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def weights(out, step):
    return (Path(out) / "checkpoints" / f"step-{step:08d}" / "policy.safetensors").read_bytes()


def rows_with_a_good_word(count, *, margin=None):
    """Pairs that one word decides; the answers are of the same length."""
    extra = {} if margin is None else {"margin": margin}
    return [
        {"prompt": f"{i} plain:", "chosen": f" {w} bright", "rejected": f" {w} cold", **extra}
        for i in range(count)
        for w in ("red", "flat")
    ]


def text(material, tmp_path, out, rows=None, **changes):
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows or rows_with_a_good_word(40))
    settings = {
        "kind": "text",
        "model__name_or_path": material / "base",
        "data__source": data,
        "data__eval_fraction": 0.25,
    }
    return arguments(out, **(settings | changes))


def test_a_text_reward_model_learns_what_decides_and_judges_as_it_was_evaluated(material, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_reward.main(text(material, tmp_path, out, optim__num_steps=30)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"report: {out / 'report.html'}"
    first, last = events(out, "eval")[0], events(out, "eval")[-1]
    # A head of zeros: every pair a tie.
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["rewards/accuracies"] == 0.5
    assert last["rewards/accuracies"] > 0.9
    found = results(out)
    assert found["accuracy"]["mean"] == last["rewards/accuracies"]
    assert found["accuracy"]["low"] <= found["accuracy"]["mean"] <= found["accuracy"]["high"]
    assert found["log-loss"]["mean"] == pytest.approx(last["loss"], abs=1e-6)
    assert 0 <= found["calibration error"]["mean"] <= 1
    report = (out / "report.html").read_text()
    assert "Calibration" in report
    assert "<script" not in report
    assert "load_reward_model" in (out / "model" / "README.md").read_text()
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    # The exported model, as a judge, prefers the good word on a prompt that was not seen.
    judge = RewardModelJudge(path=str(out / "model"))
    tokenizer = load_reward_model(out / "model", device=CPU).tokenizer
    ids = [
        torch.tensor(tokenizer(t)["input_ids"], dtype=torch.int32).numpy()
        for t in ("99 plain:", " warm bright", " warm cold")
    ]
    candidates = tuple(
        Completion(ids=i, text=t) for i, t in zip(ids[1:], (" warm bright", " warm cold"), strict=True)
    )
    group = Group(key="x", context=Prompt(key="x", ids=ids[0], text=""), candidates=candidates,
                  mask=torch.ones(2, 1, dtype=torch.bool))  # fmt: skip
    live = type("Live", (), {"device": CPU})
    good, bad = judge([group], live)[0].score.tolist()
    assert good > bad


def test_a_margin_raises_the_gap_of_scores(material, tmp_path):
    gaps = []
    rows = rows_with_a_good_word(30, margin=6.0)
    # A large eps keeps updates in proportion to the gradient, which ends once a pair is won clearly enough.
    changes = {"optim__eps": 0.1, "optim__lr": 0.05, "optim__schedule": "constant", "optim__num_steps": 30}
    for keep in ("[]", "[margin]"):
        out = tmp_path / keep
        assert train_reward.main(text(material, tmp_path, out, rows, data__keep=keep, **changes)) == 0
        gaps.append(results(out)["gap of scores"]["mean"])
    assert gaps[1] > gaps[0] + 1.0


def test_a_stopped_run_goes_on_to_the_same_weights_losses_and_results(material, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"model__lora__dropout": 0.2, "run__seed": 3, "optim__num_steps": 6}
    assert train_reward.main(text(material, tmp_path, whole, **changes)) == 0

    class Stops(train_reward.StopSignal):
        number = 15

        def __init__(self):
            self.calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls == 3

    monkeypatch.setattr(train_reward, "StopSignal", Stops)
    assert train_reward.main(text(material, tmp_path, parts, **changes)) == 128 + 15
    assert not (parts / "model").exists()
    monkeypatch.undo()
    assert [e["step"] for e in events(parts)] == [1, 2, 3]
    assert train_reward.main(text(material, tmp_path, parts, **changes)) == 0
    assert [e["loss"] for e in events(parts)] == [e["loss"] for e in events(whole)]
    assert weights(parts, 6) == weights(whole, 6)
    assert results(parts) == results(whole)
    head = "model/reward_head.safetensors"
    assert (parts / head).read_bytes() == (whole / head).read_bytes()


def test_the_saved_configuration_given_back_repeats_the_run(material, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_reward.main(text(material, tmp_path, first)) == 0
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["kind"] == "text"
    assert train_reward.main(["--config", str(first / "config.yaml"), "--run.output_dir", str(second)]) == 0
    assert weights(second, 4) == weights(first, 4)


def test_graded_lists_train_a_reward_with_the_loss_over_all_ordered_pairs(material, tmp_path):
    out = tmp_path / "run"
    args = arguments(
        out,
        kind="text",
        model__name_or_path=material / "base",
        data__source=material / "lists.jsonl",
        data__eval_fraction=0.3,
        objective__name="pit_gap",
    )
    assert train_reward.main(args) == 0
    assert {"accuracy", "NDCG", "best first"} <= results(out).keys()
    # Three or four answers have three or six ordered pairs, each log 2 at first.
    assert 3 * 0.6931 < events(out)[0]["loss"] < 6 * 0.6932


def test_a_gap_model_has_five_ties_at_first_and_learns_which_answer_is_better(material, tmp_path):
    out = tmp_path / "run"
    args = text(material, tmp_path, out, kind="gap", optim__num_steps=25)
    assert train_reward.main(args) == 0
    assert events(out)[0]["loss"] == pytest.approx(5 * 0.693147, abs=1e-5)
    assert results(out)["accuracy"]["mean"] > 0.9
    settings = json.loads((out / "model" / "reward.json").read_text())
    assert (settings["names"], settings["reads"]) == (["gap"], "gap")


def rated_rows(count):
    """Ratings of what a text holds, on scales of their own; every third has no second rating."""
    rows = []
    for i in range(count):
        bright, cold = i % 2, i // 2 % 2
        answer = " red" + " bright" * bright + " cold" * cold
        second = None if i % 3 == 0 else 100.0 * cold
        rows.append(
            {
                "prompt": f"{i} plain:",
                "completion": answer,
                "ratings": {"good": 1 + 3 * bright, "icy": second},
            }
        )
    return rows


def test_regression_predicts_ratings_of_texts_in_their_own_units(material, tmp_path):
    out = tmp_path / "run"
    args = arguments(
        out,
        kind="regression",
        model__name_or_path=material / "base",
        ratings__source=tiny.write_jsonl(tmp_path / "rated.jsonl", rated_rows(100)),
        ratings__attributes="[good, icy]",
        ratings__eval_fraction=0.25,
        optim__num_steps=60,
        optim__batch_size=16,
    )
    assert train_reward.main(args) == 0
    found = results(out)
    assert found["good R2"]["mean"] > 0.7
    assert found["icy R2"]["mean"] > 0.7
    assert found["icy error"]["mean"] > found["good error"]["mean"]
    loaded = load_reward_model(out / "model", device=CPU)
    assert loaded.policy.names == ("good", "icy")
    assert loaded.policy.outputs.mean[1] > 10


def vectors(path, count=300, *, seed=0):
    """Pairs of embeddings decided by their first number, as tensors."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2 * count, 4, generator=generator)
    pairs = torch.arange(2 * count).view(-1, 2)
    swap = features[pairs[:, 0], 0] < features[pairs[:, 1], 0]
    pairs = torch.where(swap[:, None], pairs.flip(-1), pairs)
    save_file({"features": features, "pairs": pairs}, path)
    return path


def test_a_reward_of_embeddings_is_trained_resumed_and_loaded(tmp_path):
    out = tmp_path / "run"
    source = vectors(tmp_path / "e.safetensors")
    args = arguments(out, kind="features", features__source=source, optim__num_steps=60, optim__lr=0.05)
    assert train_reward.main(args) == 0
    assert results(out)["accuracy"]["mean"] > 0.9
    scorer, facts = load_scorer(out / "model")
    assert isinstance(scorer, FeatureReward)
    assert facts["names"] == ["reward"]
    good, bad = scorer(Vectors(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])))[:, 0].tolist()
    assert good > bad
    # Its weights can be read.
    assert "feature 0" in (out / "report.html").read_text()


def test_ratings_of_embeddings_are_predicted_in_their_own_units(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator)
    ratings = torch.stack([5 + features[:, 0], 100 * features[:, 1]], -1)
    ratings[::4, 1] = torch.nan
    save_file({"features": features, "ratings": ratings}, tmp_path / "r.safetensors")
    out = tmp_path / "run"
    args = arguments(
        out,
        kind="features",
        features__source=tmp_path / "r.safetensors",
        features__attributes="[a, b]",
        optim__num_steps=150,
        optim__lr=0.05,
        optim__batch_size=32,
        optim__micro_batch_size=32,
    )
    assert train_reward.main(args) == 0
    assert results(out)["a R2"]["mean"] > 0.98
    assert results(out)["b R2"]["mean"] > 0.98
    scorer, _ = load_scorer(out / "model")
    rated = scorer.rate(Vectors(torch.tensor([[1.0, 1.0, 0.0]])))[0].tolist()
    assert rated == [pytest.approx(6, abs=0.3), pytest.approx(100, abs=20)]


def user_rows(num_users=12, per_user=50, *, seed=0):
    """Users who want a large or a small first number, in turns."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for u in range(num_users):
        for _ in range(per_user):
            a, b = torch.randn(2, 3, generator=generator).tolist()
            swap = (a[0] > b[0]) == bool(u % 2)
            chosen, rejected = (b, a) if swap else (a, b)
            rows.append({"chosen": chosen, "rejected": rejected, "user": f"u{u}"})
    return rows


def test_ideal_points_serve_opposed_users_and_new_ones_by_their_weights_alone(tmp_path):
    out = tmp_path / "run"
    args = arguments(
        out,
        kind="ideal_points",
        features__source=tiny.write_jsonl(tmp_path / "users.jsonl", user_rows()),
        features__eval_fraction=0.2,
        users__num_prototypes=2,
        users__latent=2,
        users__closeness="inner",
        users__unseen_fraction=0.3,
        optim__num_steps=250,
        optim__lr=0.05,
        optim__batch_size=64,
        optim__micro_batch_size=64,
    )
    assert train_reward.main(args) == 0
    found = results(out)
    assert found["accuracy"]["mean"] > 0.9
    assert found["accuracy, own - mean user"]["low"] > 0.1
    assert found["accuracy, unseen users, 10 pairs"]["mean"] > 0.85
    scorer, facts = load_scorer(out / "model")
    assert isinstance(scorer, IdealPoints)
    assert 0 < len(facts["users"]) < 12
    assert len(facts["users"]) == len(scorer.logits)
    assert found["accuracy, unseen users, 10 pairs"]["n"] == 12 - len(facts["users"])


REFUSED = [
    ({"features__source": "x.jsonl"}, "kind=text does not use features; it uses model, data"),
    ({"kind": "regression"}, "kind=regression does not use data; it uses model, ratings"),
    ({"objective__name": "dpo", "objective__options": "{beta: 0.1}"}, "a reward model has no reference"),
    ({"objective__name": "reward_regression"}, "takes UnitLogLik, but the data makes PairLogLik"),
    ({"data__keep": "[margin]"}, r"data\.keep=margin, but not every sample"),
    ({"model__cache_reference": "true"}, "cache_reference"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_settings_that_mean_nothing_are_refused_in_one_line(changes, message, material, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train_reward.main(text(material, tmp_path, tmp_path / "run", **changes))
    assert left.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_a_gap_does_not_learn_from_lists_and_a_group_that_is_needed_is_named(material, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_reward.main(
            arguments(
                tmp_path / "a",
                kind="gap",
                model__name_or_path=material / "base",
                data__source=material / "lists.jsonl",
            )
        )
    assert "kind=gap learns from pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_reward.main(arguments(tmp_path / "b", kind="features"))
    assert "kind=features needs features; it uses features, scorer" in capsys.readouterr().err


def read(path, *overrides):
    return parse(
        train_reward.Config, ["--config", str(path), *overrides], prog="train_reward", doc="A recipe."
    )


def material_for(config, folder):
    """Data of the recipe's kind, in its own layout."""
    if config.kind in ("text", "gap"):
        margin = {"margin": 2.0} if "margin" in config.data.keep else {}
        return "data.source", tiny.write_jsonl(folder, [r | margin for r in tiny.pair_rows(24)])
    if config.ratings is not None:
        names = config.ratings.attributes
        rows = [
            {"prompt": r["prompt"], "response": r["chosen"]} | {n: (i + k) % 5 for k, n in enumerate(names)}
            for i, r in enumerate(tiny.pair_rows(24))
        ]
        return "ratings.source", tiny.write_jsonl(folder, rows)
    if config.kind == "ideal_points":
        more = [{"prompt": [float(i % 2), 1.0], "strength": 0.5 if i % 5 == 0 else 1.0} for i in range(200)]
        asked = config.users.prototypes == "prompts"
        rows = [row | (extra if asked else {}) for row, extra in zip(user_rows(10, 20), more, strict=True)]
        return "features.source", tiny.write_jsonl(folder, rows)
    if config.features.extract != "none":
        pytest.importorskip("vaderSentiment")
        rows = [
            {
                "reviews": [f"The {w} fabric is soft.", "Great price, soft fabric."],
                "chosen": f"Soft {w} fabric.",
                "rejected": "Torn zipper.",
            }
            for w in tiny.WORDS
        ]
        return "features.source", tiny.write_jsonl(folder, rows)
    return "features.source", vectors(folder.with_suffix(".safetensors"), 60)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_two_steps_on_a_tiny_model(path, material, tmp_path):
    config = read(path)
    assert config.run.output_dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")
    assert spec(config.chosen_objective().name).needs_reference is False
    out = tmp_path / "run"
    name, source = material_for(config, tmp_path / "data.jsonl")
    overrides = {
        name: source,
        "optim.num_steps": 2,
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "run.output_dir": out,
        "run.log_every": 1,
    }
    if config.model is not None:
        overrides["model.name_or_path"] = material / "base"
    if config.data is not None:
        overrides |= {"data.eval_split": "null", "data.eval_fraction": 0.25}
    if config.ratings is not None:
        overrides["ratings.eval_fraction"] = 0.25
    args = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    assert train_reward.main(["--config", str(path), *args]) == 0
    assert [e["step"] for e in events(out)] == [1, 2]
    assert all(e["grad_norm"] > 0 for e in events(out))
    assert (out / "report.html").is_file()
    if config.model is not None:
        assert load_reward_model(out / "model", device=CPU).policy.names
    else:
        assert load_scorer(out / "model")[1]["source"] == str(source)


def test_there_are_recipes_of_every_kind():
    assert {read(path).kind for path in RECIPES} == set(train_reward.GROUPS)
