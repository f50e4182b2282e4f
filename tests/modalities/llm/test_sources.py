import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tiny import causal_lm, tokenizer

from triptych.modalities.llm.model import LoraSettings, ModelConfig, adapt
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.port import TextPort
from triptych.modalities.llm.prompts import TURN_BREAK, Completion, Prompt
from triptych.modalities.llm.rows import RowCost
from triptych.modalities.llm.sampling import Drawn
from triptych.modalities.llm.sampling_turns import request_ids
from triptych.modalities.llm.sources import SOURCES, complete, end_ids, own_temperatures
from triptych.training.references import AdapterOff, Snapshot, trained
from triptych.training.stages import Live

TOKENS = tokenizer()
TOKENS.pad_token = TOKENS.eos_token
END = TOKENS.eos_token_id
PLAIN = {"num_candidates": 3, "max_new_tokens": 6}
FOLLOW_UP = " blue warm"


def encoded(text, *, end=False):
    ids = TOKENS(text, add_special_tokens=False)["input_ids"]
    return np.asarray(ids + [END] * end, dtype=np.int32)


def completion(text):
    return Completion(ids=encoded(text, end=True), text=text)


def prompt(text, *answers, relevance=None):
    grades = tuple(float(i) for i in range(len(answers))) if relevance is None else relevance
    return Prompt(
        key=text,
        ids=encoded(text),
        text=text,
        candidates=tuple(map(completion, answers)),
        relevance=grades,
        source=f"file:{text}",
    )


CONTEXTS = [
    prompt("red green", " flat", " cold soft", " round"),
    prompt("blue", " slow"),
    prompt("tall warm red"),
]


