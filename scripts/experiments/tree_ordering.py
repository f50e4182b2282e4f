"""Does a tree search order steps rightly, do trees of the live policy teach more, and where does DPO stop?

    python -m triptych.scripts.experiments.tree_ordering --save

Problems whose answers are three choices of five each; a hidden set of answers is right, so that the value of
every step, the probability that the policy ends right after it, is an exact sum. Search and sibling groups
are those of `training.trees`, pairs those of `Pairs` with visit counts as labels (MCTS-DPO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from triptych.modalities.tabular.policy import TabularPolicy, child, node_of, num_nodes_of
from triptych.modalities.tabular.port import Arm, Context, TabularPort
from triptych.objectives import LogLik, PairLogLik, build
from triptych.scripts.experiments.common import (
    COLOURS,
    Claim,
    Outcome,
    band,
    command,
    main,
    over_seeds,
    stopwatch,
)
from triptych.training.groups import Group, Sample, Verdict
from triptych.training.pair_shapes import Pairs
from triptych.training.trees import (
    Child,
    Estimate,
    Node,
    Search,
    Siblings,
    search,
    search_trees,
    sibling_groups,
)

NUM_ACTIONS, LENGTH, SHARE_RIGHT = 5, 3, 0.08
BETA = 0.5
VISITS = ((6, 2), (5, 3), (4, 4), (9, 1), (20, 3))
PAPER = "Xie et al. 2024, arXiv 2405.00451"
State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """right: the answers that are, as sets of states. values: value of every prefix, [nodes with leaves].

    confidence: what a noisy judge thinks of every prefix, same shape.
    """

    right: frozenset[State]
    values: Tensor
    confidence: Tensor


def all_nodes() -> int:
    """Prefixes, whole answers included."""
    return num_nodes_of(NUM_ACTIONS, LENGTH + 1)


def values_of(logp: Tensor, right: Tensor) -> Tensor:
    """P(right | prefix) of every prefix and answer, [nodes]; logp [S, A] of the policy, right [leaves]."""
    value = torch.zeros(all_nodes(), dtype=torch.float64)
    first = num_nodes_of(NUM_ACTIONS, LENGTH)
    value[first:] = right.double()
    for node in reversed(range(first)):
        start = child(node, 0, NUM_ACTIONS)
        value[node] = (logp[node].exp().double() * value[start : start + NUM_ACTIONS]).sum()
    return value


def make_problem(logp: Tensor, *, noise: float, generator: torch.Generator) -> Problem:
    """A problem for a policy, [S, A] log-probs: right answers at random, at least one."""
    num = NUM_ACTIONS**LENGTH
    right = torch.rand(num, generator=generator) < SHARE_RIGHT
    right[int(torch.randint(num, (1,), generator=generator))] = True
    values = values_of(logp, right)
    seen = (values + noise * torch.randn(all_nodes(), generator=generator, dtype=torch.float64)).clamp(0, 1)
    digits = [tuple(i // NUM_ACTIONS**k % NUM_ACTIONS for k in reversed(range(LENGTH))) for i in range(num)]
    return Problem(frozenset(d for d, r in zip(digits, right, strict=True) if r), values, seen)


def evaluate(nodes: Sequence[Node], *, problems: Sequence[Problem]) -> list[Estimate]:
    """The noisy judge on every step, and the truth on whole answers."""
    found: list[Estimate] = []
    for node in nodes:
        which, state = node.state
        problem = problems[which]
        confidence = float(problem.confidence[node_of(state, NUM_ACTIONS)])
        found.append(
            Estimate(confidence=confidence, correct=state in problem.right if len(state) == LENGTH else None)
        )
    return found


def expand_all(nodes: Sequence[Node], *, logp: Tensor) -> list[list[Child]]:
    """Every step that can follow, with its log-prob under the policy, [X, S, A]."""
    return [[_child(n, a, logp) for a in range(NUM_ACTIONS)] for n in nodes]


def expand_sampled(
    nodes: Sequence[Node], *, logp: Tensor, num: int, generator: torch.Generator
) -> list[list[Child]]:
    """`num` different steps drawn from the policy, [X, S, A]: what a language model can do."""
    rows = torch.stack([logp[n.state[0], node_of(n.state[1], NUM_ACTIONS)] for n in nodes])
    drawn = torch.multinomial(rows.exp(), num, generator=generator).tolist()
    return [[_child(n, a, logp) for a in actions] for n, actions in zip(nodes, drawn, strict=True)]


def _child(node: Node, action: int, logp: Tensor) -> Child:
    which, state = node.state
    term = logp[which, node_of(state, NUM_ACTIONS), action].reshape(1)
    return Child(state=(which, (*state, action)), logp=term, terminal=len(state) + 1 == LENGTH)


def ordered_rightly(q: Tensor, truth: Tensor) -> float:
    """Share of the sibling pairs of different true value that Q orders as they are; equal Q counts half."""
    i, j = torch.triu_indices(len(q), len(q), 1)
    real = truth[i] - truth[j]
    compared = real.abs() > 1e-6
    if not compared.any():
        return math.nan
    agree = torch.sign(q[i] - q[j]) * torch.sign(real)
    return float(((agree + 1) / 2)[compared].mean())


def ordering(budgets: Sequence[int], *, seeds: int, num_problems: int) -> Tensor:
    """Share of root siblings ordered rightly by Q after each number of simulations, [S, budgets]."""
    settings = Search(num_children=NUM_ACTIONS, max_depth=LENGTH)
    rows: list[list[float]] = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_problems, num_nodes_of(NUM_ACTIONS, LENGTH), NUM_ACTIONS)
        logp = torch.randn(shape, generator=generator).log_softmax(-1)
        problems = [make_problem(p, noise=0.3, generator=generator) for p in logp]
        roots = [Node(state=(i, ())) for i in range(num_problems)]
        done, row = 0, []
        for budget in budgets:
            search(
                roots, settings, expand=partial(expand_all, logp=logp),
                evaluate=partial(evaluate, problems=problems), num_simulations=budget - done,
            )  # fmt: skip
            done = budget
            found = [
                ordered_rightly(torch.tensor([c.q for c in root.children]), p.values[1 : 1 + NUM_ACTIONS])
                for root, p in zip(roots, problems, strict=True)
            ]
            row.append(float(torch.tensor(found).nanmean()))
        rows.append(row)
    return torch.tensor(rows)


def step_group(level: Siblings) -> Group:
    """The siblings of one node as a group of one-action candidates."""
    which, state = level.parent.state
    arms = tuple(Arm(node.state[1][-1:]) for node in level.nodes)
    mask = torch.ones(len(arms), 1, dtype=torch.bool)
    context = Context(key=f"{which}/{state}", index=which, prefix=state)
    return Group(key=context.key, context=context, candidates=arms, mask=mask, unit="step")


def pairs_of(
    samples: Sequence[Sample], groups: Sequence[Group], policy: TabularPolicy, first: Tensor
) -> PairLogLik:
    """The samples as the objective reads them; the reference is the first policy, [X, S, A]."""
    port = TabularPort(num_actions=NUM_ACTIONS)

    def side(role: int) -> LogLik:
        chosen = [(groups[s.group], s.candidates[role]) for s in samples]
        batch = port.collate([(g.context, [g.candidates[i]]) for g, i in chosen], [0] * len(chosen))
        ref = first[batch.contexts, batch.starts].gather(-1, batch.actions).squeeze(-1)
        return LogLik(port.terms(policy, batch).sum(-1), batch.counts, ref)

    return PairLogLik(side(0), side(1), smoothing=torch.stack([s.fields["smoothing"] for s in samples]))


def learn_from_trees(
    *, seed: int, on_policy: bool, num_rounds: int, num_problems: int, num_steps: int = 4
) -> tuple[list[float], int]:
    """P(right) over the rounds, and the number of pairs; trees grow from the live or the first policy.

    Otherwise everything is the same: fresh trees every round, the objective, and the number of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_problems, num_nodes_of(NUM_ACTIONS, LENGTH), NUM_ACTIONS)
    policy = TabularPolicy(torch.randn(shape, generator=generator), length=LENGTH)
    first = policy.conditionals().detach()
    problems = [make_problem(p, noise=0.3, generator=generator) for p in first]
    shape_of = Pairs(which="siblings", label="visits")
    objective = build("dpo", beta=BETA)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    settings = Search(num_simulations=4, root_factor=2, num_children=2, max_depth=LENGTH)
    right = torch.stack([p.values[-(NUM_ACTIONS**LENGTH) :] for p in problems])
    curve, num_pairs = [float((answers(first).exp() * right).sum(-1).mean())], 0
    for _ in range(num_rounds):
        grower = policy.conditionals().detach() if on_policy else first
        trees = search_trees(
            [(i, ()) for i in range(num_problems)],
            settings,
            expand=partial(expand_sampled, logp=grower, num=2, generator=generator),
            evaluate=partial(evaluate, problems=problems),
        )
        groups = [g for tree in trees for g in sibling_groups(tree, step_group)]
        samples = shape_of(groups, seed=seed)
        num_pairs += len(samples)
        for _ in range(num_steps):
            optimizer.zero_grad()
            objective(pairs_of(samples, groups, policy, first)).sum().backward()
            optimizer.step()
        curve.append(float((answers(policy.conditionals().detach()).exp() * right).sum(-1).mean()))
    return curve, num_pairs


