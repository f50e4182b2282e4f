"""What the sources of text rounds share: drawing for a round's contexts, and candidates as groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.prompts import TURN_BREAK, Completion, Prompt
from triptych.modalities.llm.sampling import Blend, Drawing, Drawn, draw
from triptych.training.groups import Group, pad_units
from triptych.training.order import key
from triptych.training.references import Reference, unwrapped
from triptych.training.stages import Live


def drawing_of(source: Any) -> Drawing:
    """How a source draws, from its own fields of the same names; ValueError for one out of range."""
    if source.num_candidates < 1:
        raise ValueError(f"num_candidates={source.num_candidates} must be at least 1")
    return Drawing(**{f.name: getattr(source, f.name) for f in fields(Drawing)})


def is_fresh(drawing: Drawing) -> bool:
    """Whether it draws from the policy itself: every token possible, at the policy's own temperature."""
    return drawing.temperature > 0 and not drawing.truncated


def policy_of(live: Live) -> TokenPolicy:
    """The live policy without a wrapper for gradients."""
    policy = unwrapped(live.policy)
    assert isinstance(policy, TokenPolicy)
    return policy


def own_policy(live: Live, drawing: Drawing) -> TokenPolicy:
    """The live policy; ValueError where what passes for its own samples is drawn at another temperature."""
    policy = policy_of(live)
    if is_fresh(drawing) and drawing.temperature != policy.temperature:
        raise ValueError(
            f"temperature={drawing.temperature} of the source is not the policy's own, {policy.temperature}: "
            "its samples would not be the policy's"
        )
    return policy


def reference_of(live: Live, slot: str) -> Reference:
    """The reference in a slot; ValueError naming those that there are."""
    if slot not in live.references:
        there = ", ".join(live.references) or "none"
        raise ValueError(f"slot='{slot}' holds no reference in this round; there are: {there}")
    return live.references[slot]


def seeds_of(contexts: Sequence[Prompt], live: Live, *parts: int | str) -> list[int]:
    """The seed of each context's draws in this round, for a purpose."""
    return [key("draw", live.seed, live.stage, live.round, *parts, c.key) for c in contexts]


def draw_for(
    prompts: Sequence[np.ndarray],
    policy: TokenPolicy,
    live: Live,
    *,
    drawing: Drawing,
    num_candidates: int,
    seeds: Sequence[int],
    mix: Blend | None = None,
) -> list[list[Drawn]]:
    """`draw` with the tokens of the port's tokenizer."""
    tokenizer = live.port.tokenizer
    return draw(
        policy,
        prompts,
        num_candidates,
        drawing,
        seeds=seeds,
        eos_ids=end_ids(tokenizer, policy.causal_lm),
        pad_id=tokenizer.pad_token_id or 0,
        mix=mix,
    )


def end_ids(tokenizer: Any, lm: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    listed = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    others = [listed] if isinstance(listed, int) else list(listed or ())
    return tuple(sorted({i for i in (tokenizer.eos_token_id, *others) if i is not None}))


def complete(drawn: Drawn, tokenizer: Any) -> Completion:
    """What was drawn as a record."""
    return Completion(ids=drawn.ids, text=plain_text(drawn.ids, tokenizer), finished=drawn.finished)


def plain_text(ids: np.ndarray, tokenizer: Any) -> str:
    """Without special tokens, and without the sign that divides turns, should a model write it."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True).replace(TURN_BREAK, " ")


def drawn_group(
    context: Prompt,
    drawn: Sequence[Drawn],
    tokenizer: Any,
    *,
    origin: str,
    with_logp: bool,
    with_proposal: bool,
) -> Group:
    """Candidates of one context, each token of which was drawn."""
    return completion_group(
        context,
        [complete(d, tokenizer) for d in drawn],
        origin=origin,
        logp=[torch.from_numpy(d.logp) for d in drawn] if with_logp else None,
        proposal=torch.tensor([float(d.proposal.sum()) for d in drawn]) if with_proposal else None,
    )


def completion_group(
    context: Prompt,
    completions: Sequence[Completion],
    *,
    origin: str,
    logp: Sequence[Tensor] | None = None,
    **rest: Any,
) -> Group:
    """Completions of one context; units are tokens, those of others are masked."""
    if not all(len(c.ids) for c in completions):
        raise ValueError(f"prompt {context.source or context.key} has a candidate without tokens")
    own = [
        torch.ones(len(c.ids), dtype=torch.bool) if c.own is None else torch.from_numpy(c.own)
        for c in completions
    ]
    return Group(
        key=context.key,
        context=context,
        candidates=tuple(completions),
        mask=pad_units(own),
        logp=None if logp is None else pad_units(logp),
        origin=(origin,) * len(completions),
        **rest,
    )
