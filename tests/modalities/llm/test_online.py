import copy
import math
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from round_cases import hooks
from toy import cpu_accelerator

from triptych.modalities.llm.online import OnlineConfig, set_up_online, stages_of
from triptych.scripts.common import parse
from triptych.training.logs import read_metrics
from triptych.training.loop import make_learner
from triptych.training.quarantine import Quarantine
from triptych.training.rounds import run_rounds

RECIPE = Path(__file__).resolve().parents[3] / "scripts" / "recipes" / "llm" / "online" / "online_dpo.yaml"
POLICY = {"name": "policy", "options": {"num_candidates": 4, "max_new_tokens": 6}}
SCORED = {"name": "num_characters"}
VALUE = {"name": "ppo_value", "options": {"clip": 0.2}, "weight": 0.1}
GAE = {"name": "units", "options": {"credit": "gae"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny instruct model."""
    return tiny.save(tmp_path_factory.mktemp("base"))


def config_of(folder, **changes):
    """online_dpo.yaml with other sections, through a file as a user would write it."""
    recipe = yaml.safe_load(RECIPE.read_text("utf-8")) | copy.deepcopy(changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False))
    return parse(OnlineConfig, ["--config", str(path)], prog="train_llm_online", doc="A test.")


def one_round(folder, base, **changes):
    """The logged steps of one round of three prompts on the tiny model."""
    config = config_of(
        folder,
        **{
            "model": {"name_or_path": str(base), "lora": {"r": 2}},
            "source": POLICY,
            "judge": SCORED,
            "rounds": {"num_rounds": 1, "num_contexts": 3},
            "optim": {"lr": 1e-3, "batch_size": 16, "micro_batch_size": 2},
            "run": {"output_dir": str(folder / "run")},
            "evaluation": {"num_prompts": 0},
        }
        | changes,
    )
    accelerator = cpu_accelerator()
    online = set_up_online(
        config,
        stages_of(config),
        device=torch.device("cpu"),
        cache_dir=folder,
        quarantine=Quarantine(),
        report=lambda line: None,
    )
    learner = make_learner(online.policy, config.optim, accelerator)
    outcome, _ = run_rounds(
        online.rounds, learner, config.optim, config.run, accelerator, identity={}, hooks=hooks()
    )
    assert outcome.finished
    events = read_metrics(folder / "run" / "metrics.jsonl")
    return [e for e in events if e["split"] == "train" and "grad_norm" in e]


def refusal(folder, **changes):
    with pytest.raises(ValueError, match=r".") as caught:
        stages_of(config_of(folder, **changes))
    return str(caught.value)


# The objective line and the loss of the first step, where policy and reference are the same model.
LINES = {
    "dpo": ({"name": "dpo", "options": {"beta": 0.1}}, math.log(2)),
    # Targets (P - 1/2) / beta of win rates P: the sum of both squares, halved; only its sign is known.
    "sppo": ({"name": "sppo", "options": {"beta": 0.5}, "reference": "stage"}, None),
    # (0 - 1 / (2 tau))^2 = 25.
    "ipo": ({"name": "ipo", "options": {"tau": 0.1, "reduce": "sum"}}, 25.0),
    "brain": ({"name": "brain", "options": {"gamma": 5.0}}, None),
    # Ratios are 1, and the advantages of a group sum to 0.
    "grpo": ({"name": "grpo", "options": {"clip": 0.2}}, 0.0),
    "rloo": ({"name": "rloo", "options": {"clip": 0.2}}, 0.0),
    # 1 - sigmoid(0 - 0).
    "kto": ({"name": "kto", "options": {"beta": 0.1}}, 0.5),
    # log 4! for lists without ties, log of fewer orders with them.
    "plackett_luce": ({"name": "plackett_luce", "options": {"beta": 0.1}}, None),
}


@pytest.mark.parametrize("name", LINES)
def test_the_objective_line_alone_changes_the_method(name, base, tmp_path):
    objective, loss = LINES[name]
    (step,) = one_round(tmp_path, base, objective=objective)
    assert step["grad_norm"] > 0
    if loss is not None:
        assert step["loss"] == pytest.approx(loss, abs=1e-5)
    elif name == "plackett_luce":
        assert 0 < step["loss"] <= math.log(24) + 1e-5
    else:
        assert step["loss"] > 0


def test_the_shape_follows_the_objective(tmp_path):
    found = {}
    for name, (objective, _) in LINES.items():
        shape = stages_of(config_of(tmp_path, objective=objective))[0].main.shape
        found[name] = (type(shape).__name__, getattr(shape, "label", getattr(shape, "credit", None)))
    assert found == {
        "dpo": ("Pairs", "hard"),
        "sppo": ("Pairs", "win_rate"),
        "ipo": ("Pairs", "hard"),
        "brain": ("Lists", None),
        "grpo": ("Units", "z_score"),
        "rloo": ("Units", "leave_one_out"),
        "kto": ("Labelled", None),
        "plackett_luce": ("Lists", None),
    }


GRPO = {"name": "grpo", "options": {"clip": 0.2}}
PPO = {"name": "ppo", "options": {"clip": 0.2}}
OREO = {"name": "oreo_policy", "options": {"beta": 0.03}}
RLOO = {"name": "rloo", "options": {"clip": 0.2}}


def units(credit, **options):
    return {"name": "units", "options": {"credit": credit, "credit_options": options}}


TURNS = {
    "name": "turns",
    "options": {"num_candidates": 2, "follow_up": "Again.", "max_new_tokens": 4},
}
REFERENCE = {"name": "reference", "options": {"num_candidates": 2, "max_new_tokens": 4, "slot": "frozen"}}
NARROW = {"name": "policy", "options": POLICY["options"] | {"top_p": 0.9}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"source": {"name": "data", "options": {"num_candidates": 2}}, "judge": None, "objective": GRPO},
            ["grpo needs fresh samples", "beams and data are no samples of it"],
        ),
        ({"source": REFERENCE, "objective": GRPO}, ["grpo needs fresh samples", "FromReference gives none"]),
        ({"source": NARROW, "objective": GRPO}, ["grpo needs fresh samples", "need importance weights"]),
        ({"objective": GRPO, "keep": {"buffer": "all_past"}}, ["keep.buffer=all_past trains on old ones"]),
        ({"objective": PPO, "shape": GAE}, ["credit 'gae' needs a critic; add one (critic: ...)"]),
        ({"objective": OREO}, ["needs a critic; add one (critic: ...)"]),
        ({"critic": {"kind": "head"}}, ["no objective trains it: add ppo_value or oreo_value"]),
        (
            {"objective": RLOO, "shape": units("leave_one_out", kl=0.1, kl_estimator="k3")},
            ["k3", "reward"],
        ),
        (
            {
                "objective": GRPO
                | {"regularizers": [{"name": "kl", "weight": 0.1, "options": {"estimator": "k1"}}]}
            },
            ["refuses estimator='k1'", "use k1 in the reward"],
        ),
        (
            {
                "objective": RLOO | {"regularizers": [VALUE]},
                "critic": {"kind": "head"},
                "shape": GAE,
            },
            ["'rloo' has one ratio and one advantage a sample", "credit gives each unit its own"],
        ),
        (
            {
                "objective": RLOO,
                "source": TURNS,
                "judge": {"name": "per_turn", "options": {"of": SCORED}},
                "shape": units("per_turn"),
            },
            ["'rloo' has one ratio and one advantage a sample"],
        ),
        ({"objective": GRPO, "shape": {"name": "pairs"}}, ["grpo", "UnitLogLik", "PairLogLik"]),
        ({"shape": {"name": "auto", "options": {"which": "all"}}}, ["shape 'auto' takes no options"]),
        ({"source": {"name": "policie"}}, ["no source 'policie'. Did you mean 'policy'?"]),
        ({"judge": {"name": "lenght"}}, ["no judge 'lenght'. Did you mean 'length'?"]),
        ({"shape": {"name": "pair"}}, ["no shape 'pair'. Did you mean 'pairs'?"]),
        ({"judge": {"name": "length", "options": {"most": 3}}}, ["no option 'most'; it takes low, high"]),
        ({"source": {"name": "policy", "options": {}}}, ["needs 'num_candidates', which has no default"]),
        ({"judge": None}, ["the shape needs score or preference", "no judge"]),
        ({"shape": {"name": "pairs", "options": {"label": "consistency"}}}, ["consistency"]),
        (
            {"shape": units("centred") | {"name": "units"}, "objective": {"name": "reinforce"}},
            ["old", "reinforce"],
        ),
        ({"rounds": {"num_rounds": 0, "num_contexts": 2}}, ["num_rounds=0 must be at least 1"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_could_not_mean_what_it_says_is_refused_with_the_reason(changes, parts, tmp_path):
    message = refusal(tmp_path, **changes)
    for part in parts:
        assert part in message


def test_samples_of_two_temperatures_have_no_policy(base, tmp_path):
    hot = {"name": "policy", "options": POLICY["options"] | {"temperature": 0.7}}
    anchor = {"name": "kl", "source": hot, "objective": {"name": "kl_leave_one_out"}, "weight": 0.1}
    with pytest.raises(ValueError, match=r"at temperatures 0\.7, 1: it has one, choose one"):
        one_round(tmp_path, base, anchors=[anchor])


def test_the_policy_has_the_temperature_of_its_source(base, tmp_path):
    """Then the ratio of the first step is 1, and the loss of a group whose advantages sum to 0 is 0."""
    cold = {"name": "policy", "options": POLICY["options"] | {"temperature": 0.5}}
    (step,) = one_round(tmp_path, base, source=cold, objective=RLOO)
    assert step["loss"] == pytest.approx(0, abs=1e-5)


def test_a_stage_takes_from_the_recipe_what_it_does_not_say_itself(tmp_path):
    config = config_of(
        tmp_path,
        stages=[
            {"name": "first", "rounds": {"num_rounds": 3, "num_contexts": 2}},
            {"name": "second", "objective": RLOO, "keep": {"average": True}},
        ],
    )
    first, second = stages_of(config)
    assert (first.num_rounds, first.num_contexts, second.num_rounds) == (3, 2, config.rounds.num_rounds)
    assert [s.main.terms.main.objective.spec.name for s in (first, second)] == ["dpo", "rloo"]
    assert [s.keep.average for s in (first, second)] == [False, True]
    assert [s.main.judge.weights for s in (first, second)] == [[1.0, 0.5]] * 2


def test_an_error_names_the_stage_that_it_is_of(tmp_path):
    stages = [{"name": "first"}, {"name": "second", "objective": OREO}]
    assert refusal(tmp_path, stages=stages).startswith("stage second: ")


def test_held_out_prompts_must_exist_where_they_are_asked_for(base, tmp_path):
    path = tiny.write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "red"}, {"prompt": "blue"}])
    data = {"source": str(path), "eval_fraction": 0.0}
    with pytest.raises(ValueError, match=r"set data\.eval_fraction, or evaluation\.num_prompts=0"):
        one_round(tmp_path, base, data=data, evaluation={"num_prompts": 2})


def test_settings_of_other_runs_that_rounds_do_not_read_are_refused(tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text("utf-8"))
    for section, setting, message in [
        ("model", {"cache_reference": True}, "rounds keep each round's reference values"),
        ("optim", {"num_steps": 5}, "rounds.num_rounds and rounds.num_epochs decide"),
        ("optim", {"num_epochs": 2.0}, "rounds.num_rounds and rounds.num_epochs decide"),
        ("data", {"keep": ["margin"]}, "data.keep=margin: rounds take labels from the judge"),
    ]:
        assert message in refusal(tmp_path, **{section: recipe[section] | setting})
