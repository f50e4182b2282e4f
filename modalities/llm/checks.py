"""Verifiable checks of text as judges: an answer is compared, counted or run, and no model is asked.

A check reads the whole answer: the text before a step of a tree search and the step, and of several turns
the last.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import re
import string
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import torch

from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.rewards import vader as vader_measure

# Through the last of them, so that every judge of any modality is registered by now.
from triptych.training.drift import JUDGES as GENERAL
from triptych.training.groups import Group, Verdict
from triptych.training.judging import Scored, check_choice, count
from triptych.training.plugs import Registry
from triptych.training.stages import Judge, Live

CHECKS: Registry[Judge] = Registry("judge", base=GENERAL)
ERRORS = "judge/errors"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER = re.compile(rf"(?:(?<![\w.)])-)?{_DIGITS}|(?<![\w.])-?\.[0-9]+")
_START_SECONDS = 60.0
_log = logging.getLogger(__name__)


def answer_of(prompt: Prompt, completion: Completion) -> str:
    """The text that a check reads: the prompt's prefix and the completion, or the last of several turns."""
    turns = completion.turn_texts()
    return prompt.prefix + turns[0] if len(turns) == 1 else turns[-1]


def text_check(name: str, check: Callable[[Prompt, str], float]) -> Scored:
    """A function of prompt and answer text as a judge."""

    def measure(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [float(check(prompt, answer_of(prompt, c))) for c in completions]

    return Scored(measure=measure, name=name)


def _expected(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.key} of {prompt.source or 'no source'} has no answer to compare with"
        )
    return prompt.answer


@CHECKS.register("exact_match")
def exact_match(*, ignore_case: bool = True, ignore_punctuation: bool = False) -> Scored:
    """1 if the text is the prompt's answer, up to white space, else 0."""

    def normalised(text: str) -> str:
        if ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        return " ".join((text.casefold() if ignore_case else text).split())

    return text_check("exact_match", lambda p, text: normalised(text) == normalised(_expected(p)))


def last_number(text: str) -> Decimal | None:
    """The last number in the text: sign, thousands separated by commas, decimal point; 1/2 is two numbers."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


@CHECKS.register("number_match")
def number_match(*, tolerance: float = 0.0) -> Scored:
    """1 if the last number of the text is the last one of the prompt's answer, within `tolerance`, else 0."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0")
    slack = Decimal(str(tolerance))

    def check(prompt: Prompt, text: str) -> bool:
        expected, found = last_number(_expected(prompt)), last_number(text)
        if expected is None:
            raise ValueError(f"the answer {prompt.answer!r} of prompt {prompt.key} has no number")
        return found is not None and (found == expected or abs(found - expected) <= slack)

    return text_check("number_match", check)


def _words_in_range(low: int, high: int | None) -> None:
    if low < 0 or (high is not None and high < max(low, 1)) or (low == 0 and high is None):
        raise ValueError(
            f"low={low} and high={high} must be 0 <= low <= high, one of them given and positive"
        )


@CHECKS.register("length")
def length(*, low: int = 0, high: int | None = None) -> Scored:
    """1 if the text has low to high words, else 0."""
    _words_in_range(low, high)
    return text_check(
        "length", lambda _, text: low <= len(text.split()) and (high is None or len(text.split()) <= high)
    )


@CHECKS.register("graded_length")
def graded_length(*, low: int = 0, high: int | None = None) -> Scored:
    """1 for low to high words, words / low below, high / words above."""
    _words_in_range(low, high)

    def check(_: Prompt, text: str) -> float:
        words = len(text.split())
        if words < low:
            return words / low
        return 1.0 if high is None or words <= high else high / words

    return text_check("graded_length", check)


@CHECKS.register("num_words")
def num_words() -> Scored:
    """Number of words; a penalty through `minus` or `combine`."""
    return text_check("num_words", lambda _, text: len(text.split()))


@CHECKS.register("num_characters")
def num_characters() -> Scored:
    """Number of characters, as RLHF Workflow's length penalty counts them."""
    return text_check("num_characters", lambda _, text: len(text))


def _finder(words: Sequence[str], ignore_case: bool) -> list[re.Pattern[str]]:
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise ValueError(f"words={words!r} must be a list of at least one word or phrase")
    flags = re.IGNORECASE if ignore_case else 0
    return [re.compile(rf"(?<!\w){re.escape(w)}(?!\w)", flags) for w in words]


@CHECKS.register("contains")
def contains(*, words: Sequence[str], how: Literal["all", "any"] = "all", ignore_case: bool = True) -> Scored:
    """1 if all of these words or phrases (or any of them) stand in the text as whole words, else 0."""
    check_choice("how", how, ("all", "any"))
    patterns, test = _finder(words, ignore_case), all if how == "all" else any
    return text_check("contains", lambda _, text: test(p.search(text) is not None for p in patterns))


@CHECKS.register("not_contains")
def not_contains(*, words: Sequence[str], ignore_case: bool = True) -> Scored:
    """1 if none of these words or phrases stands in the text as a whole word, else 0."""
    patterns = _finder(words, ignore_case)
    return text_check("not_contains", lambda _, text: not any(p.search(text) for p in patterns))


