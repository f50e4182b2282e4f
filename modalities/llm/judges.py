"""Judges that ask a language model: its log-probs as reward, follow-ups, comparisons, points, own steps.

`slot` names the reference that is asked, and None asks the policy as it is. Shapes: K candidates of a group,
U units, T turns. `JUDGES` here has every judge for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.llm.checks import CHECKS, answer_of
from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.questions import (
    PAIRWISE,
    POINTS,
    STEP,
    STEP_WITH_SOLUTION,
    Item,
    Question,
    before_reply,
    check_batch,
    check_template,
    completion_of,
    filled,
    placeholders,
    token_logps,
)
from triptych.training.groups import Group, Verdict
from triptych.training.judging import both_orders, check_choice
from triptych.training.plugs import Registry
from triptych.training.stages import Judge, Live

JUDGES: Registry[Judge] = Registry("judge", base=CHECKS)

POSITIVE = ("Thank you, that is exactly what I needed.", "Great answer, this helps me a lot.")
NEGATIVE = ("That is not what I asked for.", "This is wrong, and it does not help me.")


def _own(completion: Completion, terms: Tensor) -> Tensor:
    """The terms of tokens that the model itself chose."""
    return (
        terms if completion.own is None else terms[torch.from_numpy(np.asarray(completion.own, dtype=bool))]
    )


def _loglik(
    groups: Sequence[Group], live: Live, slot: str | None, per: Literal["sequence", "token"], batch_size: int
) -> list[Tensor]:
    """Sum over each candidate's own tokens, or their mean, [K] a group."""
    items: list[Item] = [(g.context, g.candidates) for g in groups]
    tables = token_logps(items, live, slot=slot, batch_size=batch_size)
    return [
        torch.stack([_reduced(_own(c, t), per) for c, t in zip(cs, terms, strict=True)])
        for (_, cs), terms in zip(items, tables, strict=True)
    ]


def _reduced(terms: Tensor, per: Literal["sequence", "token"]) -> Tensor:
    return terms.sum() if per == "sequence" else terms.sum() / max(1, len(terms))


@JUDGES.register("likelihood")
@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """score = log p(y | x) of the policy or a reference, its mean over tokens or their sum.

    The length-mean is what CREAM (Wang et al. 2024, arXiv 2410.12735) ranks by for the first model.
    """

    slot: str | None = None
    per: Literal["sequence", "token"] = "token"
    batch_size: int = 8

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("sequence", "token"))
        check_batch(self.batch_size)

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores in nats."""
        scores = _loglik(groups, live, self.slot, self.per, self.batch_size)
        return [Verdict(score=s) for s in scores]


@JUDGES.register("implicit")
@dataclass(frozen=True, slots=True, kw_only=True)
class Implicit:
    """score = beta (log p(y | x) - log ref(y | x)), DPO's own reward, summed or the mean per token.

    That of an earlier model is `combine` of its `likelihood` and the reference's, with weights beta, -beta.
    """

    beta: float
    slot: str = "frozen"
    per: Literal["sequence", "token"] = "sequence"
    batch_size: int = 8

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("sequence", "token"))
        check_batch(self.batch_size)
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores in units of the reward."""
        policy, ref = (_loglik(groups, live, s, self.per, self.batch_size) for s in (None, self.slot))
        return [Verdict(score=self.beta * (p - r)) for p, r in zip(policy, ref, strict=True)]


