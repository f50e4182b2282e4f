"""The shape that each objective asks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from triptych.objectives import LabelledLogLik, Objective, PairLogLik, Term, Terms, build, names, spec
from triptych.training.shapes import SHAPES, Labelled, shape_for


def made(name: str, **hyperparameters: Any) -> Objective:
    """The objective with a middling value for everything that has no default."""
    s = spec(name)
    for key, parameter in s.parameters().items():
        if parameter.default is inspect.Parameter.empty and key not in hyperparameters:
            hyperparameters[key] = s.choices[key][0] if key in s.choices else 0.25
    return build(name, **hyperparameters)


FROM_THE_PORT = frozenset({"ref", "head", "ref_head", "collision", "value", "kl", "entropy"})


@pytest.mark.parametrize(
    "name", sorted(set(names()) - {"srpo", "tpo", "tpo_l", "reward_regression", "pull", "push"})
)
def test_every_objective_has_a_shape_that_gives_what_it_needs_and_nothing_else(name: str):
    objective = made(name)
    shape = shape_for(objective)
    Terms((Term(objective),)).check(shape.makes, shape.provides | (FROM_THE_PORT & objective.uses))
    assert shape.per_unit <= (not objective.spec.row_advantage)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", SHAPES.build("pairs")),
        ("sppo", SHAPES.build("pairs", {"label": "win_rate", "with_self": True})),
        ("dno", SHAPES.build("pairs", {"label": "win_rate", "with_self": False})),
        ("odpo", SHAPES.build("pairs", {"with_margin": True})),
        ("p3o", SHAPES.build("pairs", {"which": "all", "with_margin": True})),
        ("xpo", SHAPES.build("pairs", {"calibration": "reference"})),
        ("plackett_luce", SHAPES.build("lists", {"drop_equal": True})),
        ("rank_dpo", SHAPES.build("lists", {"relevance": "rank", "drop_equal": True})),
        ("kto", SHAPES.build("labelled", {"baseline": "drawn"})),
        ("sft", SHAPES.build("labelled", {"threshold": "best", "keep": "desirable"})),
        ("grpo", SHAPES.build("units", {"credit": "z_score", "fields": ["advantage", "old"]})),
        ("rloo", SHAPES.build("units", {"credit": "leave_one_out", "fields": ["advantage", "old"]})),
        ("reinforce", SHAPES.build("units", {"credit": "leave_one_out", "fields": ["advantage"]})),
        ("oreo_policy", SHAPES.build("units", {"credit": "outcome", "fields": ["target"], "train": "all"})),
        ("kl", SHAPES.build("units", {"credit": "none", "fields": ["old"]})),
    ],
)
def test_one_line_of_a_recipe_chooses_the_shape(name: str, expected: Any):
    assert shape_for(made(name)) == expected


def test_offline_vpo_is_calibrated_by_the_chosen_candidate():
    shape: Any = shape_for(build("vpo", beta=0.1, alpha=0.1, regime="offline"))
    assert shape.calibration == "chosen"


def test_ppo_with_its_value_loss_fills_the_fields_of_both():
    shape: Any = shape_for(made("ppo"), made("ppo_value"))
    assert (shape.credit, shape.provides) == ("gae", {"advantage", "old", "old_value", "target"})
    unclipped: Any = shape_for(made("ppo"), made("value_regression"))
    assert unclipped.provides == {"advantage", "old", "target"}


def test_an_anchor_of_many_inputs_takes_the_main_objectives_shape():
    assert shape_for(made("dpo"), made("sft")) == shape_for(made("dpo"))
    shape: Any = shape_for(made("grpo"), made("kl", estimator="k2"))
    assert shape.credit == "z_score"


def test_a_term_that_pushes_a_sample_of_the_reference_asks_for_one():
    shape: Any = shape_for(made("dpo"), build("push", on="calibration"))
    assert shape == SHAPES.build("pairs", {"calibration": "reference"})
    with pytest.raises(ValueError, match="no shape fills gold, which push needs"):
        shape_for(build("push", on="gold"))


def test_a2po_estimates_the_optimal_value_at_its_own_beta():
    shape: Any = shape_for(build("a2po", beta=0.25))
    assert (shape.credit, dict(shape.credit_options)) == ("optimal_value", {"beta": 0.25})


def test_without_own_samples_there_is_neither_old_nor_a_drawn_baseline():
    assert shape_for(made("kto"), on_policy=False).provides == frozenset()
    assert shape_for(made("kl"), on_policy=False).provides == frozenset()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("srpo", "no shape makes what srpo takes"),
        ("tpo", "no shape fills gold, which tpo needs"),
        ("reward_regression", "no credit is known for reward_regression"),
    ],
)
def test_objectives_without_a_shape_are_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        shape_for(made(name))


def test_the_shapes_have_the_names_that_recipes_use():
    assert SHAPES.names() == ["accept", "labelled", "lists", "pairs", "preference_conditioned", "units"]
    assert SHAPES.build("accept", {"gamma": 1.0}).makes is PairLogLik
    assert Labelled().makes is LabelledLogLik