def make_policy(seed=3):
    """A model that ends one token in about ten, under an adapter that changes it."""
    model = causal_lm("llama", seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapt(model, ModelConfig(name_or_path="-", lora=LoraSettings(r=2)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    return TokenPolicy(model)


@pytest.fixture(scope="module")
def live():
    policy = make_policy()
    policy.causal_lm.generation_config.eos_token_id = list(range(0, 320, 10))
    snapshot = Snapshot.of(policy)
    for name, parameter in trained(policy).items():
        if "lora_A" in name:
            parameter.data.mul_(-1)
    return Live(
        policy=policy,
        port=TextPort(tokenizer=TOKENS, cost=RowCost(1.0, 0.0)),
        references={"frozen": AdapterOff(), "stage": snapshot},
        device=torch.device("cpu"),
        seed=5,
    )


@torch.no_grad()
def terms(live, group, slot=None):
    """Log-prob of each token of a group's candidates under the policy or a reference, [K, U]."""
    batch = live.port.collate([(group.context, group.candidates)])
    if slot is None:
        return live.port.terms(live.policy, batch)
    return live.references[slot](live.port, live.policy, batch)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def draw(name, live, contexts=CONTEXTS, **options):
    source = SOURCES.build(name, options)
    groups = source(contexts, live)
    assert [g.key for g in groups] == [c.key for c in contexts]
    assert all(g.unit == "token" and g.size <= source.num_candidates for g in groups)
    for g in groups:
        assert ("logp" in source.provides) == (g.logp is not None)
        assert ("proposal" in source.provides) == (g.proposal is not None)
        assert ("verdict" in source.provides) == bool(g.verdict.given())
        assert ("calibration" in source.provides) == ("reference" in g.origin)
        assert g.logp is None or not g.logp[~g.mask].any()
        for row, c in zip(g.mask, g.candidates, strict=True):
            own = np.ones(len(c.ids), dtype=bool) if c.own is None else c.own
            assert row[: len(own)].tolist() == own.tolist()
            assert not row[len(own) :].any()
    return source, groups


def test_samples_of_the_policy_come_with_its_log_probs(live):
    source, groups = draw("policy", live, **PLAIN)
    assert source.fresh
    assert source.provides == {"logp"}
    for g in groups:
        assert g.size == 3
        assert g.origin == ("policy",) * 3
        close(g.logp, terms(live, g))
    for c in (c for g in groups for c in g.candidates):
        assert c.finished == (c.ids[-1] % 10 == 0)
        assert c.text == TOKENS.decode(c.ids.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 2}, {"temperature": 0.0}])
def test_truncated_samples_are_not_fresh_and_have_proposals(live, options):
    source, groups = draw("policy", live, **PLAIN, **options)
    assert not source.fresh
    for g in groups:
        close(g.logp, terms(live, g))
        assert (g.proposal > g.logp.sum(-1)).all()


def test_samples_at_another_temperature_than_the_policys_are_refused_as_its_own(live):
    with pytest.raises(ValueError, match=r"temperature=0.7 of the source is not the policy's own, 1.0"):
        draw("policy", live, **PLAIN, temperature=0.7)
    policy = make_policy()
    policy.temperature = 0.7
    tempered = dataclasses.replace(live, policy=policy)
    _, groups = draw("policy", tempered, **PLAIN, temperature=0.7)
    for g in groups:
        close(g.logp, terms(tempered, g))


def test_rounds_and_seeds_draw_different_samples_and_the_same_round_the_same(live):
    def texts(**changes):
        groups = draw("policy", dataclasses.replace(live, **changes), **PLAIN)[1]
        return [c.ids.tolist() for g in groups for c in g.candidates]

    assert texts() == texts()
    assert len({str(texts(**c)) for c in ({}, {"round": 1}, {"stage": 1}, {"seed": 6})}) == 4


@pytest.mark.parametrize("slot", ["frozen", "stage"])
def test_samples_of_a_reference_have_its_log_probs_as_proposals(live, slot):
    source, groups = draw("reference", live, **PLAIN, slot=slot)
    assert not source.fresh
    for g in groups:
        assert g.origin == ("reference",) * 3
        close(g.proposal, terms(live, g, slot).sum(-1))
        assert (g.proposal - terms(live, g).sum(-1)).abs().min() > 1e-3


@pytest.mark.parametrize("slot", ["frozen", "stage"])
def test_a_blend_lies_between_policy_and_reference(live, slot):
    source, groups = draw("blend", live, **PLAIN, slot=slot, weight=0.4)
    assert not source.fresh
    for g in groups:
        assert g.origin == ("blend",) * 3
        close(g.logp, terms(live, g))
        # The mixture's normaliser is at most 1 (Hoelder), so its log-probs are at least the mean ones.
        between = 0.6 * terms(live, g).sum(-1) + 0.4 * terms(live, g, slot).sum(-1)
        assert (g.proposal >= between - 1e-4).all()
        assert (g.proposal - between).max() > 1e-2


def test_an_absent_reference_is_named_with_those_there_are(live):
    for name, options in (("reference", {}), ("blend", {"weight": 0.5})):
        with pytest.raises(
            ValueError, match="slot='ema' holds no reference in this round; there are: frozen, stage"
        ):
            draw(name, live, **PLAIN, slot="ema", **options)


def test_data_give_their_candidates_and_grades(live):
    _, groups = draw("data", live, CONTEXTS[:2], num_candidates=3)
    assert [g.verdict.score.tolist() for g in groups] == [[0.0, 1.0, 2.0], [0.0]]
    assert [c.text for c in groups[0].candidates] == [" flat", " cold soft", " round"]
    assert groups[0].origin == ("data",) * 3


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (prompt("red"), "prompt file:red has 0 candidates and 0 grades"),
        (prompt("red", " a", " b", " c"), "has 3 candidates and 3 grades; num_candidates=2 allows 1 to 2"),
        (prompt("red", " a", " b", relevance=(1.0,)), "has 2 candidates and 1 grades"),
    ],
)
def test_data_that_do_not_fit_are_refused(live, context, message):
    with pytest.raises(ValueError, match=message):
        draw("data", live, [context], num_candidates=2)


