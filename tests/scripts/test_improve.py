import json
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
import yaml

from triptych.modalities.llm.online import OnlineConfig, set_up_online, stages_of
from triptych.modalities.llm.online_outcome import HeldOut
from triptych.scripts import improve, train_llm_online
from triptych.scripts.common import parse
from triptych.training.quarantine import Quarantine

FOLLOW_UP = " slow blue"
RECIPE = {
    "data": {"source": "instructions"},
    "source": {
        "name": "turns",
        "options": {"num_candidates": 2, "follow_up": FOLLOW_UP, "max_new_tokens": 4, "chat": "always"},
    },
    "judge": {"name": "per_turn", "options": {"of": {"name": "num_characters"}}},
    "shape": {"name": "units", "options": {"credit": "per_turn", "fields": ["advantage"]}},
    "objective": {"name": "reinforce"},
    "rounds": {"num_rounds": 1, "num_contexts": 2},
    "optim": {"lr": 0.01, "batch_size": 2, "micro_batch_size": 2},
    "evaluation": {"num_prompts": 0, "max_new_tokens": 4, "further_judges": {"words": {"name": "num_words"}}},
}


WITHOUT_TURNS = ["--source", '{"name": "policy", "options": {"num_candidates": 2, "max_new_tokens": 4}}']
WITHOUT_TURNS += [
    "--judge",
    '{"name": "num_words", "options": {}}',
    "--shape",
    '{"name": "auto", "options": {}}',
]


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """The folder of a short run in two turns."""
    folder = tmp_path_factory.mktemp("improve")
    model = {"name_or_path": str(material / "base"), "lora": {"r": 2}}
    recipe = RECIPE | {"model": model, "run": {"output_dir": str(folder / "run")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train_llm_online.main(["--config", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def command(trained, out, *more):
    args = [
        "--config",
        f"{trained}/config.yaml",
        "--adapter",
        f"{trained}/model",
        "--run.output_dir",
        str(out),
    ]
    return [*args, "--num_prompts", "4", *more]


def refusal(args, capsys):
    with pytest.raises(SystemExit) as left:
        improve.main(args)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def written(out):
    return json.loads((out / "samples" / "improve.json").read_text("utf-8"))


def test_every_step_is_judged_and_compared_with_the_one_before(trained, tmp_path, capsys):
    capsys.readouterr()
    assert improve.main(command(trained, tmp_path, "--num_steps", "2")) == 0
    printed = capsys.readouterr().out.splitlines()
    found = written(tmp_path)
    assert [(s["judge"], s["step"]) for s in found["steps"]] == [
        (name, step) for name in ("reward", "words") for step in range(3)
    ]
    assert len(printed) == 6
    assert printed[1].startswith("step 1  reward ")
    assert len(found["prompts"]) == 4
    for line in found["steps"]:
        scores = found["scores"][line["judge"]]
        assert line["score"]["mean"] == pytest.approx(np.mean(scores[line["step"]]))
        if line["step"] == 0:
            assert (line["improved"], line["worsened"], line["gain"]) == (None, None, None)
            continue
        now, before = scores[line["step"]], scores[line["step"] - 1]
        assert line["improved"] == pytest.approx(sum(a > b for a, b in zip(now, before, strict=True)) / 4)
        assert line["worsened"] == pytest.approx(sum(a < b for a, b in zip(now, before, strict=True)) / 4)
        assert line["gain"]["mean"] == pytest.approx(np.mean(now) - np.mean(scores[0]), abs=1e-5)
    # The recipe's judge is one of turns; single answers are scored by the one below it.
    assert found["scores"]["reward"] == [[len(t) for t in texts] for texts in found["answers"]]


def test_the_same_command_writes_the_same_answers(trained, tmp_path):
    for name in ("first", "second"):
        assert improve.main(command(trained, tmp_path / name, "--num_steps", "1")) == 0
    assert written(tmp_path / "first") == written(tmp_path / "second")


def test_prompts_of_a_file_are_all_answered(trained, tmp_path):
    rows = [{"prompt": f"{word} and warm"} for word in tiny.WORDS[:3]]
    path = tiny.write_jsonl(tmp_path / "mine.jsonl", rows)
    assert improve.main(command(trained, tmp_path, "--prompts", str(path), "--num_steps", "1")) == 0
    found = written(tmp_path)
    assert sorted(found["prompts"]) == sorted(r["prompt"] for r in rows)
    assert [len(texts) for texts in found["answers"]] == [3, 3]


def test_the_base_may_give_the_first_answer(trained, tmp_path):
    """The trained policy and the base draw other first answers from the same seeds."""
    hot = ["--num_steps", "1", "--evaluation.max_new_tokens", "12"]
    assert improve.main(command(trained, tmp_path / "own", *hot)) == 0
    assert improve.main(command(trained, tmp_path / "base", "--first", "base", *hot)) == 0
    own, base = written(tmp_path / "own"), written(tmp_path / "base")
    assert own["prompts"] == base["prompts"]
    assert own["answers"][0] != base["answers"][0]


@pytest.fixture
def ready(trained, tmp_path):
    """Held-out prompts of the run with its stages."""
    args = ["--config", f"{trained}/config.yaml", "--evaluation.num_prompts", "3"]
    config = parse(OnlineConfig, args, prog="improve", doc="A test.")
    stages = stages_of(config)
    online = set_up_online(
        config,
        stages,
        device=torch.device("cpu"),
        cache_dir=tmp_path,
        quarantine=Quarantine(),
        report=lambda line: None,
    )
    return HeldOut(online, config, device=torch.device("cpu")), stages, config


def test_the_policy_sees_what_the_turns_source_would_have_shown_it(ready):
    """Tokens up to the second answer are those of training, whether the first one ended or was cut off."""
    held_out, stages, _ = ready
    online = held_out.run
    request = improve.request_of(improve_config(ready), stages, online.tokenizer)
    groups = stages[0].main.source(held_out.prompts, held_out.live())
    for prompt, group in zip(held_out.prompts, groups, strict=True):
        for c in group.candidates:
            # The first answer is the policy's own tokens of turn 0; the request is what is not its own.
            start = int(np.flatnonzero(c.own & (c.turns == 1))[0])
            answer = c.ids[c.own & (c.turns == 0)]
            shown = improve.next_prompt(prompt.ids, answer, request)
            assert shown.tolist() == np.concatenate([prompt.ids, c.ids[:start]]).tolist()
    assert FOLLOW_UP.strip() in online.tokenizer.decode(request)


def improve_config(ready, **changes):
    config = ready[2]
    own = {f.name: getattr(config, f.name) for f in fields(config)}
    return improve.Config(**own, adapter="-", **changes)


def test_every_step_is_asked_with_the_latest_answer_alone(ready, monkeypatch):
    held_out, stages, _ = ready
    request = improve.request_of(improve_config(ready), stages, held_out.run.tokenizer)
    asked, draw_for = [], improve.draw_for

    def watched(prompts, *args, **options):
        asked.append([p.tolist() for p in prompts])
        return draw_for(prompts, *args, **options)

    monkeypatch.setattr(improve, "draw_for", watched)
    steps = improve.improved(held_out, improve_config(ready, num_steps=2), request)
    assert asked[0] == [p.ids.tolist() for p in held_out.prompts]
    for prompts, answers in zip(asked[1:], steps[:-1], strict=True):
        latest = [g.candidates[0].ids for g in answers]
        assert prompts == [
            improve.next_prompt(p.ids, ids, request).tolist()
            for p, ids in zip(held_out.prompts, latest, strict=True)
        ]


def test_an_answer_that_ends_is_not_ended_twice():
    prompt, request = np.array([5, 6]), np.array([0, 1, 7])
    assert improve.next_prompt(prompt, np.array([8, 0]), request).tolist() == [5, 6, 8, 0, 1, 7]
    assert improve.next_prompt(prompt, np.array([8, 9]), request).tolist() == [5, 6, 8, 9, 0, 1, 7]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--num_steps", "0"], "num_steps=0 must be at least 1"),
        (["--num_prompts", "0"], "num_prompts=0 must be at least 1"),
        (["--adapter", "/no/such/folder"], "does not hold a LoRA adapter"),
        (["--prompts", "/no/such/file.jsonl"], "does not exist"),
        (
            [*WITHOUT_TURNS],
            "the recipe has no source 'turns' to take it from",
        ),
    ],
    ids=["no-step", "no-prompt", "no-adapter", "no-file", "no-turns"],
)
def test_a_users_mistake_ends_in_one_line(trained, tmp_path, capsys, more, part):
    assert part in refusal(command(trained, tmp_path, *more), capsys)


def test_a_request_may_be_given_where_the_recipe_has_none(trained, tmp_path):
    more = [*WITHOUT_TURNS, "--follow_up", "Again."]
    assert improve.main(command(trained, tmp_path, "--num_steps", "1", *more)) == 0
    assert len(written(tmp_path)["answers"]) == 2