@JUDGES.register("llm_pairwise")
@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseLLM:
    """P(a preferred to b) = p(first label) / (p(first) + p(second)), asked in both orders and averaged.

    template: {prompt}, {first}, {second}. How often the order alone decided is counted; see `both_orders`.
    """

    template: str = PAIRWISE
    labels: tuple[str, str] = ("A", "B")
    lead: str = "Better answer:"
    slot: str | None = None
    batch_size: int = 8

    gives = frozenset({"preference"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_template("template", self.template, "prompt", "first", "second")
        if len(self.labels) != 2:
            raise ValueError(f"labels={list(self.labels)} must be two, of the first and the second answer")
        self._question()

    def _question(self) -> Question:
        return Question(labels=tuple(self.labels), lead=self.lead, slot=self.slot, batch_size=self.batch_size)

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Preferences of each group."""

        def ask(pairs: Sequence[tuple[Prompt, Completion, Completion]]) -> Tensor:
            texts = [
                {"prompt": p.text, "first": answer_of(p, a), "second": answer_of(p, b)} for p, a, b in pairs
            ]
            asked = [filled(live.port.tokenizer, self.template, t) for t in texts]
            return self._question()(asked, live)[:, 0]

        return both_orders(ask, groups, live, name="llm_pairwise")


@JUDGES.register("llm_score")
@dataclass(frozen=True, slots=True, kw_only=True)
class PointsLLM:
    """score = sum_d d p(d) over the points that the judge may give, each with its label's probability.

    template: {prompt}, {answer}. The additive scale is that of Yuan et al. 2024, arXiv 2401.10020, who
    sample the number; its expectation has no noise and fewer ties.
    """

    template: str = POINTS
    points: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    lead: str = "Points:"
    slot: str | None = None
    batch_size: int = 8

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_template("template", self.template, "prompt", "answer")
        self._question()

    def _question(self) -> Question:
        labels = tuple(str(p) for p in self.points)
        return Question(labels=labels, lead=self.lead, slot=self.slot, batch_size=self.batch_size)

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Expected points, [K] a group."""
        texts = [
            filled(
                live.port.tokenizer,
                self.template,
                {"prompt": g.context.text, "answer": answer_of(g.context, c)},
            )
            for g in groups
            for c in g.candidates
        ]
        expected = self._question()(texts, live) @ torch.tensor(self.points, dtype=torch.float32)
        return [Verdict(score=s) for s in expected.split([g.size for g in groups])]


@JUDGES.register("self_eval")
@dataclass(frozen=True, slots=True, kw_only=True)
class SelfEval:
    """score = p(yes) / (p(yes) + p(no)): is the last step correct? The value of a step in a tree search.

    template: {prompt}, {answer} (all steps so far) and perhaps {gold}, the prompt's own answer, which
    MCTS-DPO (Xie et al. 2024, arXiv 2405.00451) shows.
    """

    template: str = STEP
    labels: tuple[str, str] = ("yes", "no")
    lead: str = "Correct:"
    slot: str | None = None
    batch_size: int = 8

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_template("template", self.template, "prompt", "answer", optional=("gold",))
        if len(self.labels) != 2:
            raise ValueError(f"labels={list(self.labels)} must be two, for correct and for not")
        self._question()

    def _question(self) -> Question:
        return Question(labels=tuple(self.labels), lead=self.lead, slot=self.slot, batch_size=self.batch_size)

    def values(self, items: Sequence[tuple[Prompt, Completion]], live: Live) -> Tensor:
        """P(correct) of each step after its prompt and the prompt's prefix, [number of items]."""
        texts = [filled(live.port.tokenizer, self.template, self._texts(p, c)) for p, c in items]
        return self._question()(texts, live)[:, 0]

    def _texts(self, prompt: Prompt, completion: Completion) -> dict[str, str]:
        texts = {"prompt": prompt.text, "answer": answer_of(prompt, completion)}
        if "gold" not in placeholders(self.template):
            return texts
        if prompt.answer is None:
            raise ValueError(f"template shows {{gold}}, and prompt {prompt.key} has no answer")
        return texts | {"gold": prompt.answer}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Values, [K] a group."""
        values = self.values([(g.context, c) for g in groups for c in g.candidates], live)
        return [Verdict(score=s) for s in values.split([g.size for g in groups])]


@JUDGES.register("self_eval_with_solution")
def self_eval_with_solution(
    *, template: str = STEP_WITH_SOLUTION, slot: str | None = None, batch_size: int = 8
) -> SelfEval:
    """`self_eval` that shows the prompt's answer to the judge."""
    check_template("template", template, "prompt", "answer", "gold")
    return SelfEval(template=template, slot=slot, batch_size=batch_size)


@JUDGES.register("follow_up")
@dataclass(frozen=True, slots=True, kw_only=True)
class FollowUp:
    """score = mean over positive f of l(f) - mean over negative f, l(f) = 1/|f| log p(f | x, y).

    The user's next words if the answer was good, or bad. The log-probs are of shifted positions, as the
    formula says; the released script averages raw logits at the wrong ones.
    """

    positive: Sequence[str] = POSITIVE
    negative: Sequence[str] = NEGATIVE
    slot: str | None = None
    batch_size: int = 8

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_batch(self.batch_size)
        for name in ("positive", "negative"):
            texts = getattr(self, name)
            if (
                isinstance(texts, str)
                or not texts
                or not all(isinstance(t, str) and t.strip() for t in texts)
            ):
                raise ValueError(f"{name}={texts!r} must be a list of at least one text")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores in nats per token."""
        tokenizer = live.port.tokenizer
        space = "" if tokenizer.chat_template else " "
        replies = [completion_of(tokenizer, space + text) for text in (*self.positive, *self.negative)]
        items = [(before_reply(tokenizer, g.context, c), replies) for g in groups for c in g.candidates]
        tables = token_logps(items, live, slot=self.slot, batch_size=self.batch_size)
        means = torch.tensor([[t.mean().item() for t in row] for row in tables]).view(-1, len(replies))
        good, bad = means.split([len(self.positive), len(self.negative)], dim=-1)
        return [Verdict(score=s) for s in (good.mean(-1) - bad.mean(-1)).split([g.size for g in groups])]
