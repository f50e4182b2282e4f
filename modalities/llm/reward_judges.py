"""Judges of text rounds that ask a trained reward model: an answer's score, or its gap over another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.modalities.llm.judges import JUDGES
from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.reward_model import (
    LoadedReward,
    Reads,
    load_reward_model,
    read_settings,
    with_reference_answer,
)
from triptych.training.groups import Group, Verdict
from triptych.training.scoring import verdict_of
from triptych.training.stages import Live

PROMPT, ANSWER = "prompt", "answer"


@dataclass(frozen=True, slots=True)
class _Candidates:
    prompt_ids: np.ndarray
    candidate_ids: Sequence[np.ndarray]


@JUDGES.register("reward_model")
@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelJudge:
    """Score of each completion by the reward model that `scripts/train_reward.py` exported to `path`.

    One objective is the verdict's score; several are its `users`, and `weights` by name (all of them, a
    direction of preference) make a score of them. It reads the drawn token ids, so policy and reward model
    must share their tokenizer, which is checked; a completion that was cut off is scored as if it ended
    there, as in training. base: the base model under the reward's adapter, where it is not where it was.
    """

    path: str
    weights: dict[str, float] | None = None
    batch_size: int = 8
    base: str | None = None
    _names: tuple[str, ...] = field(init=False, repr=False)
    _loaded: dict[str, LoadedReward] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = _names_of(Path(self.path), "answer", self.batch_size)
        object.__setattr__(self, "_names", names)
        if self.weights is not None and set(self.weights) != set(names):
            raise ValueError(f"weights name {', '.join(self.weights)}; the model scores {', '.join(names)}")

    @property
    def gives(self) -> frozenset[str]:
        """'score' of one objective or with weights, 'users' of several."""
        several = {"users"} if len(self._names) > 1 else set[str]()
        return frozenset(several | ({"score"} if self.weights or not several else set()))

    @property
    def needs(self) -> frozenset[str]:
        """Nothing of the groups."""
        return frozenset()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group. ValueError for completions whose ids are not the reward model's."""
        loaded = _loaded(self._loaded, self.path, self.base, live)
        _check_tokens(groups, loaded)
        contexts = [_Candidates(g.context.ids, _ended(g, loaded)) for g in groups]
        scores = loaded.scores(contexts, batch_size=self.batch_size)
        return [verdict_of(s, self._names, self.weights) for s in scores]


@JUDGES.register("pit_gap")
@dataclass(frozen=True, slots=True, kw_only=True)
class GapJudge:
    """G(completion | reference answer) of a gap model: how much better than the reference (PIT, 2310.00898).

    reference: 'answer', the context's own; the name of one of its fields, a text; or 'prompt', where the
    context's ids already show it as `with_reference_answer` does, because the policy improves on it.
    """

    path: str
    reference: str = ANSWER
    batch_size: int = 8
    base: str | None = None
    _loaded: dict[str, LoadedReward] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _names_of(Path(self.path), "gap", self.batch_size)

    @property
    def gives(self) -> frozenset[str]:
        """A score."""
        return frozenset({"score"})

    @property
    def needs(self) -> frozenset[str]:
        """Nothing of the groups."""
        return frozenset()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group. ValueError for a context without the reference answer."""
        loaded = _loaded(self._loaded, self.path, self.base, live)
        _check_tokens(groups, loaded)
        contexts = [_Candidates(self._prompt(g, loaded), _ended(g, loaded)) for g in groups]
        return [verdict_of(s, ("gap",)) for s in loaded.scores(contexts, batch_size=self.batch_size)]

    def _prompt(self, group: Group, loaded: LoadedReward) -> np.ndarray:
        prompt: Prompt = group.context
        if self.reference == PROMPT:
            return prompt.ids
        text = prompt.answer if self.reference == ANSWER else prompt.fields.get(self.reference)
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"{prompt.source or group.key}: the context has no text '{self.reference}' to compare with"
            )
        return with_reference_answer(
            prompt.ids,
            np.asarray(_ids(loaded.tokenizer, text), dtype=np.int32),
            _ids(loaded.tokenizer, loaded.separator),
            eos=loaded.tokenizer.eos_token_id,
        )


def _names_of(folder: Path, reads: Reads, batch_size: int) -> tuple[str, ...]:
    """Objectives of an exported model; ValueError where it reads something else than this judge gives it."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    settings = read_settings(folder)
    if settings["reads"] != reads:
        other = {"answer": "reward_model", "gap": "pit_gap"}[settings["reads"]]
        raise ValueError(f"{folder} holds a model that reads {settings['reads']}s: use judge '{other}'")
    return tuple(settings["names"])


def _loaded(cache: dict[str, LoadedReward], path: str, base: str | None, live: Live) -> LoadedReward:
    device = str(live.device)
    if device not in cache:
        cache[device] = load_reward_model(Path(path), device=live.device, base=base)
    return cache[device]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _ended(group: Group, loaded: LoadedReward) -> list[np.ndarray]:
    """Ids of the group's completions, each ending in the end-of-sequence token."""
    eos = loaded.tokenizer.eos_token_id
    ids = [c.ids for c in group.candidates]
    return [y if len(y) and y[-1] == eos else np.append(y, np.int32(eos)) for y in ids]


def _check_tokens(groups: Sequence[Group], loaded: LoadedReward) -> None:
    """Refuse ids that mean another text to the reward model's tokenizer: they were drawn with another one."""
    if not groups:
        return
    completion: Completion = groups[0].candidates[0]
    if completion.own is not None or completion.turns is not None:
        return
    size = len(loaded.tokenizer)
    known = [int(i) for i in completion.ids if i < size]
    text = loaded.tokenizer.decode(known, skip_special_tokens=True)
    if len(known) != len(completion.ids) or text.split() != completion.text.split():
        raise ValueError(
            "the reward model's tokenizer reads the policy's tokens as "
            f"{text[:60]!r}, not {completion.text[:60]!r}: use a reward model with the policy's tokenizer"
        )
