import importlib.metadata
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train_llm import environment, free_port
from transformers import AutoModelForCausalLM

from triptych.modalities.llm.online import OnlineConfig
from triptych.scripts import train_llm_online
from triptych.scripts.common import parse
from triptych.training.logs import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_llm_online.py"
NUM_STEPS = 6


def arguments(material, out, **changes):
    """Online DPO with LoRA: three rounds of four prompts, two steps each, unless changed."""
    settings = {
        "model.name_or_path": material / "base",
        "model.lora.r": 4,
        "data.source": "instructions",
        "source": '{"name": "policy", "options": {"num_candidates": 3, "max_new_tokens": 6}}',
        "judge": '{"name": "num_characters"}',
        "objective.name": "dpo",
        "objective.options": '{"beta": 0.1}',
        "rounds.num_rounds": 3,
        "rounds.num_contexts": 4,
        "optim.lr": 1e-2,
        "optim.batch_size": 2,
        "optim.micro_batch_size": 1,
        "optim.schedule": "constant",
        "run.output_dir": out,
        "evaluation.num_prompts": 4,
        "evaluation.max_new_tokens": 4,
        "evaluation.best_of": 3,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def events(out, split="train"):
    return [e for e in read_metrics(Path(out) / "metrics.jsonl") if e["split"] == split]


def losses(out):
    return [e["loss"] for e in events(out) if "loss" in e]


def weights(out, step=NUM_STEPS):
    return (Path(out) / "checkpoints" / f"step-{step:08d}" / "policy.safetensors").read_bytes()


def check_run_folder(out):
    """What every finished run leaves behind."""
    assert yaml.safe_load((out / "config.yaml").read_text())["run"]["output_dir"] == str(out)
    versions = json.loads((out / "versions.json").read_text())
    assert versions["torch"] == importlib.metadata.version("torch")
    assert len(losses(out)) == NUM_STEPS
    rounds = [e for e in events(out) if "round/groups" in e]
    assert [e["step"] for e in rounds] == [1, 3, 5]
    assert all(e["round/groups"] == 4 for e in rounds)
    assert all(e["reward_best"] >= e["reward"] > 0 for e in rounds)
    assert {"reward", "reward_low", "reward_high", "kl", "length"} <= set(events(out, "eval")[-1])
    report = (out / "report.html").read_text()
    assert "<script" not in report
    assert "Held-out prompts" in report
    assert {p.name for p in (out / "samples").iterdir()} == {"base.json", "aligned.json"}
    assert (out / "model" / "README.md").read_text().startswith("---")
    assert not list(out.rglob(".tmp*"))
    assert not list(out.rglob("*.tmp"))
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_a_run_goes_from_drawing_to_a_report(material, tmp_path, capsys):
    out = tmp_path / "run"
    more = {"evaluation__further_judges": '{"words": {"name": "num_words"}}'}
    assert train_llm_online.main(arguments(material, out, **more)) == 0
    check_run_folder(out)
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-5)
    results = json.loads((out / "results.json").read_text())
    assert {f"{j}, {w}" for j in ("reward", "words") for w in ("aligned", "aligned - base", "best of 3")} | {
        "KL to the base"
    } == set(results)
    base, aligned = (json.loads((out / "samples" / f"{n}.json").read_text()) for n in ("base", "aligned"))
    # The results are those of the saved answers, and of those the judge counted the characters.
    first, best = base["base"]["scores"]["reward"], base["best"]["scores"]["reward"]
    last = aligned["scores"]["reward"]
    assert first == [len(t) for t in base["base"]["texts"]]
    assert results["reward, aligned"]["mean"] == pytest.approx(sum(last) / 4)
    assert results["reward, aligned - base"]["mean"] == pytest.approx((sum(last) - sum(first)) / 4)
    assert results["reward, best of 3"]["mean"] == pytest.approx(sum(best) / 4)
    assert sum(best) >= sum(first)
    assert results["KL to the base"]["mean"] == pytest.approx(sum(aligned["kl"]) / 4)
    assert any(abs(value) > 1e-4 for value in aligned["kl"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"report: {out / 'report.html'}"


def test_the_same_seed_repeats_a_run_bit_for_bit_and_another_does_not(material, tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert train_llm_online.main(arguments(material, first)) == 0
    saved = ["--config", str(first / "config.yaml"), "--run.output_dir"]
    assert train_llm_online.main([*saved, str(second)]) == 0
    assert train_llm_online.main([*saved, str(other), "--run.seed", "1"]) == 0
    assert losses(second) == losses(first)
    assert weights(second) == weights(first)
    assert losses(other) != losses(first)


class Stopping:
    """A signal that comes after so many steps."""

    number = signal.SIGTERM

    def __init__(self, at):
        self.at, self.asked = at, 0

    def __call__(self):
        self.asked += 1
        return self.asked == self.at


CASES = {
    "fixed reference": {},
    "moving references and a judge that reads one": {
        "objective.reference": "stage",
        "keep.stage": "each_round",
        "keep.ema": 0.5,
        "keep.average": "true",
        "judge": '{"name": "likelihood", "options": {"slot": "ema"}}',
        "evaluation.num_prompts": 0,
    },
    "earlier rounds again": {"keep.buffer": "all_past", "rounds.num_epochs": 0.5},
    "a critic": {
        "source": '{"name": "policy", "options": {"num_candidates": 1, "max_new_tokens": 6}}',
        "shape": '{"name": "units", "options": {"credit": "gae", "credit_options": {"kl": 0.05}}}',
        "objective.name": "ppo",
        "objective.options": '{"clip": 0.2}',
        "objective.regularizers": '[{"name": "ppo_value", "weight": 0.1, "options": {"clip": 0.2}}]',
        "critic.kind": "head",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_in_the_middle_of_a_round_goes_on_to_the_same_end(
    case, material, tmp_path, monkeypatch, capsys
):
    whole, out, changes = tmp_path / "whole", tmp_path / "run", CASES[case]
    # Rounds of two steps each; of one, two and three where earlier rounds are trained on again.
    at = 4 if "keep.buffer" in changes else 3
    assert train_llm_online.main(arguments(material, whole, **changes)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train_llm_online, "StopSignal", lambda: Stopping(at))
        assert train_llm_online.main(arguments(material, out, **changes)) == 128 + signal.SIGTERM
    assert f"stopped at step {at} of {NUM_STEPS}; the same command continues" in capsys.readouterr().err
    assert not (out / "model").exists()
    assert train_llm_online.main(arguments(material, out, **changes)) == 0
    assert f"resumed from checkpoints/step-0000000{at}" in capsys.readouterr().err
    assert losses(out) == losses(whole)
    assert len(losses(out)) == NUM_STEPS
    assert weights(out) == weights(whole)
    adapters = [(p / "model" / "adapter_model.safetensors").read_bytes() for p in (out, whole)]
    assert adapters[0] == adapters[1]
    # The interrupted round was not drawn again.
    assert len([e for e in events(out) if "round/groups" in e]) == 3
    if case == "moving references and a judge that reads one":
        averages = [(p / "average_model" / "adapter_model.safetensors").read_bytes() for p in (out, whole)]
        assert averages[0] == averages[1]


def test_the_average_of_the_policies_is_exported_beside_the_last_one(material, tmp_path):
    """Of two rounds it is the mean of the policy after each; the first is a run of one round."""
    one, two = tmp_path / "one", tmp_path / "two"
    steps = {"keep__average": "true", "evaluation__num_prompts": 0}
    assert train_llm_online.main(arguments(material, one, rounds__num_rounds=1, **steps)) == 0
    assert train_llm_online.main(arguments(material, two, rounds__num_rounds=2, **steps)) == 0
    first, second, mean = (
        load_file(p / "adapter_model.safetensors")
        for p in (one / "model", two / "model", two / "average_model")
    )
    assert any(not torch.equal(first[n], second[n]) for n in first)
    for name in mean:
        torch.testing.assert_close(mean[name], (first[name] + second[name]) / 2, atol=1e-7, rtol=1e-5)


def test_the_base_answers_once_and_anew_only_when_it_would_answer_otherwise(material, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_llm_online.main(arguments(material, out)) == 0
    kept = (out / "samples" / "base.json").read_bytes()
    line = "the base model answers 4 held-out prompts"
    assert line in capsys.readouterr().err
    assert train_llm_online.main(arguments(material, out)) == 0
    assert line not in capsys.readouterr().err
    assert (out / "samples" / "base.json").read_bytes() == kept
    override = {"run__resume_override": '["all"]', "judge": '{"name": "num_words"}'}
    assert train_llm_online.main(arguments(material, out, **override)) == 0
    assert line in capsys.readouterr().err
    assert (out / "samples" / "base.json").read_bytes() != kept


def test_a_finished_run_started_again_changes_nothing(material, tmp_path):
    out = tmp_path / "run"
    args = arguments(material, out)
    assert train_llm_online.main(args) == 0
    kept = {p: p.read_bytes() for p in [out / "metrics.jsonl", *(out / "checkpoints").rglob("*.*")]}
    assert train_llm_online.main(args) == 0
    assert {p: p.read_bytes() for p in kept} == kept


def test_without_held_out_prompts_there_is_a_model_and_a_report(material, tmp_path):
    out = tmp_path / "run"
    assert train_llm_online.main(arguments(material, out, evaluation__num_prompts=0)) == 0
    assert json.loads((out / "results.json").read_text()) == {}
    assert (out / "report.html").is_file()
    assert not (out / "samples").exists()


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(material, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes = {"optim__batch_size": 2, "evaluation__num_prompts": 2}
    assert train_llm_online.main(arguments(material, whole, **changes)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(free_port()), str(SCRIPT), *arguments(material, out, **changes)]
    single = environment() | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=single, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    check_run_folder(out)
    assert losses(out) == pytest.approx(losses(whole), abs=1e-5)
    assert done.stderr.count("report: ") == 1
    state = json.loads((out / "checkpoints" / f"step-{NUM_STEPS:08d}" / "state.json").read_text())
    assert state["identity"]["num_ranks"] == 2


def refusal(args, capsys):
    """The error of a run that ends with exit code 2: the last line, and the only one of its kind."""
    with pytest.raises(SystemExit) as left:
        train_llm_online.main(args)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rounds__num_rounds": 0}, "stage rounds: num_rounds=0 must be at least 1"),
        ({"source": '{"name": "polcy"}'}, "no source 'polcy'. Did you mean 'policy'?"),
        ({"judge": '{"name": "vaders"}'}, "no judge 'vaders'. Did you mean 'vader'?"),
        ({"judge": "null"}, "the shape needs score or preference, which neither no judge nor"),
        ({"objective__name": "dop"}, "no objective 'dop'. Did you mean 'dpop'?"),
        ({"objective__reference": "sibling"}, "sibling"),
        ({"keep__every": 2}, "keep.every=2 needs keep.stage=each_round"),
        ({"critic__kind": "head"}, "a critic is given, but no objective trains it"),
        ({"evaluation__best_of": 0}, "evaluation.best_of=0 must be at least 1"),
        ({"evaluation__temperature": -1}, "evaluation.temperature=-1.0 must be 0 (greedy) or positive"),
        (
            {"evaluation__further_judges": '{"mine": {"name": "nothing"}}'},
            "no judge 'nothing'",
        ),
        (
            {"evaluation__further_judges": '{"mine": {"name": "llm_pairwise"}}'},
            "evaluation.further_judges.mine must score single answers by themselves",
        ),
        ({"judge": '{"name": "exact_match"}'}, "has no answer to compare with"),
        ({"data__source": "/no/such/prompts.jsonl"}, "/no/such/prompts.jsonl: does not exist"),
        ({"data__instructions__eval_topics": 0}, "data.instructions.eval_topics=0"),
        ({"rounds__num_round": 3}, "num_round"),
        ({"model__name_or_path": "/no/such/model"}, "model.name_or_path=/no/such/model: no such folder"),
        (
            {"source": '{"name": "policy", "options": {"num_candidates": 2, "max_new_tokens": 900}}'},
            "max_new_tokens=900 are more than the 256 positions of the model",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_users_mistake_ends_in_one_line(material, tmp_path, capsys, changes, part):
    assert part in refusal(arguments(material, tmp_path / "run", **changes), capsys)
    assert not (tmp_path / "run" / "model").exists()


def test_another_setting_is_refused_on_resuming_and_named(material, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_llm_online.main(arguments(material, out)) == 0
    capsys.readouterr()
    line = refusal(arguments(material, out, optim__lr=0.5), capsys)
    assert "optim.lr: 0.01 in the checkpoint, 0.5 now" in line


def test_kept_base_answers_belong_to_the_judge_of_the_last_stage():
    recipe = str(ROOT / "scripts" / "recipes" / "llm" / "online" / "online_dpo.yaml")
    judged = [
        parse(OnlineConfig, ["--config", recipe, *more], prog="train_llm_online", doc="A test.")
        for more in (
            (),
            ("--stages", "[{name: last, judge: {name: num_words}}]"),
            ("--stages", "[{name: last, judge: {name: vader}}]"),
        )
    ]
    assert len({train_llm_online._identity(config, "base", "data") for config in judged}) == 3