def test_a_mixture_holds_the_candidates_of_its_sources_with_what_is_known_of_each(live):
    parts = [
        {"name": "policy", "options": {"num_candidates": 2, "max_new_tokens": 8}},
        {"name": "reference", "options": {"num_candidates": 1, "max_new_tokens": 3, "slot": "frozen"}},
    ]
    source, groups = draw("mixed", live, sources=parts)
    assert (source.fresh, source.num_candidates) == (False, 3)
    for g in groups:
        assert g.origin == ("policy", "policy", "reference")
        close(g.logp[:2], terms(live, g)[:2])
        assert not g.logp[2].any()
        close(g.proposal[:2], g.logp[:2].sum(-1))
        close(g.proposal[2], terms(live, g, "frozen").sum(-1)[2])


def test_two_equal_sources_of_a_mixture_draw_different_samples(live):
    part = {"name": "policy", "options": {"num_candidates": 1, "max_new_tokens": 8}}
    source, groups = draw("mixed", live, sources=[part, part])
    assert source.fresh
    assert any(len({c.ids.tobytes() for c in g.candidates}) == 2 for g in groups)


def test_a_teacher_adds_the_best_answer_of_the_data_and_takes_the_log_probs_away(live):
    graded = [prompt("red", " flat", " cold", " slow", relevance=(0.1, 0.9, 0.5))]
    source, (group,) = draw(
        "with_teacher", live, graded, source={"name": "policy", "options": PLAIN}, num_teachers=2
    )
    assert (source.fresh, source.num_candidates) == (False, 5)
    assert group.origin == ("policy",) * 3 + ("teacher",) * 2
    assert [c.text for c in group.candidates[3:]] == [" cold", " slow"]
    with pytest.raises(ValueError, match="no log-probs of drawing"):
        group.drawn_logp()
    with pytest.raises(
        ValueError, match="prompt file:tall warm red has 0 answers in the data, and num_teachers=2"
    ):
        source(CONTEXTS[2:], live)


def test_a_source_in_a_mixture_is_checked_as_any_other():
    with pytest.raises(ValueError, match=r"no source 'polcy'\. Did you mean 'policy'"):
        SOURCES.build("mixed", {"sources": [{"name": "polcy"}]})
    with pytest.raises(ValueError, match="needs 'max_new_tokens'"):
        SOURCES.build("with_teacher", {"source": {"name": "policy", "options": {"num_candidates": 2}}})
    with pytest.raises(ValueError, match="is no source: it takes name and options"):
        SOURCES.build("mixed", {"sources": [{"name": "policy", "option": {}}]})
    with pytest.raises(ValueError, match="at least two sources, not 1"):
        SOURCES.build("mixed", {"sources": [{"name": "policy", "options": PLAIN}]})


def test_the_temperatures_of_a_sources_own_samples_are_known():
    own = {"name": "policy", "options": PLAIN | {"temperature": 0.7}}
    other = {"name": "reference", "options": PLAIN | {"slot": "frozen", "temperature": 0.2}}
    turns = {"name": "turns", "options": PLAIN | {"follow_up": "x", "temperature": 0.9}}
    built = SOURCES.build("mixed", {"sources": [own, other, turns]})
    assert own_temperatures(built) == {0.7, 0.9}
    assert own_temperatures(SOURCES.build("policy", PLAIN | {"top_k": 3})) == frozenset()


def turns_of(live, contexts=CONTEXTS, **options):
    settings = PLAIN | {"follow_up": FOLLOW_UP} | options
    return draw("turns", live, contexts, **settings)


def pieces(candidate):
    """The runs of tokens with the same turn and owner: (turn, own, ids)."""
    found = []
    for token, turn, own in zip(candidate.ids.tolist(), candidate.turns, candidate.own, strict=True):
        if not found or found[-1][:2] != (turn, own):
            found.append((turn, own, []))
        found[-1][2].append(token)
    return found


