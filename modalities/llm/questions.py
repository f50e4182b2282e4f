"""Questions to a language model as judge: templates, prompts, and answers read from labels' probabilities.

A question goes through the tokenizer's chat template where it has one. Its answer is one of a few labels,
whose log-probs are all that is computed, so that nothing is sampled.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.rendering import sequence_start
from triptych.modalities.llm.rows import candidate_key
from triptych.training.order import key, longest_first
from triptych.training.references import unchanged, unwrapped
from triptych.training.stages import Live

Item = tuple[Prompt, Sequence[Completion]]

PAIRWISE = """Here are a request and two answers to it. Which answer is more helpful, correct and honest?

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with the letter of the better answer, A or B."""

POINTS = """Rate the answer to the request below. Start from 0 and add one point for each that is true:
- it is relevant to the request;
- it covers a good part of what was asked;
- it answers what was asked in a useful way;
- it is clear, well organised and complete;
- it shows expert knowledge and has nothing that is not needed.

Request:
{prompt}

Answer:
{answer}

Reply with the number of points, 0 to 5."""

STEP = """Below are a problem and a solution, perhaps unfinished. Is its last step correct?

Problem:
{prompt}

Solution so far:
{answer}

Reply yes or no."""

STEP_WITH_SOLUTION = """Below are a problem, its correct solution, and another solution, perhaps unfinished.
Is the last step of the other solution correct?

Problem:
{prompt}

Correct solution:
{gold}

Other solution so far:
{answer}

Reply yes or no."""


def token_logps(
    items: Sequence[Item], live: Live, *, slot: str | None, batch_size: int
) -> list[list[Tensor]]:
    """Log-prob of every token of every completion, by item and completion, [its own tokens] each, on the CPU.

    batch_size: items at a time. ValueError for a slot that this run does not have.
    """
    if slot is not None and slot not in live.references:
        have = ", ".join(sorted(live.references)) or "none"
        raise ValueError(f"slot='{slot}' is no reference of this run; there are: {have}")
    found: list[list[Tensor]] = [[] for _ in items]
    order = longest_first([len(p.ids) + sum(len(c.ids) for c in cs) for p, cs in items])
    for start in range(0, len(order), batch_size):
        chosen = [items[i] for i in order[start : start + batch_size]]
        batch = live.port.collate(chosen, [key("judge", live.seed, p.key) for p, _ in chosen]).to(live.device)
        with unchanged(live.policy), torch.no_grad():
            if slot is None:
                terms = live.port.terms(unwrapped(live.policy), batch)
            else:
                terms = live.references[slot](live.port, live.policy, batch)
        rows = iter(terms.detach().float().cpu())
        for i in order[start : start + batch_size]:
            found[i] = [next(rows)[: len(c.ids)] for c in items[i][1]]
    return found


def check_batch(batch_size: int) -> None:
    """ValueError unless it is at least 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def check_template(name: str, template: str, *required: str, optional: tuple[str, ...] = ()) -> None:
    """ValueError unless the template's placeholders are the required ones and perhaps the optional ones."""
    needed = ", ".join(f"{{{r}}}" for r in required)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}; its placeholders are {needed}, other braces are doubled"
        ) from error
    found = placeholders(template)
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"{name}: placeholders take no format; they are {needed}")
    for placeholder in required:
        if placeholder not in found:
            raise ValueError(f"{name} lacks {{{placeholder}}}; it needs {needed}")
    if extra := sorted(found - {*required, *optional}):
        known = ", ".join(f"{{{r}}}" for r in (*required, *optional))
        raise ValueError(f"{name} has {{{extra[0]}}}, which is unknown; placeholders are {known}")


