"""Trees whose siblings are compared: PUCT search over steps.

A callback is asked for children of many trees at once, so that a model samples in a batch. Nothing here
knows what a step is: a state is the modality's own record. Paths without a search are in `growing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.training.groups import Group, Verdict

Choice = Literal["visits", "best", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How a tree is searched; the defaults are those of MCTS-DPO (Xie et al. 2024, arXiv 2405.00451).

    num_simulations: at every node of the chosen path; root_factor: as many times more at the root.
    num_children: steps that are drawn where a tree grows. max_depth: steps of an answer, at most.
    exploration: w of PUCT. length_power: of a step's length in its prior. choose: the child that the path
    goes on with; 'visits' takes the most visited, ties by Q.
    """

    num_simulations: int = 64
    root_factor: int = 4
    num_children: int = 4
    max_depth: int = 4
    exploration: float = 1.0
    gamma: float = 1.0
    length_power: float = 1.25
    choose: Choice = "visits"

    def __post_init__(self) -> None:
        for name, least in {
            "num_simulations": 1,
            "root_factor": 1,
            "num_children": 2,
            "max_depth": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"search.{name}={getattr(self, name)} must be at least {least}")
        for name in ("exploration", "length_power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"search.{name}={getattr(self, name)} must be a number of at least 0")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"search.gamma={self.gamma} must be in (0, 1]")
        check_choice("search.choose", self.choose, Choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A step as it was drawn: the state that it leads to, and its log-prob per unit, [U], U >= 1.

    terminal: whether nothing can follow.
    """

    state: Any
    logp: Tensor
    terminal: bool = False

    def __post_init__(self) -> None:
        if self.logp.ndim != 1 or not len(self.logp):
            raise ValueError(f"a child's logp has shape {tuple(self.logp.shape)}; expected [U], U >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is thought of a node. confidence: that it is right so far, in [0, 1] as a rule.

    correct: of a terminal node, whether its answer is; None where nobody can say. original: whether a
    correct answer was found in a way of its own, where a solution is known from which it might be copied.
    """

    confidence: float = 0.0
    correct: bool | None = None
    original: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Node:
    """A state in a search tree. logp: of the step that led to it, [U]; index: its place among its siblings.

    value: v, what `evaluate` thinks of it. future: V, what follows it. q: Q. visits: N, the simulations that
    went through it, the one under way included.
    """

    state: Any
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] = field(default_factory=list["Node"], repr=False)
    logp: Tensor | None = None
    prior: float = 1.0
    depth: int = 0
    index: int = 0
    terminal: bool = False
    correct: bool | None = None
    value: float = 0.0
    future: float = 0.0
    q: float = 0.0
    visits: int = 0

    @property
    def reward(self) -> float:
        """r = v - v of the parent."""
        return self.value - (0.0 if self.parent is None else self.parent.value)

    @property
    def path(self) -> tuple[int, ...]:
        """Places among siblings from the root on: names the node within its tree."""
        return () if self.parent is None else (*self.parent.path, self.index)


Expand = Callable[[Sequence[Node]], Sequence[Sequence[Child]]]
Evaluate = Callable[[Sequence[Node]], Sequence[Estimate]]
Choose = Callable[[Sequence[Node]], Node]


def step_value(estimate: Estimate, parent_depth: int) -> float:
    """v = confidence / max(depth - 3, 1) + outcome, depth that of the parent.

    outcome: -1 for a wrong answer, 1 for a correct one, 1.25 for a correct one that copies no known solution.
    """
    outcome = 0.0
    if estimate.correct is not None:
        outcome = (1.25 if estimate.original else 1.0) if estimate.correct else -1.0
    return estimate.confidence / max(parent_depth - 3, 1) + outcome


def prior(logp: Tensor, *, length_power: float = 1.25) -> float:
    """p = exp(sum_u logp_u / U^length_power) of a step, logp [U]."""
    return math.exp(float(logp.sum(dtype=torch.float64)) / len(logp) ** length_power)


def puct(node: Node, *, exploration: float) -> float:
    """Q + w p sqrt(N of the parent) / (1 + N), by which a simulation selects."""
    assert node.parent is not None
    return node.q + exploration * node.prior * math.sqrt(node.parent.visits) / (1 + node.visits)


def search(
    starts: Sequence[Node], settings: Search, *, expand: Expand, evaluate: Evaluate, num_simulations: int
) -> None:
    """Simulations from one node of each tree, all trees in step; the trees grow in place.

    A simulation selects by `puct` down to a leaf, expands it, and goes on into what it expanded until an
    end, terminal or at max_depth; then it backs up: V = sum_c max(1, N_c) Q_c / sum_c max(1, N_c) over the
    children, Q = r + gamma V. One call of `expand` and of `evaluate` serves every tree. As in the released
    code, a child that was never visited counts once in V.
    """
    for _ in range(num_simulations):
        paths = [[start] for start in starts]
        for start in starts:
            start.visits += 1
        going = paths
        while going:
            for path in going:
                _descend(path, settings)
            going = [path for path in going if not is_end(path[-1], settings)]
            _expand([path[-1] for path in going], settings, expand, evaluate)
            going = [path for path in going if path[-1].children]
        for path in paths:
            _back_up(path, settings.gamma)


def is_end(node: Node, settings: Search) -> bool:
    """Whether nothing follows a node: terminal, or as deep as trees go."""
    return node.terminal or node.depth >= settings.max_depth


def _descend(path: list[Node], settings: Search) -> None:
    """Select down to a leaf; what is selected counts as visited from now on."""
    while path[-1].children:
        chosen = max(path[-1].children, key=lambda c: puct(c, exploration=settings.exploration))
        chosen.visits += 1
        path.append(chosen)


def _expand(leaves: Sequence[Node], settings: Search, expand: Expand, evaluate: Evaluate) -> None:
    """Give every leaf its children, with values; a leaf for which nothing was drawn becomes an end."""
    if not leaves:
        return
    for leaf, drawn in zip(leaves, expand(leaves), strict=True):
        leaf.terminal = not drawn
        leaf.children = [
            Node(
                state=child.state,
                parent=leaf,
                logp=child.logp,
                prior=prior(child.logp, length_power=settings.length_power),
                depth=leaf.depth + 1,
                index=i,
                terminal=child.terminal,
            )
            for i, child in enumerate(drawn)
        ]
    nodes = [child for leaf in leaves for child in leaf.children]
    for node, estimate in zip(nodes, evaluate(nodes) if nodes else (), strict=True):
        node.correct = estimate.correct
        node.value = step_value(estimate, node.depth - 1)
        node.q = node.reward


def _back_up(path: Sequence[Node], gamma: float) -> None:
    for node in reversed(path):
        if node.children:
            weights = [max(1, child.visits) for child in node.children]
            pairs = zip(weights, node.children, strict=True)
            node.future = sum(w * child.q for w, child in pairs) / sum(weights)
        node.q = node.reward + gamma * node.future


def chooser(choice: Choice, generator: torch.Generator | None = None) -> Choose:
    """How a path goes on. 'random' needs a generator, and no other choice takes one; ties go to the first."""
    check_choice("choose", choice, Choice)
    if (choice == "random") != (generator is not None):
        raise ValueError(f"choose={choice!r}: a generator goes with 'random', and with it only")
    if generator is not None:
        return lambda nodes: nodes[int(torch.randint(len(nodes), (1,), generator=generator))]
    if choice == "visits":
        return lambda nodes: max(nodes, key=lambda n: (n.visits, n.q))
    return lambda nodes: max(nodes, key=lambda n: (n.q, n.visits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Siblings:
    """The children of one node on the path as the search left them there, with Q and N, [K] each."""

    parent: Node
    nodes: tuple[Node, ...]
    chosen: Node
    q: Tensor
    visits: Tensor


def siblings(parent: Node, choose: Choose) -> Siblings:
    """The children of a node as they are now, and the one to go on with."""
    nodes = tuple(parent.children)
    return Siblings(
        parent=parent,
        nodes=nodes,
        chosen=choose(nodes),
        q=torch.tensor([n.q for n in nodes]),
        visits=torch.tensor([float(n.visits) for n in nodes]),
    )


def walk(root: Node, choose: Choose) -> Iterator[Siblings]:
    """From the root along the chosen children, the siblings at every depth."""
    node = root
    while node.children:
        found = siblings(node, choose)
        yield found
        node = found.chosen


@dataclass(slots=True)
class Tree:
    """A searched tree: the siblings along its path, from the root on, and the node where the path ends."""

    root: Node
    levels: list[Siblings] = field(default_factory=list["Siblings"])

    @property
    def answer(self) -> Node:
        """The last node of the path."""
        return self.levels[-1].chosen if self.levels else self.root


def search_trees(
    states: Sequence[Any],
    settings: Search,
    *,
    expand: Expand,
    evaluate: Evaluate,
    generators: Sequence[torch.Generator] | None = None,
) -> list[Tree]:
    """One tree a state: search, take the chosen child, search again from there, until an end.

    Q and N of siblings are those at the moment of choosing. generators: one a state, for choose 'random'.
    """
    chosen_by = [chooser(settings.choose, g) for g in generators or [None] * len(states)]
    trees = [Tree(Node(state=state)) for state in states]
    num_simulations = settings.num_simulations * settings.root_factor
    for _ in range(settings.max_depth):
        going = [i for i, tree in enumerate(trees) if not is_end(tree.answer, settings)]
        places = [trees[i].answer for i in going]
        search(places, settings, expand=expand, evaluate=evaluate, num_simulations=num_simulations)
        for i, place in zip(going, places, strict=True):
            if place.children:
                trees[i].levels.append(siblings(place, chosen_by[i]))
        num_simulations = settings.num_simulations
    return trees


def sibling_groups(
    tree: Tree, make_group: Callable[[Siblings], Group], *, keep_only_correct: bool = False
) -> list[Group]:
    """One group a depth, judged: score = Q, visits = N. Siblings without another to compare make none.

    make_group: the group without depth and verdict; its context is the parent, its candidates the steps
    alone. keep_only_correct: nothing of a tree whose answer is not known to be correct.
    """
    if keep_only_correct and not tree.answer.correct:
        return []
    return [
        replace(
            make_group(level), depth=level.parent.depth, verdict=Verdict(score=level.q, visits=level.visits)
        )
        for level in tree.levels
        if len(level.nodes) > 1
    ]


def check_choice(name: str, value: str, valid: Any) -> None:
    """Refuse a value that is none of a Literal's; ValueError naming them."""
    if value not in valid.__args__:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(valid.__args__)}")