def answers(logp: Tensor) -> Tensor:
    """Log-prob of every answer, [X, leaves], from those of the steps, [X, S, A]."""
    total, start = torch.zeros(len(logp), 1), 0
    for depth in range(LENGTH):
        width = NUM_ACTIONS**depth
        total = (total.unsqueeze(-1) + logp[:, start : start + width]).flatten(1)
        start += width
    return total


def optimum(visits: tuple[int, int]) -> float:
    """beta * D where DPO on one pair with these visit counts stops."""
    policy = TabularPolicy(torch.zeros(1, 1, 2, dtype=torch.float64))
    group = Group(
        key="one",
        context=None,
        candidates=(0, 1),
        mask=torch.ones(2, 1, dtype=torch.bool),
        verdict=Verdict(score=torch.tensor([1.0, 0.0]), visits=torch.tensor([float(v) for v in visits])),
    )
    (sample,) = Pairs(which="siblings", label="visits")([group], seed=0)
    smoothing = sample.fields["smoothing"].double().reshape(1)
    objective, one = build("dpo", beta=BETA), torch.ones(1, dtype=torch.float64)
    ref = policy.conditionals().detach()[0, 0]
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)
    margin = torch.zeros(())
    for _ in range(400):
        ratio = policy.conditionals()[0, 0] - ref
        margin = (BETA * (ratio[0] - ratio[1])).detach()
        good, bad = (LogLik(ratio[i : i + 1] + ref[i], one, ref[i : i + 1]) for i in range(2))
        optimizer.zero_grad()
        objective(PairLogLik(good, bad, smoothing=smoothing)).sum().backward()
        optimizer.step()
    return margin.item()


