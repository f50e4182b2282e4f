"""Trees of reasoning steps, grown by tiny models and judged by themselves and a verifier."""

import json
import math
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from round_cases import hooks, optim, terms
from toy import cpu_accelerator

from triptych.modalities.llm import sampling_groups
from triptych.modalities.llm.judges import self_eval_with_solution
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.port import TextPort
from triptych.modalities.llm.prompts import Prompt
from triptych.modalities.llm.sampling import Drawn
from triptych.modalities.llm.sources import SOURCES
from triptych.modalities.llm.tree_source import TreeSearch, step_length
from triptych.training.config import RunConfig
from triptych.training.groups import Verdict
from triptych.training.judging import Scored
from triptych.training.loop import make_learner
from triptych.training.references import FrozenCopy
from triptych.training.rounds import Rounds, run_rounds
from triptych.training.shapes import SHAPES
from triptych.training.stages import Keep, Live, Part, Stage
from triptych.training.trees import Search

SEARCH = Search(num_simulations=2, root_factor=2, num_children=3, max_depth=2)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def live(tokenizer):
    return make_live(tokenizer)


def make_live(tokenizer, *, round_index=0, temperature=1.0):
    policy = TokenPolicy(tiny.causal_lm("llama", max_position_embeddings=1024), temperature=temperature)
    return Live(
        policy=policy.train(),
        port=TextPort(tokenizer=tokenizer, cost=policy.row_cost()),
        references={},
        device=torch.device("cpu"),
        seed=3,
        round=round_index,
    )


def encode(tokenizer, text):
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def make_prompt(tokenizer, text, *, answer="blue", **options):
    return Prompt(key=text, ids=encode(tokenizer, text), text=text, answer=answer, **options)


def verifier(words=("blue",)):
    """1 for an answer that holds one of the words."""
    return Scored(
        measure=lambda context, candidates: [float(any(w in c.text for w in words)) for c in candidates],
        name="words",
    )


class Script:
    """In the place of `draw`: what follows each text, as pieces of text that become the drawn tokens.

    A piece ending in '.' ends the answer. The log-prob of the n-th token of candidate i is -(i + 1) / 10.
    """

    def __init__(self, tokenizer, follows):
        self.tokenizer, self.follows, self.calls, self.temperatures = tokenizer, follows, [], set()

    def __call__(self, policy, prompts, num_candidates, settings, *, seeds, eos_ids, pad_id, mix):
        assert mix is None
        self.temperatures.add(settings.temperature)
        texts = [self.tokenizer.decode(p.tolist()) for p in prompts]
        self.calls.append((texts, settings.max_new_tokens, tuple(seeds)))
        return [
            [self._drawn(i, piece, eos_ids[0]) for i, piece in enumerate(self.follows[t][:num_candidates])]
            for t in texts
        ]

    def _drawn(self, i, piece, eos):
        ids = encode(self.tokenizer, piece)
        if piece.endswith("."):
            ids = np.append(ids, np.int32(eos))
        logp = np.full(len(ids), -(i + 1) / 10, dtype=np.float32)
        return Drawn(ids=ids, logp=logp, proposal=logp, finished=piece.endswith("."))


# After "q:" three first steps; what follows the newline of the second, the end too, is no part of the step.
FOLLOWS = {
    "q:": ["red\n", "flat\nred red.", "warm\n"],
    "q:red\n": ["it is red.", "it is flat.", "it is hard."],
    "q:flat\n": ["so blue.", "so red.", "so hard."],
    "q:warm\n": ["then red.", "then blue.", "then hard."],
}


def scripted(tokenizer, monkeypatch, follows=None):
    script = Script(tokenizer, FOLLOWS if follows is None else follows)
    monkeypatch.setattr(sampling_groups, "draw", script)
    return script


def trees_of(tokenizer, live, *prompts, **options):
    options = {"search": SEARCH, "verifier": verifier(), "confidence": None, **options}
    return TreeSearch(**options)([make_prompt(tokenizer, p) for p in prompts], live)


