import math
import os
import re
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn

from triptych.modalities.llm.checks import CHECKS, ERRORS, Limited, answer_of, last_number, run_limited
from triptych.modalities.llm.prompts import TURN_BREAK, Completion, Prompt
from triptych.training.groups import Group
from triptych.training.judges import build_judge
from triptych.training.stages import Live

IDS = np.zeros(1, dtype=np.int32)


def live():
    return Live(policy=nn.Identity(), port=None, references={}, device=torch.device("cpu"), seed=0)


def completion(text, **options):
    return Completion(ids=IDS, text=text, **options)


def group(*texts, key="x", **prompt):
    return Group(
        key=key,
        context=Prompt(key=key, ids=IDS, text="?", **prompt),
        candidates=tuple(t if isinstance(t, Completion) else completion(t) for t in texts),
        mask=torch.ones(len(texts), 1, dtype=torch.bool),
    )


def scores(name, options, *texts, **prompt):
    judge = build_judge({"name": name, "options": options}, CHECKS)
    return judge([group(*texts, **prompt)], live())[0].score.tolist()


class TestComparisons:
    def test_exact_match_ignores_case_and_white_space(self):
        assert scores("exact_match", {}, " The  Cat", "the cat.", "cat", answer="the cat") == [1, 0, 0]

    def test_exact_match_can_be_strict_about_case_and_lenient_about_punctuation(self):
        options = {"ignore_case": False, "ignore_punctuation": True}
        assert scores("exact_match", options, "the cat!", "The cat", answer="the, cat") == [1, 0]

    @pytest.mark.parametrize("name", ["exact_match", "number_match"])
    def test_a_prompt_without_an_answer_is_named(self, name):
        with pytest.raises(ValueError, match=r"prompt x of data.jsonl:3 has no answer"):
            scores(name, {}, "a", source="data.jsonl:3")

    def test_the_last_number_counts(self):
        texts = ["3 and 4 make 7", "it is 42.", "so 42.0 in all", "42 of 50", "-42", "none", "$ 42"]
        answer = "6 * 7 = 42\n#### 42"
        assert scores("number_match", {}, *texts, answer=answer) == [0, 1, 1, 0, 0, 0, 1]

    def test_tolerance_is_absolute(self):
        assert scores("number_match", {"tolerance": 0.01}, "3.15", "3.16", answer="3.14") == [1, 0]

    def test_an_answer_without_a_number_is_refused(self):
        with pytest.raises(ValueError, match="the answer 'many' of prompt x has no number"):
            scores("number_match", {}, "1", answer="many")

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1,234,567.50 dollars", "1234567.50"),
            ("5-3", "3"),
            ("x=-3", "-3"),
            ("a\u22127", "7"),
            ("(\u22127)", "-7"),
            ("about .5", "0.5"),
            ("12,34", "34"),
            ("1,2345", "2345"),
            ("3.", "3"),
            ("1/2", "2"),
            ("", None),
        ],
    )
    def test_numbers_as_people_write_them(self, text, number):
        assert last_number(text) == (None if number is None else Decimal(number))

    def test_very_long_numbers_take_no_time(self):
        start = time.monotonic()
        assert last_number("9" * 100_000) == Decimal("9" * 100_000)
        assert last_number("1," * 100_000) == 1
        assert time.monotonic() - start < 2


class TestForm:
    def test_length_counts_words(self):
        texts = ["one", "one two", "one two three four", ""]
        assert scores("length", {"low": 2, "high": 3}, *texts) == [0, 1, 0, 0]
        assert scores("length", {"low": 2}, *texts) == [0, 1, 1, 0]
        assert scores("length", {"high": 1}, *texts) == [1, 0, 0, 1]

    def test_graded_length_falls_with_the_ratio(self):
        texts = ["one", "one two", "one two three", "one two three four five six"]
        assert scores("graded_length", {"low": 2, "high": 3}, *texts) == [0.5, 1, 1, 0.5]

    @pytest.mark.parametrize("options", [{}, {"low": 3, "high": 2}, {"low": -1}, {"high": 0}])
    @pytest.mark.parametrize("name", ["length", "graded_length"])
    def test_a_range_that_nothing_fits_or_everything_is_refused(self, name, options):
        with pytest.raises(ValueError, match="must be 0 <= low <= high"):
            scores(name, options, "a")

    def test_counts_of_words_and_characters(self):
        assert scores("num_words", {}, "one  two") == [2]
        assert scores("num_characters", {}, "one  two") == [8]

    def test_contains_looks_for_whole_words(self):
        texts = ["A red cat.", "redder CATS", "the RED one", "cat"]
        assert scores("contains", {"words": ["red", "cat"]}, *texts) == [1, 0, 0, 0]
        assert scores("contains", {"words": ["red", "cat"], "how": "any"}, *texts) == [1, 0, 1, 1]
        assert scores("contains", {"words": ["red"], "ignore_case": False}, *texts) == [1, 0, 0, 0]
        assert scores("not_contains", {"words": ["red", "cat"]}, *texts) == [0, 1, 0, 0]

    def test_words_are_literal_text(self):
        assert scores("contains", {"words": ["c++", "a.b"]}, "c++ and a.b", "ccc a.b", "c++ axb") == [1, 0, 0]

    @pytest.mark.parametrize("words", [[], "red", [" "]])
    def test_words_are_a_list_of_words(self, words):
        with pytest.raises(ValueError, match="must be a list of at least one word"):
            scores("contains", {"words": words}, "a")

    def test_ends_with_allows_white_space_after(self):
        assert scores("ends_with", {"text": "Bye."}, "So. Bye.\n", "Bye. So", "Bye") == [1, 0, 0]

    def test_letter_case(self):
        texts = ["abc 1", "ABC 1", "Abc", "1"]
        assert scores("lowercase", {}, *texts) == [1, 0, 0, 0]
        assert scores("uppercase", {}, *texts) == [0, 1, 0, 0]

    def test_json_parses_and_has_its_keys(self):
        texts = ['{"a": 1}', "[1, 2]", "{'a': 1}", "NaN", "[" * 100_000, ""]
        assert scores("json", {}, *texts) == [1, 1, 0, 0, 0, 0]
        assert scores("json", {"keys": ["a"]}, *texts) == [1, 0, 0, 0, 0, 0]

    def test_finished_is_about_the_completion(self):
        assert scores("finished", {}, completion("a"), completion("a", finished=False)) == [1, 0]

    def test_vader_knows_good_from_bad(self):
        pytest.importorskip("vaderSentiment")
        good, bad = scores("vader", {}, "A wonderful, lovely film.", "A terrible, boring film.")
        assert bad < -0.3 < 0.3 < good


