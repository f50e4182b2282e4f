from dataclasses import dataclass, replace

import pytest
from round_cases import ByArm, policy, run, stage, terms

from triptych.modalities.tabular.sources import SOURCES
from triptych.objectives import Term, build
from triptych.training.plugs import Registry
from triptych.training.stages import Keep, Part


def test_a_policy_gradient_on_beams_or_data_is_refused_with_the_reason():
    for source in ("beams", "data", "on_reference"):
        with pytest.raises(
            ValueError, match=r"stage main: rloo needs fresh samples of the policy.*beams and data"
        ):
            stage(terms("rloo", clip=0.2), source=source, shape=("units", {"credit": "leave_one_out"}))


def test_fresh_samples_among_others_serve_shapes_that_train_on_them_alone():
    source = SOURCES.build("blend", {"coefficient": 0.5, "own": 1})
    half = {"credit": "half", "credit_options": {"rivals": "blend"}, "fields": ["advantage"]}
    nash = stage(terms("reinforce"), source=source, shape=("units", half))
    assert nash.main.source.fresh is False
    for objective, shape in (
        (terms("reinforce"), ("units", half | {"train": "all"})),
        (terms("p3o", clip=0.2, reference="stage"), ("pairs", {"with_margin": True})),
    ):
        with pytest.raises(ValueError, match="needs fresh samples"):
            stage(objective, source=source, shape=shape)


def test_a_pair_loss_on_beams_is_fine():
    assert stage(terms("dpo", beta=0.1), source="beams").main.source.fresh is False


def test_a_bound_is_refused_for_a_policy_gradient():
    with pytest.raises(ValueError, match="an ELBO is a bound: use the step likelihood"):
        stage(terms("grpo", clip=0.2), bound=True)
    assert stage(terms("dpo", beta=0.1), bound=True).bound


def test_a_bound_stage_belongs_to_a_bound_likelihood(tmp_path):
    with pytest.raises(ValueError, match="bound=True, the likelihood's is False"):
        run(tmp_path, [stage(terms("dpo", beta=0.1), bound=True)])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_kl_estimator_in_the_wrong_place_is_refused_with_the_reason(estimator):
    with pytest.raises(ValueError, match=f"objective 'kl' refuses estimator='{estimator}'"):
        terms("grpo", Term(build("kl", estimator=estimator), 0.1), clip=0.2)
    if estimator != "k1":
        with pytest.raises(ValueError, match=f"KL estimator '{estimator}' in the reward is refused"):
            stage(
                terms("rloo", clip=0.2),
                shape=(
                    "units",
                    {"credit": "leave_one_out", "credit_options": {"kl": 0.1, "kl_estimator": estimator}},
                ),
            )


def test_a_path_loss_needs_a_critic():
    objective = terms("oreo_policy", Term(build("oreo_value", beta=0.1)), beta=0.1)
    shape = ("units", {"credit": "outcome", "train": "all", "fields": ["target"]})
    with pytest.raises(ValueError, match="learns from a path of values and needs a critic"):
        stage(objective, shape=shape)
    assert stage(objective, shape=shape, has_critic=True).has_critic


def test_gae_needs_a_critic():
    with pytest.raises(ValueError, match="credit 'gae' needs a critic"):
        stage(
            terms("ppo", clip=0.2),
            shape=("units", {"credit": "gae", "fields": ["advantage", "old"]}),
        )


def test_one_ratio_a_sample_and_an_advantage_a_unit_are_refused_together():
    @dataclass(frozen=True)
    class Both(ByArm):
        gives = frozenset({"score", "units"})

    with pytest.raises(ValueError, match="one ratio and one advantage a sample"):
        stage(
            terms("gspo", clip=0.2),
            judge=Both(),
            shape=("units", {"credit": "per_turn", "fields": ["advantage", "old"]}),
        )


def test_a_shape_must_make_what_the_objective_takes():
    shape = ("units", {"credit": "z_score", "fields": ["advantage"]})
    with pytest.raises(ValueError, match="provides advantage, which objective 'dpo' does not use"):
        stage(terms("dpo", beta=0.1), shape=shape)
    with pytest.raises(ValueError, match="takes PairLogLik, but the data makes LabelledLogLik"):
        stage(terms("dpo", beta=0.1), shape=("labelled", {}))


