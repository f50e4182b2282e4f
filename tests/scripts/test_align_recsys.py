"""From events to a verdict: logs, reward models, a base, alignment in rounds, and judges, on tiny data."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from triptych.modalities.recsys.online_look import Answers, all_answers
from triptych.modalities.recsys.oracle_files import read_oracle
from triptych.scripts import (
    judge_recsys,
    log_sessions,
    train_recsys,
    train_recsys_online,
    train_session_reward,
)
from triptych.scripts.common import parse
from triptych.scripts.experiments import recsys_alignment
from triptych.training.quarantine import DataError
from triptych.training.references import Snapshot
from triptych.training.stats import Estimate

RECIPES = Path(train_recsys.__file__).parent / "recipes"
SHARES = "[0.5, 0.25, 0.25]"
OBJECTIVES = {
    "dpo": ("dpo", {"beta": 0.1}, "stage"),
    "ipo": ("ipo", {"tau": 0.1, "reduce": "sum"}, "stage"),
    "cdpo": ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, "stage"),
    "robust": ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.1}, "stage"),
    "cpo": ("cpo", {"beta": 0.1}, "none"),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}, "none"),
    "s_dpo": ("softmax_dpo", {"beta": 0.1}, "stage"),
    "ranked": ("plackett_luce", {"beta": 0.1}, "stage"),
    "grpo": ("grpo", {"clip": 0.2}, "none"),
    "ecpo": ("ecpo", {"clip": 0.2}, "none"),
    "gbpo": ("gbpo", {}, "none"),
}
ON_POLICY = ("grpo", "ecpo", "gbpo")


def write_ratings(path, *, users=48, items=24):
    """Users who walk along a circle of items and rate what is near a place of their own higher."""
    choice = random.Random(0)
    lines = ["user,item,timestamp,rating"]
    for u in range(users):
        start, home = choice.randrange(items), choice.randrange(items)
        for t in range(14):
            item = (start + t) % items
            away = min((item - home) % items, (home - item) % items)
            rating = max(1, min(5, 5 - away // 2 + choice.choice((-1, 0, 1))))
            lines.append(f"p{u},film {item},{t},{rating}")
    path.write_text("\n".join(lines) + "\n")
    return path


def words(recipe, **options):
    found = ["--config", str(RECIPES / recipe)]
    for name, value in options.items():
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value, default=str)]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with events, logs, two reward models and a base."""
    folder = tmp_path_factory.mktemp("alignment")
    events = str(write_ratings(folder / "events.csv"))
    small = {"data.source": events}
    logs = {
        "logging.requests": 6,
        "logging.items": 3,
        "logging.shares": SHARES,
        "oracle.factors": 4,
        "oracle.num_steps": 40,
        "oracle.min_genre_items": 1,
        "other_oracle.num_steps": 40,
        "output": str(folder / "logs"),
    }
    assert log_sessions.main(words("recsys_logs/movielens_logs.yaml", **small, **logs)) == 0
    for name in ("reward", "second_reward"):
        options = {
            "logs": str(folder / "logs" / "logs.safetensors"),
            "dim": 4,
            "training.model": {"width": 8, "heads": 2, "hidden": 16, "num_members": 2},
            "training.optim.num_epochs": 2,
            "training.optim.batch_size": 16,
            "training.optim.micro_batch_size": 16,
            "output": str(folder / name),
        }
        assert (
            train_session_reward.main(words(f"recsys_reward/movielens_{name}.yaml", **small, **options)) == 0
        )
    base = {
        "users.shares": SHARES,
        "session.items": 3,
        "ids.make": {"dim": 4, "codebook_size": 6, "levels": 1, "method": "balanced"},
        "model.width": 16,
        "model.heads": 2,
        "optim.num_epochs": 4,
        "optim.average": 0,
        "evaluation.width": 20,
        "evaluation.bars": [],
        "run.output_dir": str(folder / "base"),
    }
    assert train_recsys.main(words("recsys/movielens_sessions.yaml", **small, **base)) == 0
    return folder