def test_groups_hold_the_step_alone_and_its_context_the_steps_before(tokenizer, live, monkeypatch):
    scripted(tokenizer, monkeypatch)
    first, second = trees_of(tokenizer, live, "q:", search={**options_of(SEARCH), "num_simulations": 16})
    assert (first.key, first.depth, second.key, second.depth) == ("q:", 0, "q:", 1)
    assert (first.context.prefix, second.context.prefix) == ("", "flat\n")
    assert tokenizer.decode(second.context.ids.tolist()) == "q:flat\n"
    assert [c.text for c in first.candidates] == ["red\n", "flat\n", "warm\n"]
    assert [c.text for c in second.candidates] == ["so blue.", "so red.", "so hard."]
    assert [c.finished for c in first.candidates + second.candidates] == [False] * 3 + [True] * 3
    assert second.candidates[0].ids[-1] == tokenizer.eos_token_id
    assert first.unit == "token"
    assert first.origin == ("policy",) * 3
    for group in (first, second):
        for i, candidate in enumerate(group.candidates):
            size = len(candidate.ids)
            assert group.mask[i].tolist() == [True] * size + [False] * (group.mask.shape[1] - size)
            assert group.logp[i, :size].tolist() == pytest.approx([-(i + 1) / 10] * size)
            assert not group.logp[i, size:].any()


def options_of(search):
    return {name: getattr(search, name) for name in Search.__dataclass_fields__}


def test_q_and_visits_follow_the_verifier(tokenizer, live, monkeypatch):
    scripted(tokenizer, monkeypatch)
    first, second = trees_of(tokenizer, live, "q:", search={**options_of(SEARCH), "num_simulations": 16})
    # After 'flat' the first answer is right and found at once; after 'red' all are wrong.
    assert second.verdict.score.tolist() == [1.0, -1.0, -1.0]
    assert first.verdict.score[0] < 0 < first.verdict.score[1]
    assert first.verdict.visits.sum() == 32
    assert first.verdict.visits.argmax() == 1
    assert second.verdict.visits.argmax() == 0


def test_steps_are_drawn_at_the_policys_own_temperature(tokenizer, monkeypatch):
    script = scripted(tokenizer, monkeypatch)
    trees_of(tokenizer, make_live(tokenizer, temperature=0.7), "q:")
    assert script.temperatures == {0.7}


def test_all_trees_are_sampled_in_one_batch(tokenizer, live, monkeypatch):
    follows = FOLLOWS | {key.replace("q:", "p:"): value for key, value in FOLLOWS.items()}
    script = scripted(tokenizer, monkeypatch, follows)
    trees_of(tokenizer, live, "q:", "p:")
    texts, most, seeds = script.calls[0]
    assert texts == ["q:", "p:"]
    assert most == 128
    assert len(set(seeds)) == 2
    assert script.calls[1][0] == ["q:red\n", "p:red\n"]
    everything = [seed for _, _, seeds in script.calls for seed in seeds]
    assert len(set(everything)) == len(everything)


def test_only_trees_that_end_right_are_kept_when_asked(tokenizer, live, monkeypatch):
    wrong = {key.replace("q:", "p:"): ["so red."] * 3 for key in FOLLOWS if key != "q:"} | {
        "p:": FOLLOWS["q:"]
    }
    scripted(tokenizer, monkeypatch, FOLLOWS | wrong)
    options = {"search": {**options_of(SEARCH), "num_simulations": 16}}
    assert [g.key for g in trees_of(tokenizer, live, "p:", "q:", **options)] == ["p:", "p:", "q:", "q:"]
    kept = trees_of(tokenizer, live, "p:", "q:", keep_only_correct=True, **options)
    assert [g.key for g in kept] == ["q:", "q:"]
    assert live.metrics["tree_correct"] == 0.5


def test_an_answer_found_in_its_own_way_is_worth_more_than_a_copy(tokenizer, live, monkeypatch):
    scripted(tokenizer, monkeypatch, FOLLOWS | {"q:warm\n": ["then red."] * 3})
    search = Search(num_simulations=4, num_children=3, max_depth=2)
    for solution, worth in (("flat\nso blue. Therefore it is blue.", 1.0), ("by looking: blue.", 1.25)):
        prompt = make_prompt(tokenizer, "q:", fields={"solution": solution})
        source = TreeSearch(search=search, verifier=verifier(), confidence=None)
        second = source([prompt], live)[1]
        assert second.context.prefix == "flat\n"
        assert second.verdict.score.tolist() == [worth, -1.0, -1.0]


def test_repeated_steps_are_dropped_only_when_asked(tokenizer, live, monkeypatch):
    follows = FOLLOWS | {"q:": ["flat\nred", "flat\nhot", "red\n"]}
    scripted(tokenizer, monkeypatch, follows)
    kept = trees_of(tokenizer, live, "q:")[0]
    dropped = trees_of(tokenizer, live, "q:", repeats="drop")[0]
    assert [c.text for c in kept.candidates] == ["flat\n", "flat\n", "red\n"]
    assert [c.text for c in dropped.candidates] == ["flat\n", "red\n"]
    assert dropped.logp[:, 0].tolist() == pytest.approx([-0.1, -0.3])
    assert TreeSearch(verifier=verifier()).fresh
    assert not TreeSearch(verifier=verifier(), repeats="drop").fresh


