"""Reasoning steps from a tree that the live policy grows and judges itself (MCTS-DPO).

Xie et al. 2024, arXiv 2405.00451. `training.trees` searches; here a step is text up to a delimiter, one judge
says how sure one is of an unfinished answer and another whether a finished one is correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch

from triptych.modalities.llm.judges import JUDGES
from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.sampling import Drawing, Drawn
from triptych.modalities.llm.sampling_groups import completion_group, draw_for, plain_text, policy_of
from triptych.modalities.llm.sources import SOURCES
from triptych.training.groups import Group, scores_of
from triptych.training.judging import build_judge, checked, judged
from triptych.training.order import key
from triptych.training.stages import Judge, Live
from triptych.training.trees import Child, Estimate, Node, Search, Siblings, search_trees, sibling_groups

JudgeConfig = Judge | Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A node's state. root: the tree's prompt; prompt: with every step up to here; completion: the last."""

    root: Prompt
    prompt: Prompt
    completion: Completion | None = None

    def answer(self) -> Completion:
        """All steps as one completion of the root."""
        assert self.completion is not None
        ids = self.prompt.ids[len(self.root.ids) :]
        text = self.prompt.prefix[len(self.root.prefix) :]
        return Completion(ids=ids, text=text, finished=self.completion.finished)


def _self_evaluation() -> JudgeConfig:
    return {"name": "self_eval_with_solution"}