def align(place, out, **options):
    settings = {
        "base": str(place / "base" / "model"),
        "data.source": str(place / "events.csv"),
        "users.shares": SHARES,
        "requests": {"items": 3, "per_user": 4, "min_history": 4},
        "source": {"name": "beams", "options": {"num_candidates": 6}},
        "judge": {"name": "reward_model", "options": {"model": str(place / "reward" / "model")}},
        "share": 0.5,
        "rounds": {"num_rounds": 2, "num_contexts": 16},
        "optim.batch_size": 8,
        "optim.micro_batch_size": 4,
        "evaluation.logs": str(place / "logs" / "logs.safetensors"),
        "evaluation.requests": 6,
        "evaluation.width": 4,
        "evaluation.draws": 3,
        "evaluation.alarm": {
            "name": "reward_model",
            "options": {"model": str(place / "second_reward" / "model")},
        },
        "evaluation.alarm_requests": 6,
        "evaluation.ranking": {"width": 20, "ks": [5, 10]},
        "run.eval_every": 2,
        "run.save_every": 1,
        "run.log_every": 1,
        "run.output_dir": str(out),
    }
    words_ = words("recsys/online/movielens_ipa.yaml", **(settings | options))
    return train_recsys_online.main(words_)


def refused(place, out, **options):
    with pytest.raises(SystemExit) as stopped:
        align(place, out, **options)
    assert stopped.value.code == 2


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def rows_of(folder, split):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.fixture(scope="module")
def aligned(place):
    assert align(place, place / "ipa") == 0
    return place / "ipa"


def test_every_step_has_next_token_prediction_and_its_share_of_preferences(aligned):
    steps = [r for r in rows_of(aligned, "train") if "logps/all" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for row in steps:
        assert row["logps/all"] < 0
        assert row["preference/logps/chosen"] < 0
    rounds = [r for r in rows_of(aligned, "train") if "round/groups" in r]
    assert [r["round/groups"] for r in rounds] == [8.0, 8.0]


def test_candidates_are_distinct_and_the_margin_is_positive(aligned):
    for row in (r for r in rows_of(aligned, "train") if "round/groups" in r):
        assert row["round/distinct"] == 1
        assert row["round/margin"] > 0
        assert 0 <= row["round/overlap"] < 1
        assert row["round/reward_disagreement"] > 0


def test_the_loss_of_a_rounds_first_step_is_log_two_as_the_policy_is_its_reference(aligned):
    """Beam scores serve as the reference's log-probs: at the policy that searched DPO is log 2."""
    first = next(r for r in rows_of(aligned, "train") if "preference/loss" in r)
    assert first["preference/rewards/chosen"] == pytest.approx(0, abs=0.06)


def test_the_report_shows_sessions_by_title_and_answers_are_kept_for_judges(aligned):
    page = (aligned / "report.html").read_text()
    for text in ("Sessions before and after", "film ", "judge recsys", "Ranking of held-out items"):
        assert text in page
    files = all_answers(aligned)
    assert list(files) == [0, 2, 4]
    first, last = Answers.read(files[0]), Answers.read(files[4])
    assert first.served_NWm.shape == (6, 4, 3)
    assert first.kl_NS.abs().max() < 1e-5
    assert last.kl_NS.abs().max() > 1e-3
    assert first.reward_NW.isfinite().all()


class Stopping:
    """A signal that comes after so many steps."""

    number = signal.SIGTERM

    def __init__(self, at):
        self.at, self.asked = at, 0

    def __call__(self):
        self.asked += 1
        return self.asked == self.at


def test_a_run_stopped_in_mid_round_goes_on_to_the_same_end(place, aligned, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(train_recsys_online, "StopSignal", lambda: Stopping(3))
        assert align(place, tmp_path / "run") == 128 + signal.SIGTERM
    assert "stopped at step 3 of 4" in capsys.readouterr().err
    assert align(place, tmp_path / "run") == 0
    whole, again = weights(aligned), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    first, second = (Answers.read(list(all_answers(run).values())[-1]) for run in (aligned, tmp_path / "run"))
    assert torch.equal(first.drawn_NSm, second.drawn_NSm)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "dpo"])
def test_every_objective_is_one_line_of_the_same_recipe(name, place, tmp_path):
    objective, options, reference = OBJECTIVES[name]
    changes = {"objective": {"name": objective, "options": options, "reference": reference}}
    if name in ON_POLICY:
        changes["source"] = {"name": "policy", "options": {"num_candidates": 4}}
    out = tmp_path / name
    assert align(place, out, rounds={"num_rounds": 1, "num_contexts": 8}, **changes) == 0
    before, after = load_file(place / "base" / "model" / "model.safetensors"), weights(out)
    assert any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ON_POLICY)
def test_objectives_that_need_samples_refuse_beams(name, place, tmp_path, capsys):
    objective = {"name": name, "options": OBJECTIVES[name][1], "reference": "none"}
    refused(place, tmp_path / "run", objective=objective)
    assert "needs fresh samples" in capsys.readouterr().err