def test_the_last_step_can_be_the_rest_of_the_answer(tokenizer, live, monkeypatch):
    follows = FOLLOWS | {"q:flat\n": ["so\nit is\nblue.", "so red.", "so hard."]}
    script = scripted(tokenizer, monkeypatch, follows)
    search = {**options_of(SEARCH), "num_simulations": 16}
    groups = trees_of(tokenizer, live, "q:", search=search, max_final_tokens=50, max_step_tokens=9)
    assert [most for _, most, _ in script.calls][:2] == [9, 50]
    assert groups[1].candidates[0].text == "so\nit is\nblue."
    assert groups[1].candidates[0].finished


def test_a_step_ends_where_a_delimiter_is_complete_after_something(tokenizer):
    def cut(text, delimiter="\n"):
        ids = encode(tokenizer, text)
        return tokenizer.decode(ids[: step_length(ids, tokenizer, delimiter)].tolist())

    assert cut("red\nflat\n") == "red\n"
    assert cut("\n red\nflat") == "\n red\n"
    assert cut("red flat") == "red flat"
    assert cut("red\nflat\n\nwarm", "\n\n") == "red\nflat\n\n"
    assert cut("red; flat; warm", ";") == "red;"


@dataclass(frozen=True)
class Sure:
    """Sure of steps that begin with 'flat'; keeps what it is shown as (prefix, steps)."""

    seen: list = field(default_factory=list)
    gives = frozenset({"score"})
    needs = frozenset()

    def __call__(self, groups, live):
        self.seen.extend((g.context.prefix, [c.text for c in g.candidates]) for g in groups)
        return [
            Verdict(
                score=torch.tensor(
                    [0.9 if (g.context.prefix + c.text).startswith("flat") else 0.1 for c in g.candidates]
                )
            )
            for g in groups
        ]


def test_confidence_judges_siblings_together_after_their_prefix(tokenizer, live, monkeypatch):
    scripted(tokenizer, monkeypatch)
    sure = Sure()
    groups = trees_of(tokenizer, live, "q:", verifier=None, confidence=sure)
    assert sure.seen[:2] == [
        ("", ["red\n", "flat\n", "warm\n"]),
        ("flat\n", ["so blue.", "so red.", "so hard."]),
    ]
    assert groups[0].verdict.score.tolist() == pytest.approx([0.1, 0.9, 0.1])


def test_the_policy_itself_is_asked_by_default_and_shown_the_answer(tokenizer, monkeypatch):
    scripted(tokenizer, monkeypatch)
    live = make_live(tokenizer)
    source = TreeSearch(search=Search(num_simulations=1, root_factor=1, num_children=3, max_depth=2))
    first = source([make_prompt(tokenizer, "q:")], live)[0]
    prompt = make_prompt(tokenizer, "q:")
    asked = self_eval_with_solution().values([(prompt, c) for c in first.candidates], live)
    unvisited = first.verdict.visits == 0
    assert unvisited.sum() == 2
    torch.testing.assert_close(first.verdict.score[unvisited], asked[unvisited])
    assert live.policy.training
    with pytest.raises(ValueError, match=r"shows \{gold\}, and prompt q: has no answer"):
        source([make_prompt(tokenizer, "q:", answer=None)], live)


def test_a_tree_of_the_live_policy_keeps_the_log_probs_of_its_forward_pass(tokenizer):
    live = make_live(tokenizer, temperature=0.7)
    source = TreeSearch(search=SEARCH, max_step_tokens=6)
    prompts = [make_prompt(tokenizer, "red flat"), make_prompt(tokenizer, "warm")]
    groups = source(prompts, live)
    assert {(g.key, g.depth) for g in groups} == {(k, d) for k in ("red flat", "warm") for d in (0, 1)}
    batch = live.port.collate([(g.context, g.candidates) for g in groups])
    with torch.no_grad():
        terms = live.port.terms(live.policy.eval(), batch)
    row = 0
    for group in groups:
        assert group.logp.abs().sum() > 0
        for i in range(group.size):
            size = len(group.candidates[i].ids)
            torch.testing.assert_close(group.logp[i, :size], terms[row, :size], atol=1e-4, rtol=1e-4)
            row += 1
    for group in groups:
        for tokens in (group.context, *group.candidates):
            assert live.port.unpack(
                "context" if tokens is group.context else "candidate", dict(live.port.pack(tokens))
            )


