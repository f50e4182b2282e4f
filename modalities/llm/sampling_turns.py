"""Answers in several turns: an attempt, a request to do better, another attempt that has seen the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from triptych.modalities.llm.prompts import TURN_BREAK, Completion, Prompt
from triptych.modalities.llm.rendering import Chat
from triptych.modalities.llm.sampling import Drawn
from triptych.modalities.llm.sampling_groups import (
    completion_group,
    draw_for,
    drawing_of,
    is_fresh,
    own_policy,
    plain_text,
    reference_of,
    seeds_of,
)
from triptych.training.groups import Group, pad_units
from triptych.training.stages import Live

FIRSTS = ("policy", "data", "reference")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some tokens of one turn. logp, proposal: of each token; zeros where the policy did not draw them."""

    ids: np.ndarray
    logp: np.ndarray
    proposal: np.ndarray
    turn: int
    own: bool
    finished: bool = True
    said: bool = True

    @classmethod
    def of_others(cls, ids: np.ndarray, turn: int, *, said: bool) -> _Piece:
        """Tokens that the policy did not draw; `said` if they are an answer, not a request."""
        zeros = np.zeros(len(ids), dtype=np.float32)
        return cls(ids, zeros, zeros, turn, own=False, said=said)

    @classmethod
    def of_policy(cls, drawn: Drawn, turn: int) -> _Piece:
        """An answer that the policy drew."""
        return cls(drawn.ids, drawn.logp, drawn.proposal, turn, own=True, finished=drawn.finished)