def test_fields_that_nothing_gives_or_reads_are_refused():
    with pytest.raises(ValueError, match="needs win_chosen, win_rejected"):
        stage(terms("sppo", beta=0.1), shape=("pairs", {"label": "hard"}))
    with pytest.raises(
        ValueError, match="provides win_chosen, win_rejected, which objective 'dpo' does not use"
    ):
        stage(terms("dpo", beta=0.1), shape=("pairs", {"label": "win_rate"}))


def test_a_shape_that_needs_more_than_the_judge_gives_is_refused():
    with pytest.raises(
        ValueError, match="the shape needs visits, which neither judge ByArm nor source On gives"
    ):
        stage(terms("dpo", beta=0.1), shape=("pairs", {"label": "visits"}))
    part = stage(terms("dpo", beta=0.1)).main
    with pytest.raises(ValueError, match="which neither no judge"):
        stage(terms("dpo", beta=0.1), anchors=(replace(part, judge=None, name="anchor"),))


def test_a_policy_gradient_never_trains_on_a_buffer():
    with pytest.raises(ValueError, match=r"keep\.buffer=all_past trains on old ones again"):
        stage(terms("rloo", clip=0.2), keep=Keep(buffer="all_past"))
    assert stage(terms("dpo", beta=0.1), keep=Keep(buffer="all_past"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, r"keep\.every=0 must be at least 1"),
        ({"every": 2}, r"keep\.every=2 needs keep\.stage=each_round"),
        ({"ema": 1.0}, r"keep\.ema=1\.0 must be in \[0, 1\)"),
        ({"buffer": "last"}, r"keep\.buffer_rounds=0 belongs to keep\.buffer=last"),
        ({"buffer_rounds": 2}, r"keep\.buffer_rounds=2 belongs to keep\.buffer=last"),
    ],
)
def test_keep_rules_that_cannot_mean_anything_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Keep(**settings)


def test_the_buffer_says_which_rounds_it_holds():
    assert list(Keep().past_rounds(3)) == []
    assert list(Keep(buffer="all_past").past_rounds(3)) == [0, 1, 2]
    assert list(Keep(buffer="last", buffer_rounds=2).past_rounds(3)) == [1, 2]
    assert list(Keep(buffer="last", buffer_rounds=2).past_rounds(1)) == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds=0 must be at least 1"),
        ({"num_contexts": 0}, "num_contexts=0 must be at least 1"),
        ({"num_epochs": 0}, "num_epochs=0 must be positive"),
    ],
)
def test_stages_of_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stage(terms("dpo", beta=0.1), **settings)


def test_a_part_uses_a_share_of_the_contexts():
    part = stage(terms("dpo", beta=0.1)).main
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="of the contexts must be in"):
            replace(part, share=share)
    assert isinstance(part, Part)


def test_a_registry_names_what_is_valid():
    registry = Registry("source", SOURCES)

    @registry.register("half")
    def half(*, share: float, size: int = 2):
        if share > 1:
            raise ValueError(f"share={share} is more than 1")
        return (share, size)

    assert registry.build("half", {"share": 0.5}) == (0.5, 2)
    assert "half" not in SOURCES.names()
    with pytest.raises(ValueError, match=r"no source 'hallf'\. Did you mean 'half'\? Valid names: .*half"):
        registry.build("hallf")
    with pytest.raises(ValueError, match="source 'half' has no option 'shre'; it takes share, size"):
        registry.build("half", {"shre": 1})
    with pytest.raises(ValueError, match="source 'half' needs 'share', which has no default"):
        registry.build("half")
    with pytest.raises(ValueError, match="source 'half': share=2 is more than 1"):
        registry.build("half", {"share": 2})
    with pytest.raises(ValueError, match="source 'half' is registered twice"):
        registry.register("half")(half)


def test_the_policy_of_the_cases_starts_as_it_says():
    assert policy().num_contexts == 8
