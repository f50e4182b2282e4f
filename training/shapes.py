"""Every shape by name, and the shape that an objective asks for.

A shape turns judged groups into training samples and is pure: frozen options, randomness from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triptych.objectives import Input, LabelledLogLik, ListLogLik, Objective, PairLogLik, UnitLogLik
from triptych.training.credits import DEFAULT_CREDIT
from triptych.training.list_shapes import Conditioned, Labelled, Lists
from triptych.training.pair_shapes import Pairs, left_out
from triptych.training.plugs import Registry
from triptych.training.rejection import Accept
from triptych.training.stages import Shape
from triptych.training.unit_shapes import Units

SHAPES: Registry[Shape] = Registry("shape")
SHAPES.register("pairs")(Pairs)
SHAPES.register("accept")(Accept)
SHAPES.register("lists")(Lists)
SHAPES.register("labelled")(Labelled)
SHAPES.register("preference_conditioned")(Conditioned)
SHAPES.register("units")(Units)

# In the order of preference for an objective that takes several.
_SHAPE_OF: Mapping[type[Input], str] = {
    LabelledLogLik: "labelled",
    UnitLogLik: "units",
    PairLogLik: "pairs",
    ListLogLik: "lists",
}
_BY_RANK = {"relevance": "rank", "drop_equal": True}
_BY_SCORE = {"drop_equal": True}
# What an objective's own paper does beyond what its required fields say.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sppo": {"label": "win_rate", "with_self": True},
    "dno": {"label": "win_rate", "with_self": False},
    "p3o": {"which": "all"},
    "p3o_joint": {"which": "all"},
    "plackett_luce": _BY_SCORE,
    "softmax_dpo": _BY_SCORE,
    "pit_gap": _BY_SCORE,
    "rank_dpo": _BY_RANK,
    "lipo_lambda": _BY_RANK,
    "tree_po": _BY_RANK,
    "brain": {"relevance": "none"},
    "kl_leave_one_out": {"relevance": "none"},
    "sft": {"threshold": "best", "keep": "desirable"},
    "csft": {"threshold": "all"},
}
# Fields that no shape fills: they belong to data or to likelihoods of another kind.
_UNFILLED = frozenset({"gold"})


def shape_for(objective: Objective, *others: Objective, on_policy: bool | None = None) -> Shape:
    """The shape that an objective asks for by its input type and its required fields ('auto').

    others: further objectives on the same samples. on_policy: whether the groups hold the policy's samples
    with their log-probs; False fills neither `old` nor KTO's baseline from them. None takes them to be.
    ValueError for objectives that have no shape in a round.
    """
    objectives = (objective, *others)
    names = ", ".join(o.spec.name for o in objectives)
    common = [t for t in _SHAPE_OF if all(t in o.spec.takes for o in objectives)]
    required = frozenset[str]().union(*(o.requires for o in objectives))
    if not common:
        takes = "; ".join(
            f"{o.spec.name}: {' or '.join(t.__name__ for t in o.spec.takes)}" for o in objectives
        )
        raise ValueError(
            f"no shape makes what {names} takes ({takes}); name one of {', '.join(SHAPES.names())}"
        )
    if unfilled := sorted(required & _UNFILLED):
        raise ValueError(f"no shape fills {', '.join(unfilled)}, which {names} needs")
    made = common[0]
    options: dict[str, Any] = {}
    for o in reversed(objectives):
        # What takes many inputs, like `sft`, has habits for its own shape, not for one that others chose.
        options |= _OPTIONS.get(o.spec.name, {}) if len(o.spec.takes) == 1 or not others else {}
    if made is PairLogLik:
        options |= _pair_options(objectives, required)
    elif made is ListLogLik:
        options |= {f"with_{name}": True for name in ("proposal", "reward") if name in required}
    elif made is LabelledLogLik:
        options |= {"baseline": "drawn"} if "baseline" in required and on_policy is not False else {}
    else:
        options |= _unit_options(objectives, on_policy is not False)
    return SHAPES.build(_SHAPE_OF[made], options)


def _pair_options(objectives: tuple[Objective, ...], required: frozenset[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "margin" in required:
        options["with_margin"] = True
    if "calibration" in required:
        offline = any(o.options.get("regime") == "offline" for o in objectives)
        options["calibration"] = "chosen" if offline else "reference"
    return options


def _unit_options(objectives: tuple[Objective, ...], drawn: bool) -> dict[str, Any]:
    uses = frozenset[str]().union(*(o.uses for o in objectives))
    named = {DEFAULT_CREDIT[o.spec.name]: o for o in objectives if o.spec.name in DEFAULT_CREDIT}
    if not named and any({"advantage", "target"} & o.requires for o in objectives):
        raise ValueError(f"no credit is known for {objectives[0].spec.name}; name the shape and its credit")
    credit = next(iter(named), "none")
    options: dict[str, Any] = {"credit": credit}
    if credit == "optimal_value":
        options["credit_options"] = {"beta": named[credit].beta}
    if not any(o.spec.on_policy for o in objectives):
        options["train"] = "all"
    own = {"old"} if drawn else set[str]()
    options["fields"] = sorted(uses & ({"advantage", "target", "old_value"} | own))
    return options


__all__ = [
    "SHAPES", "Accept", "Conditioned", "Labelled", "Lists", "Pairs", "Units", "left_out", "shape_for",
]  # fmt: skip