REQUEST = encoded("<|end|><|user|>" + FOLLOW_UP + "<|end|><|assistant|>").tolist()


def check_turns(live, groups, num_turns):
    for g in groups:
        assert g.turn.shape == g.mask.shape
        close(g.logp, torch.where(g.mask, terms(live, g), 0.0))
        for row, c in zip(g.turn, g.candidates, strict=True):
            assert row[: len(c.ids)].tolist() == c.turns.tolist()
            found = pieces(c)
            assert [p[:2] for p in found] == [
                (t, own) for t in range(num_turns) for own in ((False, True) if t else (True,))
            ]
            for before, (_, own, ids) in itertools.pairwise(found):
                ended = before[2][-1] == END
                assert own or ids == REQUEST[ended:]
            assert c.turn_texts() == tuple(
                TOKENS.decode(ids, skip_special_tokens=True).replace(TURN_BREAK, " ")
                for _, own, ids in found
                if own
            )


@pytest.mark.parametrize("num_turns", [2, 3])
def test_turns_hold_the_policys_answers_with_the_request_between_them_masked(live, num_turns):
    source, groups = turns_of(live, num_turns=num_turns)
    assert source.fresh
    check_turns(live, groups, num_turns)
    ended = [p[0][2][-1] == END for g in groups for p in map(pieces, g.candidates)]
    assert len({c.ids.tobytes() for g in groups for c in g.candidates}) == 9
    assert not all(ended)


def test_an_answer_that_ended_is_not_ended_again(live):
    eager = dataclasses.replace(
        live, port=TextPort(tokenizer=TOKENS, cost=RowCost(1.0, 0.0)), policy=make_policy()
    )
    head = eager.policy.causal_lm.lm_head
    head.weight.data[END] = 4 * head.weight.data.mean(0)
    for seed in range(8):
        _, groups = turns_of(dataclasses.replace(eager, seed=seed), max_new_tokens=40)
        check_turns(eager, groups, 2)
        if any(pieces(c)[0][2][-1] == END for g in groups for c in g.candidates):
            return
    raise AssertionError("no first answer ended by itself")


def test_without_a_template_the_request_is_plain_text():
    bare = tokenizer(template=None)
    assert request_ids(FOLLOW_UP, bare, chat="auto").tolist() == encoded(FOLLOW_UP).tolist()
    assert request_ids(FOLLOW_UP, TOKENS, chat="never").tolist() == encoded(FOLLOW_UP).tolist()
    assert request_ids(FOLLOW_UP, TOKENS, chat="auto").tolist() == REQUEST
    with pytest.raises(ValueError, match="chat=always, but the tokenizer has no chat template"):
        request_ids(FOLLOW_UP, bare, chat="always")