def test_controls_draw_nothing_or_know_nothing(place, tmp_path):
    assert align(place, tmp_path / "ntp", weight=0.0) == 0
    assert not any("preference/loss" in r for r in rows_of(tmp_path / "ntp", "train"))
    own = {"name": "reward_model", "options": {"model": str(place / "reward" / "model")}}
    for name, judge in {
        "random": {"name": "random", "options": {}},
        "shuffled": {"name": "shuffled", "options": {"of": own}},
        "other": {"name": "reward_model", "options": own["options"] | {"whose": "other"}},
    }.items():
        out = tmp_path / name
        assert align(place, out, judge=judge, rounds={"num_rounds": 1, "num_contexts": 8}) == 0
        assert any("preference/loss" in r for r in rows_of(out, "train"))


def test_the_judges_table_names_every_run_and_what_needs_no_training(place, aligned, tmp_path, capsys):
    out = tmp_path / "verdict"
    options = {
        "logs": str(place / "logs" / "logs.safetensors"),
        "oracle": str(place / "logs" / "oracle"),
        "other_oracle": str(place / "logs" / "other_oracle"),
        "data": {"source": str(place / "events.csv")},
        "runs": {"ipa": [str(aligned)]},
        "output": str(out),
    }
    arguments = [
        w
        for name, value in options.items()
        for w in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    assert judge_recsys.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    gold = {n: results[f"oracle: {n}: gold"]["mean"] for n in ("base", "ipa", "base, best by oracle")}
    assert gold["base, best by oracle"] >= max(
        gold["base"], results["oracle: base, best by reward: gold"]["mean"]
    )
    assert results["oracle: ipa: gold - base"]["mean"] == pytest.approx(gold["ipa"] - gold["base"])
    assert results["other oracle: ipa: gold"]["mean"] != gold["ipa"]
    page = (out / "report.html").read_text()
    for text in ("Verdict of the oracle", "best by item means", "Ratings that were hidden", "film "):
        assert text in page


def test_an_oracle_that_was_changed_is_refused(place, tmp_path):
    folder = tmp_path / "oracle"
    folder.mkdir()
    for name in ("oracle.safetensors", "oracle.json"):
        (folder / name).write_bytes((place / "logs" / "oracle" / name).read_bytes())
    assert read_oracle(folder).fingerprint == read_oracle(place / "logs" / "oracle").fingerprint
    said = json.loads((folder / "oracle.json").read_text())
    said["config"]["personalisation"] = 0.0
    (folder / "oracle.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="is not what was written"):
        read_oracle(folder)


def test_the_alarm_stops_a_run_whose_reward_rises_while_the_other_judge_falls(
    place, tmp_path, monkeypatch, capsys
):
    from triptych.modalities.recsys.online_look import Looker

    reward = Looker._reward
    calls = {"n": 0}

    def drifting(self, judge, requests, items):
        found = reward(self, judge, requests, items)
        if requests is self.watched:
            calls["n"] += 1
            sign = 1 if judge is self.judge else -1
            found = found * 0 + sign * calls["n"]
        return found

    monkeypatch.setattr(Looker, "_reward", drifting)
    out = tmp_path / "run"
    assert align(place, out) == train_recsys_online.ALARMED
    assert "ALARM: at step 2" in capsys.readouterr().err
    assert "stopped by the alarm" in (out / "report.html").read_text()
    assert (out / "model" / "model.safetensors").is_file()


def test_judge_users_may_not_be_trained_on(place, tmp_path, capsys):
    refused(place, tmp_path / "run", users={"shares": json.loads(SHARES), "seed": 5})
    assert "judge there and learn here" in capsys.readouterr().err


PARSED = {
    "recsys/movielens_sessions.yaml": train_recsys.RecsysConfig,
    "recsys_logs/movielens_logs.yaml": log_sessions.Config,
    "recsys_reward/movielens_reward.yaml": train_session_reward.Config,
    "recsys_reward/movielens_second_reward.yaml": train_session_reward.Config,
    "recsys_judge/movielens_judge.yaml": judge_recsys.Config,
    "recsys/online/movielens_ipa.yaml": train_recsys_online.OnlineConfig,
    "recsys/online/movielens_ecpo.yaml": train_recsys_online.OnlineConfig,
    "recsys/online/movielens_gbpo.yaml": train_recsys_online.OnlineConfig,
}


def test_the_recipes_are_read_and_fit_one_another():
    found = {name: parse(kind, words(name), prog="x", doc="x") for name, kind in PARSED.items()}
    assert {p.name for p in (RECIPES / "recsys" / "online").glob("*.yaml")} == {
        Path(name).name for name in PARSED if "online" in name
    }
    logs = found["recsys_logs/movielens_logs.yaml"]
    base = found["recsys/movielens_sessions.yaml"]
    for name, config in found.items():
        if "online" in name:
            assert config.base == f"{base.run.output_dir}/model"
            assert config.evaluation.logs == f"{logs.output}/logs.safetensors"
            assert (config.users.shares, config.users.seed) == (logs.logging.shares, logs.logging.seed)
            assert config.requests.items == logs.logging.items == base.session.items
            judges = (config.judge, config.evaluation.alarm)
            rewards = [found[f"recsys_reward/movielens_{n}.yaml"].output for n in ("reward", "second_reward")]
            assert [j.options["model"] for j in judges] == [f"{r}/model" for r in rewards]


def test_the_experiment_trains_its_arms_and_says_what_holds(place, tmp_path):
    folder = tmp_path / "experiment"
    for name in ("logs", "reward", "second_reward", "base"):
        shutil.copytree(place / name, folder / name)
    arm = {
        "data.source": str(place / "events.csv"),
        "users.shares": json.loads(SHARES),
        "requests": {"items": 3, "per_user": 4, "min_history": 4},
        "rounds": {"num_rounds": 1, "num_contexts": 8},
        "optim.batch_size": 4,
        "optim.micro_batch_size": 4,
        "evaluation.width": 4,
        "evaluation.ranking": {"width": 20, "ks": [5, 10]},
        "run.eval_every": 1,
    }
    changes = {"logs": {"data.source": str(place / "events.csv")}, "arm": arm}
    arms = ("dpo", "ntp", "other_user", "s_dpo")
    outcome = recsys_alignment.run(seeds=1, folder=folder, arms=arms, changes=changes)
    statements = [claim.statement for claim in outcome.claims]
    assert len(statements) == 5
    assert any("2 objectives on the same rounds" in text for text in statements)
    assert all(claim.family == "A generative recommender" for claim in outcome.claims)
    assert (folder / "verdict" / "verdict.png").read_bytes().startswith(b"\x89PNG")
    trained = (folder / "dpo-0" / "results.json").stat().st_mtime_ns
    recsys_alignment.run(seeds=1, folder=folder, arms=arms, changes=changes)
    assert (folder / "dpo-0" / "results.json").stat().st_mtime_ns == trained


def test_a_gain_whose_interval_holds_zero_is_no_gain():
    def of(mean, low, high):
        return Estimate(mean, low, high, n=9)

    found = {
        "oracle: dpo: gold - ntp": of(0.1, -0.1, 0.3),
        "oracle: dpo: gold - base": of(0.1, 0.05, 0.2),
        "other oracle: dpo: gold - base": of(0.1, 0.0, 0.2),
        "oracle: ntp: gold - base": of(0.0, -0.1, 0.04),
        "oracle: dpo: recall - base": of(-0.1, -0.2, -0.01),
    }
    for name in (judge_recsys.BY_REWARD, judge_recsys.BY_ITEMS, judge_recsys.UPPER):
        found[f"oracle: {name}: gold - base"] = of(0.3, 0.2, 0.4)
    holds = [claim.holds for claim in recsys_alignment.claims(found, ["dpo", "ntp"], "toy")]
    assert holds == [False, True, False, False]


def test_beam_scores_are_the_references_log_probs_and_none_is_computed_again(place, tmp_path, monkeypatch):
    def again(self, *more):
        raise AssertionError("the reference was computed")

    monkeypatch.setattr(Snapshot, "__call__", again)
    assert align(place, tmp_path / "run") == 0


def test_the_reference_is_the_policy_of_the_rounds_start_and_does_not_move_in_it(
    place, tmp_path, monkeypatch
):
    take, kept = Snapshot.take, []

    def copies(snapshot):
        return {name: value.clone() for name, value in snapshot.values.items()}

    def watched(self, policy):
        if kept:
            assert all(torch.equal(kept[-1][name], value) for name, value in self.values.items())
        take(self, policy)
        kept.append(copies(self))

    monkeypatch.setattr(Snapshot, "take", watched)
    assert align(place, tmp_path / "run") == 0
    assert len(kept) >= 2
    assert any(not torch.equal(kept[0][name], kept[-1][name]) for name in kept[0])