def test_the_same_round_grows_the_same_tree_whatever_is_beside_it(tokenizer):
    def drawn(*texts, round_index=0):
        live = make_live(tokenizer, round_index=round_index)
        source = TreeSearch(search=SEARCH, max_step_tokens=5)
        groups = source([make_prompt(tokenizer, t) for t in texts], live)
        return [[c.ids.tolist() for c in g.candidates] for g in groups if g.key == "warm"]

    assert drawn("warm") == drawn("red flat", "warm")
    assert drawn("warm") != drawn("warm", round_index=1)


def test_what_it_declares_is_what_a_stage_asks_for():
    source = TreeSearch(search={"num_children": 3, "max_depth": 5})
    assert (source.num_candidates, source.groups_per_context) == (3, 5)
    assert source.fresh
    assert source.provides == {"logp", "verdict", "visits"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": {"num_childs": 3}}, "search has no option 'num_childs'; it takes num_simulations"),
        ({"search": {"num_children": 1}}, "search.num_children=1 must be at least 2"),
        ({"keep_only_correct": True}, "keep_only_correct=True needs a verifier"),
        ({"confidence": None}, "confidence and verifier are both None"),
        ({"confidence": {"name": "self_eval", "options": {"labels": ["yes"]}}}, "labels=['yes'] must be two"),
        ({"delimiter": ""}, "delimiter='' must be a text"),
        ({"max_step_tokens": 0}, "max_step_tokens=0 must be at least 1"),
        ({"repeats": "merge"}, "repeats='merge' is not one of keep, drop"),
        ({"verifier": "exact"}, "verifier='exact' is no judge"),
        ({"verifier": {"name": "no such judge"}}, "no judge 'no such judge'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TreeSearch(**options)


def test_judges_that_need_what_a_growing_tree_has_not_are_refused():
    class NeedsReference(Sure):
        needs = frozenset({"ref"})

    class Remembers(Sure):
        remembers = True

    with pytest.raises(ValueError, match="verifier NeedsReference needs ref of groups"):
        TreeSearch(verifier=NeedsReference())
    with pytest.raises(ValueError, match="confidence Remembers remembers what it saw"):
        TreeSearch(confidence=Remembers())


def test_a_verifier_is_built_by_name_and_reads_the_whole_answer(tokenizer, live, monkeypatch):
    scripted(tokenizer, monkeypatch, FOLLOWS | {"q:flat\n": ["is not blue.", "is not red.", "is 4."]})
    search = {**options_of(SEARCH), "num_simulations": 16}
    source = TreeSearch(search=search, confidence=None, verifier={"name": "exact_match"})
    groups = source([make_prompt(tokenizer, "q:", answer="flat is not red.")], live)
    assert groups[1].verdict.score.tolist() == [-1.0, 1.0, -1.0]


def make_stage():
    source = SOURCES.build("tree", {"search": options_of(SEARCH), "max_step_tokens": 4})
    part = Part(
        source=source,
        judge=None,
        shape=SHAPES.build("pairs", {"which": "siblings", "label": "visits"}),
        terms=terms("dpo", beta=0.1),
    )
    return Stage(name="mcts", parts=(part,), keep=Keep(), num_rounds=2, num_contexts=2, modality="llm")


def run(folder, tokenizer, **hook_options):
    live = make_live(tokenizer)
    policy, accelerator, config = live.policy, cpu_accelerator(), optim(lr=0.01)
    frozen = FrozenCopy.of(policy)
    outcome, _ = run_rounds(
        Rounds(
            stages=[make_stage()],
            contexts=[make_prompt(tokenizer, text) for text in ("red flat", "warm", "so it is")],
            port=live.port,
            frozen=frozen,
        ),
        make_learner(policy, config, accelerator),
        config,
        RunConfig(output_dir=str(folder)),
        accelerator,
        identity={},
        hooks=hooks(**hook_options),
    )
    return policy, outcome


def test_mcts_dpo_runs_through_the_rounds_and_goes_on_after_a_stop(tokenizer, tmp_path):
    whole, outcome = run(tmp_path / "whole", tokenizer)
    assert outcome.finished
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round/groups"] for line in lines if "round/groups" in line] == [4.0, 4.0]
    # At the reference every margin is 0, whatever the visits say of the label.
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(math.log(2), abs=1e-4)
    _, cut = run(tmp_path / "cut", tokenizer, stop_after=1)
    assert not cut.finished
    again, _ = run(tmp_path / "cut", tokenizer)
    start = make_live(tokenizer).policy.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in whole.state_dict().items())
