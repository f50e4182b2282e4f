import numpy as np
import pytest
import tiny

from triptych.modalities.llm.data import DataConfig
from triptych.modalities.llm.instructions import REQUESTS, TOPICS, InstructionSettings, instruction_records
from triptych.modalities.llm.prompt_data import last_user_text, load_prompts
from triptych.modalities.llm.turns import Message
from triptych.training.quarantine import Quarantine


def load(source, **settings):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    lines = []
    config = DataConfig(source=str(source), **settings)
    return load_prompts(config, tokenizer, Quarantine(None), seed=0, report=lines.append), lines


def test_the_built_in_requests_hold_out_whole_topics():
    found, lines = load("instructions")
    assert len(found.train) == (len(TOPICS) - 20) * len(REQUESTS)
    assert len(found.held_out) == 20 * len(REQUESTS)
    topics = {p.fields["category"] for p in found.train}
    assert not topics & set(found.clusters)
    assert len(set(found.clusters)) == 20
    assert len({p.key for p in (*found.train, *found.held_out)}) == len(TOPICS) * len(REQUESTS)
    assert lines[0] == "prompts: instructions (built in), 300 to draw for, 100 held out"
    first = found.train[0]
    text = tiny.tokenizer().decode(first.ids)
    assert text == f"<|user|>{first.text}<|end|><|assistant|>"


def test_a_suffix_is_added_to_every_request():
    train, held_out = instruction_records(InstructionSettings(suffix="Be brief.", eval_topics=1))
    assert all(
        last_user_text(r.prompt).endswith(". Be brief.") or "? Be brief." in last_user_text(r.prompt)
        for r in (*train, *held_out)
    )
    assert len(held_out) == len(REQUESTS)
    with pytest.raises(ValueError, match=r"data\.instructions\.eval_topics=80 must be in \[1, 79\]"):
        InstructionSettings(eval_topics=80)


def test_prompts_alone_with_answers_are_read_from_a_file(tmp_path):
    rows = [{"prompt": f"red {i}", "answer": str(i), "category": f"c{i % 3}"} for i in range(20)]
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    found, _ = load(path, eval_fraction=0.3)
    everything = (*found.train, *found.held_out)
    assert sorted(int(p.answer) for p in everything) == list(range(20))
    assert all(p.candidates == () and p.text == f"red {p.answer}" for p in everything)
    assert found.held_out
    assert set(found.clusters) <= {"c0", "c1", "c2"}
    assert everything[0].source.startswith("prompts.jsonl:")


def test_pairs_keep_their_candidates_for_sources_of_data(tmp_path):
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pair_rows(12))
    found, _ = load(path, eval_fraction=0.2)
    prompt = found.train[0]
    assert prompt.relevance == (1.0, 0.0)
    assert len(prompt.candidates) == 2
    assert all(int(c.ids[-1]) == 0 and c.finished for c in prompt.candidates)
    assert "<|end|>" not in prompt.candidates[0].text
    assert np.issubdtype(prompt.ids.dtype, np.int32)


def test_the_fingerprint_depends_on_prompts_and_answers(tmp_path):
    rows = [{"prompt": f"red {i}", "answer": str(i)} for i in range(6)]
    one = load(tiny.write_jsonl(tmp_path / "a.jsonl", rows))[0].fingerprint
    same = load(tiny.write_jsonl(tmp_path / "b.jsonl", rows))[0].fingerprint
    rows[0]["answer"] = "7"
    other = load(tiny.write_jsonl(tmp_path / "c.jsonl", rows))[0].fingerprint
    assert one == same != other


def test_the_last_question_is_what_the_user_asked_last():
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert last_user_text(turns) == "three"
    assert last_user_text("plain") == "plain"
    assert last_user_text((Message("system", "rules"),)) == "rules"