@SOURCES.register("tree")
@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSearch:
    """Source: groups of sibling steps along the path of a searched tree, one a depth.

    search: options of `Search`. confidence: a judge ({name, options}) of unfinished answers, the policy's own
    by default; None: 0 for all. verifier: a judge of finished answers, which are correct where it scores more
    than correct_above. A step ends after `delimiter`, with the answer, or at max_step_tokens;
    max_final_tokens: at the last depth the rest of the answer, of so many tokens, is one step.
    solution_field: of a prompt, the known solution; copying it is worth less than finding another way.
    repeats: 'drop' leaves out siblings that say the same, as the released code does; then they are no plain
    samples of the policy. keep_only_correct: nothing of trees whose answer is wrong or unfinished.

    A group's context holds prompt and earlier steps, its candidates the tokens of the step alone; the verdict
    has Q and N. Steps are drawn at the policy's own temperature.
    """

    search: Search | Mapping[str, Any] = field(default_factory=Search)
    confidence: JudgeConfig | None = field(default_factory=_self_evaluation)
    verifier: JudgeConfig | None = None
    correct_above: float = 0.5
    keep_only_correct: bool = False
    delimiter: str = "\n"
    max_step_tokens: int = 128
    max_final_tokens: int | None = None
    solution_field: str = "solution"
    repeats: Literal["keep", "drop"] = "keep"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.search, Mapping):
            object.__setattr__(self, "search", _search_of(self.search))
        for name in ("confidence", "verifier"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _judge_of(name, getattr(self, name)))
        if self.verifier is None and self.keep_only_correct:
            raise ValueError("keep_only_correct=True needs a verifier")
        if self.verifier is None and self.confidence is None:
            raise ValueError("confidence and verifier are both None: all steps would have the same value")
        if not self.delimiter:
            raise ValueError("delimiter='' must be a text that ends a step, such as a newline")
        for name in ("max_step_tokens", "max_final_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.repeats not in ("keep", "drop"):
            raise ValueError(f"repeats={self.repeats!r} is not one of keep, drop")

    @property
    def settings(self) -> Search:
        """How trees are searched."""
        assert isinstance(self.search, Search)
        return self.search

    @property
    def fresh(self) -> bool:
        """See `Source`."""
        return self.repeats == "keep"

    @property
    def num_candidates(self) -> int:
        """See `Source`."""
        return self.settings.num_children

    @property
    def groups_per_context(self) -> int:
        """See `Source`."""
        return self.settings.max_depth

    @property
    def provides(self) -> frozenset[str]:
        """See `Source`."""
        return frozenset({"logp", "verdict", "visits"})

    def __call__(self, contexts: Sequence[Prompt], live: Live) -> list[Group]:
        """Groups of every tree, from the root on; metric tree_correct is the share of correct answers."""
        grower = _Grower(self, live)
        random = self.settings.choose == "random"
        trees = search_trees(
            [Step(root=c, prompt=c) for c in contexts],
            self.settings,
            expand=grower.expand,
            evaluate=grower.evaluate,
            generators=[live.generator("tree", c.key) for c in contexts] if random else None,
        )
        if self.verifier is not None and trees:
            correct = [tree.answer.correct is True for tree in trees]
            live.metrics["tree_correct"] = sum(correct) / len(correct)
        return [
            group
            for tree in trees
            for group in sibling_groups(tree, _level_group, keep_only_correct=self.keep_only_correct)
        ]


def _level_group(level: Siblings) -> Group:
    return _group(level.parent, level.nodes)


def _group(parent: Node, nodes: Sequence[Node]) -> Group:
    """Siblings as a group: what came before is the context, the tokens of the step are the units."""
    return completion_group(
        parent.state.prompt,
        [node.state.completion for node in nodes],
        origin="policy",
        logp=[node.logp for node in nodes if node.logp is not None],
        depth=parent.depth,
    )


@dataclass(frozen=True, slots=True)
class _Grower:
    """The two callbacks of the search, with one round's policy."""

    source: TreeSearch
    live: Live

    def expand(self, leaves: Sequence[Node]) -> list[list[Child]]:
        """Steps that follow each leaf, drawn together for each limit of tokens."""
        found: list[list[Child]] = [[] for _ in leaves]
        final = [self._is_final(leaf) for leaf in leaves]
        for last, most in ((False, self.source.max_step_tokens), (True, self.source.max_final_tokens)):
            chosen = [i for i, is_last in enumerate(final) if is_last == last]
            if not chosen:
                continue
            assert most is not None
            drawn = self._draw([leaves[i] for i in chosen], most)
            for i, steps in zip(chosen, drawn, strict=True):
                found[i] = self._children(leaves[i].state, steps, whole=last)
        return found

    def _is_final(self, leaf: Node) -> bool:
        """Whether what follows is the whole rest of the answer."""
        return self.source.max_final_tokens is not None and leaf.depth + 1 == self.source.settings.max_depth

    def _draw(self, leaves: Sequence[Node], max_new_tokens: int) -> list[list[Drawn]]:
        live, policy = self.live, policy_of(self.live)
        # A node is known by its place, so that equal siblings have different children.
        seeds = [
            key("tree", live.seed, live.stage, live.round, leaf.state.root.key, *leaf.path) for leaf in leaves
        ]
        return draw_for(
            [leaf.state.prompt.ids for leaf in leaves],
            policy,
            live,
            drawing=Drawing(
                max_new_tokens=max_new_tokens,
                temperature=policy.temperature,
                batch_size=self.source.batch_size,
            ),
            num_candidates=self.source.num_candidates,
            seeds=seeds,
        )

    def _children(self, state: Step, drawn: Sequence[Drawn], *, whole: bool) -> list[Child]:
        tokenizer = self.live.port.tokenizer
        children: dict[bytes | int, Child] = {}
        for i, one in enumerate(drawn):
            length = len(one.ids) if whole else step_length(one.ids, tokenizer, self.source.delimiter)
            ids, ended = one.ids[:length], one.finished and length == len(one.ids)
            child = Child(
                state=_followed(state, ids, tokenizer, finished=ended),
                logp=torch.from_numpy(one.logp[:length].copy()),
                terminal=ended,
            )
            children.setdefault(ids.tobytes() if self.source.repeats == "drop" else i, child)
        return list(children.values())

    def evaluate(self, nodes: Sequence[Node]) -> list[Estimate]:
        """The confidence in every node, and the verifier's word on finished answers."""
        estimates = [Estimate(confidence=c) for c in self._confidences(nodes)]
        ends = [i for i, node in enumerate(nodes) if node.terminal and self.source.verifier is not None]
        for i, correct in zip(ends, self._verified([nodes[i].state for i in ends]), strict=True):
            original = correct and self._is_original(nodes[i].state)
            estimates[i] = replace(estimates[i], correct=correct, original=original)
        return estimates

    def _confidences(self, nodes: Sequence[Node]) -> list[float]:
        """The judge sees siblings as one group."""
        if self.source.confidence is None:
            return [0.0] * len(nodes)
        families = [list(family) for _, family in groupby(nodes, key=lambda node: id(node.parent))]
        groups = [_group(family[0].parent, family) for family in families if family[0].parent is not None]
        return self._scores(self.source.confidence, groups)

    def _verified(self, steps: Sequence[Step]) -> list[bool]:
        """Whether each finished answer is correct, as a completion of the tree's prompt."""
        if not steps:
            return []
        groups = [completion_group(step.root, [step.answer()], origin="policy") for step in steps]
        scores = self._scores(self.source.verifier, groups)
        return [score > self.source.correct_above for score in scores]

    def _scores(self, judge: Any, groups: Sequence[Group]) -> list[float]:
        return [score for g in judged(judge, groups, self.live) for score in scores_of(g).tolist()]

    def _is_original(self, step: Step) -> bool:
        """Whether a whole solution is known, and the answer is not copied from it."""
        solution = step.root.fields.get(self.source.solution_field)
        return solution is not None and not str(solution).strip().startswith(step.prompt.prefix.strip())


def _followed(state: Step, ids: np.ndarray, tokenizer: Any, *, finished: bool) -> Step:
    """The state after a step. Its text is what it adds to the text of all steps."""
    so_far = np.concatenate([state.prompt.ids, ids])
    before, prefix = (
        state.prompt.prefix,
        state.root.prefix + plain_text(so_far[len(state.root.ids) :], tokenizer),
    )
    text = prefix[len(before) :] if prefix.startswith(before) else plain_text(ids, tokenizer)
    return Step(
        root=state.root,
        prompt=replace(state.prompt, ids=so_far, prefix=prefix),
        completion=Completion(ids=ids, text=text, finished=finished),
    )


def step_length(ids: np.ndarray, tokenizer: Any, delimiter: str) -> int:
    """Tokens up to the first one that completes the delimiter after something that is not blank; else all."""
    if delimiter not in plain_text(ids, tokenizer).lstrip():
        return len(ids)
    return next(n for n in range(1, len(ids) + 1) if delimiter in plain_text(ids[:n], tokenizer).lstrip())


def _search_of(options: Mapping[str, Any]) -> Search:
    valid = Search.__dataclass_fields__
    if unknown := [name for name in options if name not in valid]:
        raise ValueError(f"search has no option '{unknown[0]}'; it takes {', '.join(valid)}")
    return Search(**options)


def _judge_of(option: str, config: JudgeConfig) -> Judge:
    judge = checked(
        build_judge(config, JUDGES) if isinstance(config, Mapping) else config, option, "score", "preference"
    )
    who = f"{option} {type(judge).__name__}"
    if judge.needs:
        needs = ", ".join(sorted(judge.needs))
        raise ValueError(f"{who} needs {needs} of groups, which are not known while a tree grows")
    if getattr(judge, "remembers", False):
        raise ValueError(f"{who} remembers what it saw, and each process grows other trees")
    return judge