Line = tuple[_Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """num_candidates dialogues of num_turns answers each, with `follow_up` asked in between (SCoRe, PIT).

    follow_up is written as a user's turn by the tokenizer's chat template; chat 'never' appends it as it is,
    which 'auto' does where there is no template. first: whose the first answer is; one that is not the
    policy's is context and not learned. 'data': one of the prompt's own candidates, drawn at random, the same
    for the whole group (Wang et al. 2310.00898, stage 1); 'reference': drawn from that in `slot` (stage 2).

    One completion holds all answers and the requests between them; the latter are masked.
    """

    num_candidates: int
    follow_up: str
    max_new_tokens: int
    num_turns: int = 2
    first: Literal["policy", "data", "reference"] = "policy"
    slot: str | None = None
    chat: Chat = "auto"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 32
    groups_per_context: ClassVar[int] = 1

    def __post_init__(self) -> None:
        drawing_of(self)
        if self.num_turns < 2:
            raise ValueError(f"num_turns={self.num_turns} must be at least 2")
        if not self.follow_up:
            raise ValueError("follow_up='' must be what is asked between two answers")
        if self.first not in FIRSTS:
            raise ValueError(f"first={self.first!r} is not one of {', '.join(FIRSTS)}")
        if (self.first == "reference") != (self.slot is not None):
            raise ValueError(f"slot={self.slot!r} goes with first=reference, and with it only")
        if self.chat not in ("auto", "always", "never"):
            raise ValueError(f"chat={self.chat!r} is not one of auto, always, never")

    @property
    def fresh(self) -> bool:
        """See `Source`; what is not the policy's own is not learned."""
        return is_fresh(drawing_of(self))

    @property
    def provides(self) -> frozenset[str]:
        """Log-probs; proposals where another distribution than the policy's drew."""
        return frozenset({"logp"} if self.fresh else {"logp", "proposal"})

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """One group a context, with `turn`."""
        request = request_ids(self.follow_up, live.port.tokenizer, chat=self.chat)
        lines = self._first(contexts, live)
        for turn in range(1, self.num_turns):
            lines = self._continued(contexts, lines, request, turn, live)
        return [self._group(c, found, live.port.tokenizer) for c, found in zip(contexts, lines, strict=True)]

    def _first(self, contexts: Sequence[Prompt], live: Live) -> list[list[Line]]:
        """The first answers of every context: K of them, or the one of the data."""
        if self.first == "data":
            return [[(_Piece.of_others(_of_data(c, live), 0, said=True),)] for c in contexts]
        prompts, seeds = [c.ids for c in contexts], seeds_of(contexts, live, "turn", 0)
        drawing = drawing_of(self)
        how: dict[str, Any] = {"drawing": drawing, "num_candidates": self.num_candidates, "seeds": seeds}
        if self.first == "policy":
            drawn = draw_for(prompts, own_policy(live, drawing), live, **how)
            return [[(_Piece.of_policy(d, 0),) for d in found] for found in drawn]
        assert self.slot is not None
        with reference_of(live, self.slot).active(live.policy) as reference:
            drawn = draw_for(prompts, reference, live, **how)
        return [[(_Piece.of_others(d.ids, 0, said=True),) for d in found] for found in drawn]

    def _continued(
        self, contexts: Sequence[Prompt], lines: list[list[Line]], request: np.ndarray, turn: int, live: Live
    ) -> list[list[Line]]:
        """Every line with the request and one more answer; a line alone in its group becomes K."""
        drawing = drawing_of(self)
        asked = [[(*line, _asked(line, request, turn)) for line in found] for found in lines]
        # All K share the first answer of the data; their own ones they continue one by one.
        num_lines = 1 if self.first == "data" and turn == 1 else self.num_candidates
        prompts = [
            np.concatenate([c.ids, *(piece.ids for piece in line)])
            for c, found in zip(contexts, asked, strict=True)
            for line in found
        ]
        of_line = [seeds_of(contexts, live, "turn", turn, k) for k in range(num_lines)]
        seeds = [seed for group in zip(*of_line, strict=True) for seed in group]
        each = self.num_candidates // num_lines
        policy = own_policy(live, drawing)
        drawn = iter(draw_for(prompts, policy, live, drawing=drawing, num_candidates=each, seeds=seeds))
        return [
            [(*line, _Piece.of_policy(d, turn)) for line in found for d in next(drawn)] for found in asked
        ]

    def _group(self, context: Prompt, lines: Sequence[Line], tokenizer: Any) -> Group:
        completions = [_completion(line, tokenizer) for line in lines]
        proposal = torch.tensor([sum(float(p.proposal.sum()) for p in line) for line in lines])
        return completion_group(
            context,
            completions,
            origin="policy",
            logp=[torch.from_numpy(np.concatenate([p.logp for p in line])) for line in lines],
            proposal=None if self.fresh else proposal,
            turn=pad_units([torch.from_numpy(c.turns) for c in completions if c.turns is not None]),
        )


def request_ids(follow_up: str, tokenizer: Any, *, chat: Chat) -> np.ndarray:
    """Tokens from the end of an answer to the start of the next one, [N] int32, that end included.

    ValueError where the chat template, or the lack of one, does not allow it.
    """
    if chat == "always" and not tokenizer.chat_template:
        raise ValueError("chat=always, but the tokenizer has no chat template")
    text = follow_up
    if chat != "never" and tokenizer.chat_template:
        text = _templated(follow_up, tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _templated(follow_up: str, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    mark = "ANSWER-8c1f"
    said = (("user", "question"), ("assistant", mark), ("user", follow_up))
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the chat template refuses a second turn ({reason}); chat=never does without"
        ) from error
    if text.count(mark) != 1:
        raise ValueError("the chat template does not keep the first answer as it is; chat=never does without")
    return text.partition(mark)[2]


def _asked(line: Line, request: np.ndarray, turn: int) -> _Piece:
    """The request after a line, without the end of its last answer where that was drawn already."""
    drop = len(request) > 1 and line[-1].ids[-1] == request[0]
    return _Piece.of_others(request[int(drop) :], turn, said=False)


def _of_data(context: Prompt, live: Live) -> np.ndarray:
    """One of the prompt's own candidates, at random."""
    if not context.candidates:
        raise ValueError(
            f"prompt {context.source or context.key} has no answer in the data; first=policy needs none"
        )
    generator = live.generator(context.key, "first answer")
    chosen = int(torch.randint(len(context.candidates), (), generator=generator))
    return context.candidates[chosen].ids


def _completion(line: Line, tokenizer: Any) -> Completion:
    return Completion(
        ids=np.concatenate([p.ids for p in line]),
        text=TURN_BREAK.join(plain_text(p.ids, tokenizer) for p in line if p.said),
        own=np.concatenate([np.full(len(p.ids), p.own) for p in line]),
        turns=np.concatenate([np.full(len(p.ids), p.turn) for p in line]),
        finished=line[-1].finished,
    )