class TestWhatIsRead:
    def test_a_step_of_a_search_is_read_with_the_steps_before_it(self):
        prompt = Prompt(key="x", ids=IDS, text="?", prefix="first, ")
        assert answer_of(prompt, completion("second")) == "first, second"
        assert scores("exact_match", {}, "b", prefix="a ", answer="a b") == [1]

    def test_of_several_turns_the_last_is_read(self):
        assert scores("exact_match", {}, f"1{TURN_BREAK}2", f"2{TURN_BREAK}1", answer="2") == [1, 0]


def failing(prompt, text):
    """What can go wrong, by the candidate's text."""
    match text.text:
        case "loop":
            while True:
                pass
        case "swallow":
            while True:
                try:
                    time.sleep(10)
                except BaseException:
                    continue
        case "raise":
            raise RuntimeError("no")
        case "exit":
            raise SystemExit(3)
        case "die":
            os._exit(1)
        case "nan":
            return math.nan
        case "nothing":
            return None
    return len(text.text)


class TestLimits:
    def test_a_catastrophic_pattern_gets_zero_and_does_not_hang(self):
        judge = build_judge({"name": "regex", "options": {"pattern": r"(a+)+b$", "seconds": 0.3}}, CHECKS)
        where, start = live(), time.monotonic()
        found = judge([group("aab", "a" * 60, "b"), group("ab")], where)
        assert [v.score.tolist() for v in found] == [[1, 0, 0], [1]]
        assert time.monotonic() - start < 5
        assert where.memory[ERRORS].tolist() == [1, 4]
        assert where.metrics[ERRORS] == 0.25

    def test_a_pattern_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("pattern='(' is no regular expression")):
            build_judge({"name": "regex", "options": {"pattern": "("}}, CHECKS)

    def test_every_way_to_fail_is_survived_and_counted(self, caplog):
        bad = ["loop", "raise", "exit", "die", "nan", "nothing", "swallow"]
        texts = [t for b in bad for t in (b, "four")]
        where = live()
        judge = Limited(fn=failing, seconds=0.3, on_error=-1.0, name="mine")
        start = time.monotonic()
        assert judge([group(*texts)], where)[0].score.tolist() == [-1, 4] * len(bad)
        assert time.monotonic() - start < 10
        assert where.memory[ERRORS].tolist() == [7, 14]
        assert "mine failed on 7 of 14, first: took longer than 0.3 s" in caplog.text

    def test_the_reason_is_told(self):
        items = [(None, completion(t)) for t in ("raise", "exit", "die", "nan", "nothing", "ok")]
        reasons = run_limited(failing, items, seconds=1.0)
        assert reasons[:4] == ["RuntimeError: no", "SystemExit: 3", "the process ended", "returned nan"]
        assert str(reasons[4]).startswith("TypeError")
        assert reasons[5] == 2.0

    def test_the_time_is_that_of_one_candidate_and_not_of_all(self):
        def slow(prompt, text):
            time.sleep(0.1)
            return 1.0

        outcomes = run_limited(slow, [(None, None)] * 6, seconds=0.4)
        assert outcomes == [1.0] * 6

    def test_closures_work_and_leave_no_process_behind(self):
        import multiprocessing

        seen = []
        judge = Limited(fn=lambda prompt, c: seen.append(1) or len(prompt.text + c.text), seconds=2.0)
        assert judge([group("a", "bb")], live())[0].score.tolist() == [2, 3]
        assert seen == []
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fn": "os.system", "seconds": 1}, "fn='os.system' must be a function"),
            ({"fn": failing, "seconds": 0}, "seconds=0 must be positive"),
            ({"fn": failing, "seconds": 1, "on_error": math.nan}, "on_error=nan must be finite"),
        ],
    )
    def test_options_are_checked(self, options, message):
        with pytest.raises(ValueError, match=message):
            build_judge({"name": "python_check", "options": options}, CHECKS)


def test_checks_combine_with_the_judges_of_any_modality():
    short, polite = (
        {"name": "length", "options": {"high": 2}},
        {"name": "contains", "options": {"words": ["please"]}},
    )
    texts = ["please", "please do so now", "now", "do so now then"]
    options = {"of": [short, polite]}
    assert scores("ensemble", options | {"how": "min"}, *texts) == [1, 0, 0, 0]
    assert scores("ensemble", options | {"how": "max"}, *texts) == [1, 1, 1, 0]
    assert scores("combine", options | {"weights": [1, 0.5]}, *texts) == [1.5, 0.5, 1, 0]
    minus = {"of": polite, "what": {"name": "num_words"}, "coefficient": 0.1}
    assert scores("minus", minus, *texts) == pytest.approx([0.9, 0.6, -0.1, -0.4])