@CHECKS.register("ends_with")
def ends_with(*, text: str) -> Scored:
    """1 if the answer ends with this text, white space after it aside, else 0."""
    if not text.strip():
        raise ValueError(f"text={text!r} must not be empty")
    return text_check("ends_with", lambda _, answer: answer.rstrip().endswith(text.rstrip()))


@CHECKS.register("lowercase")
def lowercase() -> Scored:
    """1 if the text has letters and none of them is upper case, else 0."""
    return text_check("lowercase", lambda _, text: text.islower())


@CHECKS.register("uppercase")
def uppercase() -> Scored:
    """1 if the text has letters and none of them is lower case, else 0."""
    return text_check("uppercase", lambda _, text: text.isupper())


@CHECKS.register("json")
def parses_as_json(*, keys: Sequence[str] = ()) -> Scored:
    """1 if the text is JSON, without NaN and Infinity, and an object with all keys; else 0."""
    if isinstance(keys, str):
        raise ValueError(f"keys={keys!r} must be a list")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def check(_: Prompt, text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError):
            return False
        return not keys or (isinstance(value, dict) and all(k in value for k in keys))

    return text_check("json", check)


@CHECKS.register("finished")
def finished() -> Scored:
    """1 for a completion that came to an end by itself, 0 for one that was cut off."""
    return Scored(measure=lambda _, completions: [float(c.finished) for c in completions], name="finished")


@CHECKS.register("vader")
def vader() -> Scored:
    """VADER's sentiment, in [-1, 1]; see `rewards.vader`."""
    measure = vader_measure()
    return Scored(
        measure=lambda prompt, completions: measure([answer_of(prompt, c) for c in completions]), name="vader"
    )


@CHECKS.register("regex")
def regex(*, pattern: str, seconds: float = 1.0) -> Limited:
    """1 if the pattern is found in the text, else 0; a search that takes longer counts as an error and 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error

    def check(prompt: Prompt, completion: Completion) -> float:
        return float(compiled.search(answer_of(prompt, completion)) is not None)

    return Limited(fn=check, seconds=seconds, name="regex")


@CHECKS.register("python_check")
@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """Any function (prompt, completion) -> number, in a process of its own with a time limit a candidate.

    A candidate on which it takes longer, raises, ends the process or returns no finite number gets on_error,
    and is counted as [errors, candidates] in memory under 'judge/errors'. The process is a fork, so fn may be
    a closure and what it changes is lost; it must use neither a GPU nor the threads of torch. It keeps
    mistakes from stopping a run; it is no sandbox for code that nobody has read.
    """

    fn: Callable[[Prompt, Completion], float]
    seconds: float
    on_error: float = 0.0
    name: str = "python_check"

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ValueError(f"fn={self.fn!r} must be a function (prompt, completion) -> number")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ValueError(f"seconds={self.seconds} must be positive")
        if not math.isfinite(self.on_error):
            raise ValueError(f"on_error={self.on_error} must be finite")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores, one candidate after the other."""
        items = [(g.context, c) for g in groups for c in g.candidates]
        outcomes = run_limited(self.fn, items, seconds=self.seconds)
        reasons = [o for o in outcomes if isinstance(o, str)]
        if reasons:
            _log.warning("%s failed on %d of %d, first: %s", self.name, len(reasons), len(items), reasons[0])
        count(live, ERRORS, len(reasons), len(items))
        scores = torch.tensor([self.on_error if isinstance(o, str) else o for o in outcomes])
        return [Verdict(score=part) for part in scores.split([g.size for g in groups])]


def run_limited(
    fn: Callable[[Any, Any], float], items: Sequence[tuple[Any, Any]], *, seconds: float
) -> list[float | str]:
    """fn of each item, or the reason why there is no finite number; a process that hangs is replaced."""
    outcomes: list[float | str] = []
    while len(outcomes) < len(items):
        outcomes += _until_stopped(fn, items[len(outcomes) :], seconds)
    return outcomes


def _until_stopped(
    fn: Callable[[Any, Any], float], items: Sequence[tuple[Any, Any]], seconds: float
) -> list[float | str]:
    """Outcomes of one process: of all items, or up to the one at which it had to be stopped."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(fn, items, theirs), daemon=True)
    with warnings.catch_warnings():
        # Newer Pythons warn of forks beside threads; the child touches none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    outcomes: list[float | str] = []
    try:
        limit = _START_SECONDS
        while len(outcomes) < len(items):
            if not ours.poll(limit):
                outcomes.append(f"took longer than {limit:g} s")
                break
            # JSON and not `recv`, which would unpickle.
            found = json.loads(ours.recv_bytes())
            if found is not None:
                outcomes.append(found)
            limit = seconds
    except EOFError:
        outcomes.append("the process ended")
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
    return outcomes


def _work(fn: Callable[[Any, Any], float], items: Sequence[tuple[Any, Any]], results: Any) -> None:
    """In the child: null when it runs, then a number or a reason for each item, as JSON."""
    results.send_bytes(b"null")
    for prompt, completion in items:
        found: float | str
        try:
            found = float(fn(prompt, completion))
            if not math.isfinite(found):
                found = f"returned {found}"
        except BaseException as error:
            found = f"{type(error).__name__}: {str(error)[:200]}"
        results.send_bytes(json.dumps(found).encode())
