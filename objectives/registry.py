"""The registry: names to objectives, with what each needs and where it comes from."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from triptych.objectives.inputs import (
    Input,
    LabelledLogLik,
    ListLogLik,
    LogLik,
    PairLogLik,
    UnitLogLik,
)

MODALITIES = ("llm", "diffusion", "recsys")


@dataclass(frozen=True, slots=True)
class Range:
    """Values that a hyper-parameter may take: low <= x <= high, strict where *_open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        below = x < self.high if self.high_open else x <= self.high
        return math.isfinite(x) and above and below

    def __str__(self) -> str:
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Range(low=0, low_open=True)
NON_NEGATIVE = Range(low=0)
PROBABILITY = Range(low=0, high=1)
# One meaning a name: a range stated here holds for every objective that takes the name.
RANGES: dict[str, Range] = {
    "beta": POSITIVE,
    "beta_chosen": POSITIVE,
    "beta_rejected": POSITIVE,
    "tau": POSITIVE,
    "delta": NON_NEGATIVE,
    "gamma": NON_NEGATIVE,
    "label_smoothing": Range(0, 1, high_open=True),
    "clip": POSITIVE,
    "clip_high": POSITIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What an objective is: its function, its input, its needs and its source.

    requires: optional fields of the input that must be present ("ref", "baseline", "strength", ...).
    uses: optional fields that it takes when present; data carrying any other is refused when built.
    couples_batch: rows are not independent. on_policy: needs exact log-probs of fresh samples.
    surrogate: its gradient is meant, its value is not: a part is held constant under the derivative.
    row_advantage: it has one ratio and one advantage a row, so advantages may not differ between units.
    choices: allowed strings by hyper-parameter. choice_requires: the field that a string needs besides.
    refused: strings that a reader may try by hyper-parameter, each with the reason why it is not offered.
    """

    name: str
    fn: Callable[..., Tensor]
    takes: tuple[type[Input], ...]
    needs_reference: bool = False
    couples_batch: bool = False
    on_policy: bool = False
    surrogate: bool = False
    row_advantage: bool = False
    paper: str = ""
    equation: str = ""
    requires: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    modalities: tuple[str, ...] = MODALITIES
    ranges: Mapping[str, Range] = field(default_factory=dict[str, Range])
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    choice_requires: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    @property
    def summary(self) -> str:
        """First line of the function's docstring: its formula."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only hyper-parameters of `fn`, by name."""
        signature = inspect.signature(self.fn).parameters
        return {k: p for k, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@dataclass(frozen=True, slots=True)
class Objective:
    """A built objective: call it with its input for the unreduced loss [B]."""

    spec: Spec
    options: Mapping[str, Any]

    def __call__(self, x: Input) -> Tensor:
        """The unreduced loss [B]; ValueError for the wrong type of input or an absent field."""
        if not isinstance(x, self.spec.takes):
            raise ValueError(
                f"objective '{self.spec.name}' takes {_type_names(self.spec.takes)}, not {type(x).__name__}"
            )
        return self.spec.fn(x, **self.options)

    @property
    def beta(self) -> float:
        """The coefficient that turns a log-ratio into a reward, 1 where the objective has none."""
        return float(self.options.get("beta", self.options.get("beta_chosen", 1.0)))

    @property
    def requires(self) -> frozenset[str]:
        """Optional input fields that must be present, those of the chosen options included."""
        needs = self.spec.choice_requires.items()
        chosen = {of[self.options[key]] for key, of in needs if self.options.get(key) in of}
        return self.spec.requires | chosen

    @property
    def uses(self) -> frozenset[str]:
        """Optional input fields that are read when present."""
        return self.spec.uses | self.requires


_SPECS: dict[str, Spec] = {}
_ALIASES: dict[str, str] = {}


def register(
    name: str,
    *,
    takes: type[Input] | tuple[type[Input], ...],
    aliases: tuple[str, ...] = (),
    requires: tuple[str, ...] = (),
    uses: tuple[str, ...] = (),
    **details: Any,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add the decorated function to the registry as `name`; `details` are the other fields of `Spec`."""

    def add(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for key in (name, *aliases):
            if key in _SPECS or key in _ALIASES:
                raise ValueError(f"objective '{key}' is registered twice")
        kinds = takes if isinstance(takes, tuple) else (takes,)
        needed = frozenset((*requires, "ref") if details.get("needs_reference") else requires)
        _SPECS[name] = Spec(
            name=name, fn=fn, takes=kinds, requires=needed, uses=needed.union(uses), **details
        )
        _ALIASES.update(dict.fromkeys(aliases, name))
        return fn

    return add


def names(taking: type[Input] | None = None) -> list[str]:
    """Every registered name, or those whose objective takes the given input type; sorted."""
    return sorted(n for n, s in _SPECS.items() if taking is None or taking in s.takes)


def aliases() -> dict[str, str]:
    """Other libraries' names for our objectives: alias -> name."""
    return dict(_ALIASES)


def spec(name: str) -> Spec:
    """The Spec registered under a name or alias; ValueError with the valid names otherwise."""
    known = _ALIASES.get(name, name)
    if known not in _SPECS:
        near = difflib.get_close_matches(name, [*_SPECS, *_ALIASES], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"no objective '{name}'.{hint} Valid names: {', '.join(names())}")
    return _SPECS[known]


def build(name: str, **hyperparameters: Any) -> Objective:
    """The objective `name` with its hyper-parameters fixed.

    Raises ValueError naming the valid ones for an unknown name, an unknown or missing hyper-parameter,
    and a value outside its range.
    """
    found = spec(name)
    parameters = found.parameters()
    for key in hyperparameters:
        if key not in parameters:
            valid = ", ".join(parameters) or "no hyper-parameters"
            raise ValueError(f"objective '{name}' has no argument '{key}'; it takes {valid}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in hyperparameters:
            raise ValueError(
                f"objective '{name}' needs '{key}', which has no default; it takes {', '.join(parameters)}"
            )
    for key, value in hyperparameters.items():
        _check_value(found, key, value)
    return Objective(found, dict(hyperparameters))


def _check_value(found: Spec, key: str, value: Any) -> None:
    reason = found.refused.get(key, {}).get(value) if isinstance(value, str) else None
    if reason is not None:
        raise ValueError(f"objective '{found.name}' refuses {key}={value!r}: {reason}")
    choices = found.choices.get(key)
    if choices is not None:
        if value not in choices:
            raise ValueError(f"objective '{found.name}': {key}={value!r} is not one of {', '.join(choices)}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"objective '{found.name}': {key}={value!r} is not a number")
    allowed = found.ranges.get(key) or RANGES.get(key) or Range()
    if value not in allowed:
        raise ValueError(f"objective '{found.name}': {key}={value!r} is outside {allowed}")


def check_data(
    objective: Objective,
    taken: type[Input],
    provided: frozenset[str],
    *,
    bound: bool = False,
    modality: str | None = None,
) -> None:
    """Refuse, before any work, an objective that the data or the likelihood cannot serve.

    taken: input type that the data makes. provided: optional fields it fills. bound: whether the likelihood
    is an ELBO rather than an exact log-prob. modality: where it comes from, if that is to be checked.
    """
    s = objective.spec
    who = f"objective '{s.name}'"
    if taken not in s.takes:
        kinds, others = _type_names(s.takes), ", ".join(names(taken))
        raise ValueError(f"{who} takes {kinds}, but the data makes {taken.__name__}; for this data: {others}")
    if missing := sorted(objective.requires - provided):
        raise ValueError(f"{who} needs {', '.join(missing)}, which this recipe does not provide")
    if unused := sorted(provided - objective.uses - {"ref"}):
        raise ValueError(f"the data provides {', '.join(unused)}, which {who} does not use")
    if bound and s.on_policy:
        reason = "exact log-probs of samples, and an ELBO is a bound: use the step likelihood"
        raise ValueError(f"{who} needs {reason}")
    if modality is not None and modality not in s.modalities:
        raise ValueError(f"{who} is valid for {', '.join(s.modalities)}, not for {modality}")


def _type_names(types: tuple[type, ...]) -> str:
    return " or ".join(t.__name__ for t in types)


__all__ = [
    "MODALITIES", "NON_NEGATIVE", "POSITIVE", "PROBABILITY", "RANGES",
    "LabelledLogLik", "ListLogLik", "LogLik", "Objective", "PairLogLik", "Range", "Spec", "UnitLogLik",
    "aliases", "build", "check_data", "names", "register", "spec",
]  # fmt: skip