def draw_figure(
    figure: Figure, *, budgets: Sequence[int], rightly: Tensor, curves: dict[str, Tensor]
) -> None:
    """Ordering by simulations, learning by rounds, and optima against visit counts."""
    left, middle, last = figure.subplots(1, 3)
    band(left, budgets, rightly, 0, "siblings at the root")
    left.axhline(0.5, color=COLOURS[1], linewidth=0.8, linestyle=":")
    left.set(
        title="Order by Q is the true order", xlabel="simulations", xscale="log", ylabel="share of pairs"
    )
    for series, (name, curve) in enumerate(curves.items()):
        band(middle, range(curve.shape[1]), curve, series, name)
    middle.set(title="Learning from trees", xlabel="rounds", ylabel="P(right)", ylim=(0, 1))
    middle.legend()
    logit = [math.log(good / bad) for good, bad in VISITS]
    last.plot([0, max(logit)], [0, max(logit)], color=COLOURS[1], linewidth=1, label="log(N_w / N_l)")
    last.plot(logit, [optimum(v) for v in VISITS], "o", color=COLOURS[0], label="where DPO stops")
    last.set(title="Optimal margin", xlabel="log(N_w / N_l)", ylabel="beta * D")
    last.legend()


def run(*, seeds: int, quick: bool = False) -> Outcome:
    """Ordering by budget, live against frozen trees, and the optimum of visit labels."""
    budgets = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    num_rounds, num_problems = (5, 3) if quick else (20, 8)
    learners = max(4, seeds // 4)
    with stopwatch() as elapsed:
        rightly = ordering(budgets, seeds=seeds, num_problems=12)
        found = {
            name: [
                learn_from_trees(seed=s, on_policy=live, num_rounds=num_rounds, num_problems=num_problems)
                for s in range(learners)
            ]
            for name, live in (("live trees", True), ("frozen trees", False))
        }
        curves = {name: torch.tensor([curve for curve, _ in runs]) for name, runs in found.items()}
        pairs = {name: sum(n for _, n in runs) / learners for name, runs in found.items()}
        away = max(abs(optimum(v) - math.log(v[0] / v[1])) for v in VISITS)
        first, last = over_seeds(rightly[:, 0]), over_seeds(rightly[:, -1])
        rise = over_seeds(rightly[:, -1] - rightly[:, 0])
        ends = {name: over_seeds(curve[:, -1]) for name, curve in curves.items()}
        gap = over_seeds(curves["live trees"][:, -1] - curves["frozen trees"][:, -1])
        seconds = elapsed()
    claim = partial(
        Claim, family="Reasoning and trees", method="MCTS-DPO", paper=PAPER, command=command("tree_ordering")
    )
    toy = f"answers of {LENGTH} steps with {NUM_ACTIONS} choices, {SHARE_RIGHT:.0%} right, a noisy judge"
    claims = [
        claim(
            statement="The order of siblings by Q comes closer to that of their true values with simulations",
            result=f"pairs ordered rightly {first:.3f} after {budgets[0]} simulation, {last:.3f} after "
            f"{budgets[-1]}: {rise:+.3f}",
            holds=rise.low > 0,
            what=f"{toy}; 12 problems in each of {seeds} seeds, all siblings at the root",
        ),
        claim(
            statement="Trees of the live policy teach more than trees of a frozen one, at the same number of "
            "pairs",
            result=f"P(right) {curves['live trees'][:, 0].mean():.3f} before, {ends['live trees']:.3f} "
            f"live, {ends['frozen trees']:.3f} frozen after {num_rounds} rounds, difference {gap:+.3f}; "
            f"{pairs['live trees']:.0f} and {pairs['frozen trees']:.0f} pairs a seed",
            holds=gap.low > 0,
            what=f"{toy}; {num_problems} problems, 2 sampled children a step, fresh trees every round for "
            f"both, {learners} seeds",
        ),
        claim(
            statement="With visit counts as labels DPO stops at beta * D = log(N_w / N_l)",
            result=f"largest difference {away:.1e} over {len(VISITS)} pairs of counts",
            holds=away < 1e-4,
            what="one pair, gradient descent from the reference",
        ),
    ]
    return Outcome(
        claims=claims,
        figure=partial(draw_figure, budgets=budgets, rightly=rightly, curves=curves),
        caption="Search orders steps better than a noisy judge, and trees must follow the policy they teach.",
        seconds=seconds,
        size=(12.0, 3.6),
    )


if __name__ == "__main__":
    main("tree_ordering", run, __doc__)
