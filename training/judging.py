"""What judges are made of: the registry, measures and comparisons as judges, and what adapters share.

Shapes: K candidates of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from triptych.training.groups import Group, Verdict
from triptych.training.plugs import PlugConfig, Registry
from triptych.training.stages import Judge, Live

JUDGES: Registry[Judge] = Registry("judge")
ORDER_FLIPS = "judge/order_flips"
Ask = Callable[[Sequence[tuple[Any, Any, Any]]], Sequence[float] | Tensor]


def build_judge(config: Judge | PlugConfig | Mapping[str, Any], registry: Registry[Judge] = JUDGES) -> Judge:
    """A judge from its name and options, with the judges that its options name; a built one is returned.

    Anywhere in the options a mapping of `name` and perhaps `options` is a judge. ValueError naming the valid
    names and options.
    """
    if isinstance(config, PlugConfig):
        config = {"name": config.name, "options": config.options}
    if not isinstance(config, Mapping):
        return checked(config, "judge")
    if not _is_config(config):
        raise ValueError(f"a judge is {{name, options}}, not {{{', '.join(map(str, config))}}}")
    name = config["name"]
    try:
        options = {k: _built(v, registry) for k, v in (config.get("options") or {}).items()}
    except ValueError as error:
        raise ValueError(f"judge '{name}': {error}") from error
    return registry.build(name, options)


def _is_config(value: Mapping[Any, Any]) -> bool:
    return "name" in value and set(value) <= {"name", "options"}


def _built(value: Any, registry: Registry[Judge]) -> Any:
    if isinstance(value, PlugConfig) or (isinstance(value, Mapping) and _is_config(value)):
        return build_judge(value, registry)
    if isinstance(value, Mapping):
        return {k: _built(v, registry) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_built(v, registry) for v in value]
    return value


def checked(judge: Any, option: str, *needs: str) -> Judge:
    """The judge; ValueError unless it is one, and gives one of the fields that are needed."""
    if not callable(judge) or not hasattr(judge, "gives"):
        raise ValueError(f"{option}={judge!r} is no judge: give a built one, or {{name, options}}")
    found: Judge = judge  # type: ignore[assignment]
    if needs and not found.gives & set(needs):
        given = ", ".join(sorted(found.gives))
        kind = type(judge).__name__
        raise ValueError(f"{option} must give {' or '.join(needs)}; {kind} gives {given}")
    return found


def judged(of: Judge, groups: Sequence[Group], live: Live) -> list[Group]:
    """The groups with the verdicts of this judge."""
    verdicts = of(groups, live)
    if len(verdicts) != len(groups):
        raise ValueError(f"judge {type(of).__name__} gave {len(verdicts)} verdicts of {len(groups)} groups")
    return [replace(g, verdict=v) for g, v in zip(groups, verdicts, strict=True)]


def nested(judge: Any) -> list[Judge]:
    """The judges among a judge's options, and in lists and mappings there."""
    return [j for f in fields(judge) for j in _judges_in(getattr(judge, f.name))]


def _judges_in(value: Any) -> list[Judge]:
    if callable(value) and hasattr(value, "gives"):
        return [value]  # type: ignore[list-item]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [j for part in parts for j in _judges_in(part)]


def nested_needs(judge: Any) -> frozenset[str]:
    """What the judges among its options need of the groups."""
    return frozenset[str]().union(*(j.needs for j in nested(judge)))


def nested_memory(judge: Any) -> bool:
    """Whether one of the judges among its options learns from what it sees (`remembers`)."""
    return any(getattr(j, "remembers", False) for j in nested(judge))


def count(live: Live, name: str, events: float, asked: float) -> None:
    """Add to [events, asked] in the run's memory, and report their ratio so far among the round's metrics."""
    new = torch.tensor([events, asked], dtype=torch.float64)
    kept = live.memory[name] = live.memory[name] + new if name in live.memory else new
    if kept[1] > 0:
        live.metrics[name] = (kept[0] / kept[1]).item()


def numbers(values: Sequence[float] | Tensor, size: int, who: str) -> Tensor:
    """What a measure returned, [size] float32 on the CPU; ValueError unless all are there and finite."""
    tensor = torch.as_tensor(values if isinstance(values, Tensor) else list(values))
    tensor = tensor.detach().to("cpu", torch.float32)
    if tensor.shape != (size,) or not tensor.isfinite().all():
        raise ValueError(f"{who} returned {tensor.tolist()}; expected {size} finite numbers")
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A measure of a context's candidates as a judge: measure(context, candidates) -> K numbers."""

    measure: Callable[[Any, Sequence[Any]], Sequence[float] | Tensor]
    name: str

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores; ValueError for one that is not finite."""
        return [
            Verdict(score=numbers(self.measure(g.context, g.candidates), g.size, f"{self.name} of {g.key}"))
            for g in groups
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferring:
    """A comparison as a judge: prefer(context, a, b) = P(a preferred to b), asked in both orders."""

    prefer: Callable[[Any, Any, Any], float]
    name: str

    gives = frozenset({"preference"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Preferences, see `both_orders`."""
        return both_orders(lambda pairs: [self.prefer(*p) for p in pairs], groups, live, name=self.name)


def both_orders(ask: Ask, groups: Sequence[Group], live: Live, *, name: str) -> list[Verdict]:
    """preference_ij = (P(i, j) + 1 - P(j, i)) / 2 of a comparison that may favour the one it sees first.

    ask: all (context, a, b) at once -> P(a preferred to b) of each. How often the order alone changed the
    verdict is counted as [flips, pairs] in memory under 'judge/order_flips'.
    """
    places = [(g, i, j) for g, group in enumerate(groups) for i, j in _ordered_pairs(group.size)]
    pairs = [(groups[g].context, groups[g].candidates[i], groups[g].candidates[j]) for g, i, j in places]
    answers = numbers(ask(pairs) if pairs else [], len(pairs), name)
    if ((answers < 0) | (answers > 1)).any():
        raise ValueError(f"{name} returned {answers.tolist()}; expected probabilities in [0, 1]")
    tables = [torch.full((g.size, g.size), 0.5) for g in groups]
    for (g, i, j), answer in zip(places, answers, strict=True):
        tables[g][i, j] = answer
    flips = sum((((t - 0.5) * (0.5 - t.T)) < 0).triu(1).sum().item() for t in tables)
    count(live, ORDER_FLIPS, flips, len(pairs) // 2)
    return [Verdict(preference=(t + 1 - t.T) / 2) for t in tables]


def _ordered_pairs(size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size) for j in range(size) if i != j]


def check_choice(option: str, value: Any, valid: Any) -> None:
    """ValueError unless the value is one of the valid ones."""
    if value not in valid:
        raise ValueError(f"{option}={value!r} must be one of {', '.join(valid)}")


def check_members(of: Any) -> None:
    """ValueError unless it is a list of at least one judge that ranks."""
    if isinstance(of, str | Mapping) or not isinstance(of, Sequence) or not of:
        raise ValueError(f"of={of!r} must be a list of at least one judge")
    for i, judge in enumerate(of):
        checked(judge, f"of[{i}]", "score", "preference")