def placeholders(template: str) -> set[str]:
    """Names of what a template is filled with."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def filled(tokenizer: Any, template: str, texts: Mapping[str, str]) -> str:
    """The template with these texts, out of which the tokenizer's special tokens are taken.

    An answer that spells the end of a turn could otherwise speak in the judge's name.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = sorted((str(t) for t in added if t.special and str(t)), key=len, reverse=True)

    def plain(text: str) -> str:
        while any(s in text for s in special):
            for s in special:
                text = text.replace(s, "")
        return text

    return template.format(**{name: plain(text) for name, text in texts.items()})


def judge_prompt(tokenizer: Any, text: str, *, lead: str = "") -> Prompt:
    """The text as a user's message, answered as far as `lead`; without a chat template, as plain text."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = encoded(tokenizer, whole + lead)
    else:
        ids = sequence_start(tokenizer) + encoded(tokenizer, f"{text}\n{lead}")
    return prompt_of(ids, text)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text and nothing around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_of(ids: Sequence[int], text: str) -> Prompt:
    """These token ids as a prompt, named by their content."""
    array = np.asarray(ids, dtype=np.int32)
    return Prompt(key=candidate_key(array, np.zeros(0, dtype=np.int32)), ids=array, text=text)


def completion_of(tokenizer: Any, text: str) -> Completion:
    """The text as a completion, without an end; ValueError where it has no token."""
    ids = np.asarray(encoded(tokenizer, text), dtype=np.int32)
    if not len(ids):
        raise ValueError(f"{text!r} has no token")
    return Completion(ids=ids, text=text)


def reply_header(tokenizer: Any) -> str:
    """What stands between an answer and the user's next words: the template's own, or a plain transcript's.

    ValueError for a chat template that does not show both as they are.
    """
    if not tokenizer.chat_template:
        return "\n\nHuman:"
    answer, reply = "@@ANSWER@@", "@@REPLY@@"
    turns = [("user", "Hello"), ("assistant", answer), ("user", reply)]
    messages = [{"role": role, "content": text} for role, text in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if whole.count(answer) != 1 or whole.count(reply) != 1:
        raise ValueError("the chat template does not show an answer and the user's reply to it as they are")
    return whole.partition(answer)[2].partition(reply)[0]


def before_reply(tokenizer: Any, prompt: Prompt, completion: Completion) -> Prompt:
    """Prompt and completion up to the user's next words; the header's end of a turn replaces the answer's."""
    header = encoded(tokenizer, reply_header(tokenizer))
    ids = completion.ids
    if len(ids) and ids[-1] in (tokenizer.eos_token_id, header[0]):
        ids = ids[:-1]
    return prompt_of([*prompt.ids.tolist(), *ids.tolist(), *header], prompt.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How a judge is asked: labels it may answer after `lead`, each after a space unless lead is empty."""

    labels: tuple[str, ...]
    lead: str
    slot: str | None
    batch_size: int

    def __post_init__(self) -> None:
        check_batch(self.batch_size)
        if len(set(self.labels)) < max(2, len(self.labels)) or not all(self.labels):
            raise ValueError(f"labels={list(self.labels)} must be at least two different texts")

    def __call__(self, texts: Sequence[str], live: Live) -> Tensor:
        """Probability of each label among the labels, [number of texts, labels].

        A label of several tokens counts with the product of theirs. A text that comes twice is asked once.
        """
        tokenizer, space = live.port.tokenizer, " " if self.lead else ""
        labels = [completion_of(tokenizer, f"{space}{label}") for label in self.labels]
        if len({c.ids.tobytes() for c in labels}) < len(labels):
            raise ValueError(f"labels={list(self.labels)} are not different as tokens of this tokenizer")
        different = list(dict.fromkeys(texts))
        items = [(judge_prompt(tokenizer, text, lead=self.lead), labels) for text in different]
        terms = token_logps(items, live, slot=self.slot, batch_size=self.batch_size)
        found = {t: torch.stack([x.sum() for x in row]) for t, row in zip(different, terms, strict=True)}
        rows = [found[text].softmax(-1) for text in texts]
        return torch.stack(rows) if rows else torch.zeros(0, len(labels))