def test_a_template_that_cannot_continue_is_refused():
    refuses = tokenizer(template="{{ raise_exception('one turn only') }}")
    with pytest.raises(ValueError, match=r"refuses a second turn \(one turn only\); chat=never does without"):
        request_ids(FOLLOW_UP, refuses, chat="auto")
    forgets = tokenizer(template="{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="does not keep the first answer"):
        request_ids(FOLLOW_UP, forgets, chat="auto")


def test_a_first_answer_of_the_data_is_the_same_for_the_group_and_not_learned(live):
    source, groups = turns_of(live, CONTEXTS[:2], first="data")
    assert source.fresh
    for g, context in zip(groups, CONTEXTS, strict=False):
        answers = [c.ids.tolist() for c in context.candidates]
        found = [pieces(c) for c in g.candidates]
        assert len({tuple(p[0][2]) for p in found}) == 1
        assert len({tuple(p[-1][2]) for p in found}) == 3
        for p in found:
            assert [q[:2] for q in p] == [(0, False), (1, False), (1, True)]
            assert p[0][2] in answers
            assert p[1][2] == REQUEST[1:]
        close(g.logp, torch.where(g.mask, terms(live, g), 0.0))
        assert all(c.turn_texts()[0] in [a.text for a in context.candidates] for c in g.candidates)
    chosen = {
        tuple(
            turns_of(dataclasses.replace(live, round=r), CONTEXTS[:1], first="data")[1][0]
            .candidates[0]
            .ids[:3]
        )
        for r in range(8)
    }
    assert len(chosen) > 1
    with pytest.raises(ValueError, match="prompt file:tall warm red has no answer in the data"):
        turns_of(live, first="data")


def test_first_answers_of_a_reference_are_its_own_and_not_learned(live):
    _, groups = turns_of(live, first="reference", slot="frozen")
    for g in groups:
        assert len({tuple(pieces(c)[0][2]) for c in g.candidates}) == 3
        assert all([p[:2] for p in pieces(c)] == [(0, False), (1, False), (1, True)] for c in g.candidates)
        close(g.logp, torch.where(g.mask, terms(live, g), 0.0))
    _, of_stage = turns_of(live, first="reference", slot="stage")
    firsts = [[pieces(c)[0][2] for g in found for c in g.candidates] for found in (groups, of_stage)]
    assert firsts[0] != firsts[1]


def test_truncated_turns_have_the_proposals_of_what_the_policy_drew(live):
    source, groups = turns_of(live, first="data", contexts=CONTEXTS[:2], top_k=1)
    assert not source.fresh
    assert all(torch.equal(g.proposal, torch.zeros(3)) for g in groups)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_turns": 1}, "num_turns=1 must be at least 2"),
        ({"follow_up": ""}, "follow_up=''"),
        ({"first": "teacher"}, "first='teacher' is not one of policy, data, reference"),
        ({"first": "reference"}, "slot=None goes with first=reference"),
        ({"slot": "frozen"}, "slot='frozen' goes with first=reference, and with it only"),
        ({"chat": "perhaps"}, "chat='perhaps' is not one of"),
        ({"num_candidates": 0}, "num_candidates=0 must be at least 1"),
        ({"top_p": 2.0}, r"top_p=2.0 must be in \(0, 1\]"),
    ],
)
def test_options_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SOURCES.build("turns", PLAIN | {"follow_up": "x"} | wrong)


@pytest.mark.parametrize("name", ["policy", "reference", "blend", "data"])
def test_every_source_refuses_no_candidates(name):
    options = {
        "policy": PLAIN,
        "reference": PLAIN | {"slot": "frozen"},
        "blend": PLAIN | {"slot": "frozen", "weight": 0.5},
        "data": {},
    }[name]
    with pytest.raises(ValueError, match="num_candidates=0 must be at least 1"):
        SOURCES.build(name, options | {"num_candidates": 0})


def test_a_blend_without_the_reference_is_refused():
    with pytest.raises(
        ValueError, match=r"weight=0 must be in \(0, 1\]; the policy alone is source 'policy'"
    ):
        SOURCES.build("blend", PLAIN | {"slot": "frozen", "weight": 0})


def test_text_never_holds_the_sign_that_divides_turns():
    ids = encoded(f"red{TURN_BREAK}blue", end=True)
    zeros = np.zeros(len(ids), dtype=np.float32)
    made = complete(Drawn(ids=ids, logp=zeros, proposal=zeros, finished=True), TOKENS)
    assert made.text == "red blue"
    assert made.turn_texts() == ("red blue",)
    assert made.ids is ids
    assert made.finished


def test_an_answer_ends_where_tokenizer_or_model_say_so(live):
    assert end_ids(TOKENS, live.policy.causal_lm) == tuple(range(0, 320, 10))
    model = causal_lm("llama")
    model.generation_config.eos_token_id = 7
    assert end_ids(TOKENS, model) == (0, 7)
    model.generation_config.eos_token_id = None
    assert end_ids(TOKENS, model) == (0,)
