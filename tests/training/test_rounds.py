import json
from dataclasses import dataclass, replace

import pytest
import torch
from round_cases import (
    REWARD,
    ByArm,
    Remembering,
    expected_reward,
    optim,
    policy,
    run,
    stage,
    terms,
)
from toy import cpu_accelerator

from triptych.modalities.tabular.port import TabularPort
from triptych.modalities.tabular.sources import SOURCES
from triptych.objectives import Term, build
from triptych.training.round_state import plan, slots_of
from triptych.training.shapes import SHAPES, shape_for
from triptych.training.stages import Keep, Part

METHODS = {
    "online DPO": ("dpo", {"beta": 0.1}, {}),
    "online IPO": ("ipo", {"tau": 0.1, "reduce": "sum"}, {}),
    "SPPO": ("sppo", {"beta": 0.1}, {"reference": "stage"}),
    "BRAIn": ("brain", {"gamma": 0.3}, {}),
    "GRPO": ("grpo", {"clip": 0.2}, {}),
    "RLOO": ("rloo", {"clip": 0.2}, {}),
    "DAPO": ("dapo", {"clip": 0.2, "clip_high": 0.28}, {}),
    "P3O": ("p3o", {"clip": 0.2}, {"reference": "stage"}),
    "KTO": ("kto", {"beta": 0.1}, {}),
    "Plackett-Luce": ("plackett_luce", {"beta": 0.1}, {}),
}
EACH = Keep(stage="each_round")


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_one_loop_raises_the_expected_reward_by_every_method(method, tmp_path):
    name, options, more = METHODS[method]
    keep = EACH if more else Keep()
    model, outcome, _ = run(tmp_path, [stage(terms(name, **more, **options), keep=keep, num_rounds=6)])
    assert outcome.finished
    assert expected_reward(model) > expected_reward(policy()) + 0.1


def test_a_shuffled_reward_teaches_nothing(tmp_path):
    @dataclass(frozen=True)
    class Noise(ByArm):
        def __call__(self, groups, live):
            found = super().__call__(groups, live)
            flips = torch.rand(len(groups), generator=live.generator("noise")) < 0.5
            return [replace(v, score=-v.score) if f else v for v, f in zip(found, flips, strict=True)]

    model, *_ = run(tmp_path, [stage(terms("dpo", beta=0.1), judge=Noise(), num_rounds=6)])
    assert abs(expected_reward(model) - expected_reward(policy())) < 0.1


def moving_stages():
    """Two stages with all that a checkpoint must keep: moving references, a buffer, memory, anchors."""
    first = stage(
        terms("dpo", beta=0.1, reference="stage"),
        judge=Remembering(),
        keep=Keep(stage="each_round", every=2, buffer="last", buffer_rounds=2, average=True),
        num_rounds=3,
        num_epochs=1.5,
    )
    anchor = Part(
        source=SOURCES.build("on", {"num_candidates": 2}),
        judge=None,
        shape=shape_for(build("kl_leave_one_out")),
        terms=terms("kl_leave_one_out"),
        weight=0.1,
        batch_size=2,
        share=0.5,
        name="kl",
    )
    second = stage(
        terms("sppo", beta=0.2, reference="ema"), anchors=(anchor,), keep=Keep(ema=0.8), num_rounds=2
    )
    return [first, second]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, outcome, state = run(folder, moving_stages())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights(model), outcome, state, lines


@pytest.mark.parametrize("stop_after", range(1, 18, 2))
def test_a_run_stopped_anywhere_goes_on_to_the_same_weights(uninterrupted, stop_after, tmp_path):
    expected, outcome, whole, lines = uninterrupted
    assert outcome.step > 17
    _, cut, _ = run(tmp_path, moving_stages(), stop_after=stop_after)
    assert cut.step == stop_after
    model, again, state = run(tmp_path, moving_stages())
    assert again.step == outcome.step
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(model), strict=True))
    assert torch.equal(state.memory["seen"], whole.memory["seen"])
    for slot in ("stage", "ema"):
        for name, value in whole.moving[slot].values.items():
            assert torch.equal(value, state.moving[slot].values[name])
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines


def test_a_run_stopped_after_every_step_goes_on_to_the_same_weights(uninterrupted, tmp_path):
    expected, outcome, *_ = uninterrupted
    for _ in range(outcome.step):
        model, cut, _ = run(tmp_path, moving_stages(), stop_after=1)
    assert cut.step == outcome.step
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(model), strict=True))


@pytest.mark.parametrize("steps", [3, 6])
def test_a_run_killed_after_a_draw_draws_again_and_logs_each_round_once(uninterrupted, steps, tmp_path):
    expected, _, _, lines = uninterrupted
    run(tmp_path, moving_stages(), stop_after=steps)

    class Killed(Exception):
        pass

    with pytest.raises(Killed):
        run(tmp_path, moving_stages(), stop_raises=Killed)
    model, *_ = run(tmp_path, moving_stages())
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(model), strict=True))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines


def test_the_average_is_the_mean_of_the_policies_at_the_ends_of_rounds(tmp_path):
    ends = []

    class Watch(ByArm):
        def __call__(self, groups, live):
            ends.append(live.policy.logits.detach().clone())
            return super().__call__(groups, live)

    model, _, state = run(
        tmp_path, [stage(terms("dpo", beta=0.1), judge=Watch(), keep=Keep(average=True), num_rounds=3)]
    )
    mean = torch.stack([*ends[1:], model.logits.detach()]).mean(0)
    torch.testing.assert_close(state.average["logits"], mean)


def test_the_previous_iterate_is_what_the_stage_was_before_it_moved(tmp_path):
    starts, seen = [], []

    @dataclass(frozen=True)
    class Watch(ByArm):
        slot: str = "previous"

        def __call__(self, groups, live):
            starts.append(live.policy.logits.detach().clone())
            seen.append(live.references["previous"].values["logits"].clone())
            assert torch.equal(live.references["stage"].values["logits"], starts[-1])
            return super().__call__(groups, live)

    run(tmp_path, [stage(terms("dpo", beta=0.1), judge=Watch(), keep=EACH, num_rounds=3)])
    assert torch.equal(seen[0], starts[0])
    assert torch.equal(seen[1], starts[0])
    assert torch.equal(seen[2], starts[1])


def test_slots_are_found_among_the_options_of_judges():
    @dataclass(frozen=True)
    class Inner(ByArm):
        slot: str = "ema"

    @dataclass(frozen=True)
    class Outer(ByArm):
        experts: dict
        of: tuple = ()

    assert slots_of(stage(terms("dpo", beta=0.1), judge=Outer({"a": Inner()}))) == {"frozen", "ema"}
    assert slots_of(stage(terms("dpo", beta=0.1), judge=Outer({}, (Inner("stage"),)))) == {"frozen", "stage"}


def test_a_slot_that_rounds_do_not_have_is_named(tmp_path):
    @dataclass(frozen=True)
    class Odd(ByArm):
        slot: str = "sibling"

    with pytest.raises(
        ValueError, match="rounds have the references frozen, stage, ema, previous, not sibling"
    ):
        run(tmp_path, [stage(terms("dpo", beta=0.1), judge=Odd())])


class Counting:
    """A port that counts the candidates whose log-probs it is asked for, and by which policy."""

    def __init__(self, port):
        self.port, self.graded, self.plain = port, 0, 0

    def __getattr__(self, name):
        return getattr(self.port, name)

    def terms(self, policy, batch, generator=None):
        if torch.is_grad_enabled():
            self.graded += len(batch.keys)
        else:
            self.plain += len(batch.keys)
        return self.port.terms(policy, batch, generator)


def test_log_probs_of_drawing_are_never_computed_again(tmp_path):
    listing = 4 * 6 * 2  # the tabular source lists every arm of every context in order to draw, each round
    for reference, extra in (("stage", 0), ("frozen", 2 * 6 * 2)):
        port = Counting(TabularPort(num_actions=4))
        objective = terms("sppo", beta=0.1, reference=reference)
        run(tmp_path / reference, [stage(objective, shape=half(), keep=EACH, num_rounds=2)], port=port)
        # The policy that drew is the reference 'stage': its values are those of drawing. 'frozen' costs more.
        assert port.plain - listing == extra
        assert port.graded == 2 * 6 * 2


def half():
    return ("pairs", {"ties": "half", "label": "win_rate"})


def test_a_policy_gradient_reads_the_old_log_probs_from_the_draw(tmp_path):
    port = Counting(TabularPort(num_actions=4))
    run(tmp_path, [stage(terms("rloo", clip=0.2), num_rounds=1)], port=port)
    assert port.plain == 4 * 6


def test_rounds_without_a_sample_are_passed_over_and_reported(tmp_path):
    class Equal(ByArm):
        def __call__(self, groups, live):
            found = super().__call__(groups, live)
            return found if live.round != 1 else [replace(v, score=torch.zeros(4)) for v in found]

    reports = []
    start = weights(policy())
    model, outcome, _ = run(
        tmp_path, [stage(terms("dpo", beta=0.1), judge=Equal(), num_rounds=3)], reports=reports
    )
    assert outcome.finished
    assert outcome.step == 6
    assert reports == ["stage main, round 2: no sample is left to train on"]
    assert not torch.equal(start[0], weights(model)[0])


def test_the_plan_gives_each_round_the_steps_of_its_largest_number_of_samples():
    one = stage(terms("dpo", beta=0.1), num_rounds=2, num_contexts=6)
    every = stage(
        terms("dpo", beta=0.1), shape=("pairs", {"which": "all"}), num_rounds=1, num_contexts=6, k=3
    )
    growing = stage(terms("dpo", beta=0.1), keep=Keep(buffer="all_past"), num_rounds=3, num_contexts=6)
    config = optim(batch_size=4)
    assert [(s.start, s.end) for s in plan([one], config)] == [(0, 2), (2, 4)]
    assert [(s.start, s.end) for s in plan([every], config)] == [(0, 5)]
    assert [s.end - s.start for s in plan([growing], config)] == [2, 3, 5]
    assert [s.stage for s in plan([one, every], config)] == [0, 0, 1]


def test_an_anchor_adds_its_weighted_gradient(tmp_path):
    """One step of SGD-like size: loss = dpo + w kl, so the update is that of the sum of the two gradients."""

    def anchor(weight):
        return Part(
            source=SOURCES.build("on", {"num_candidates": 4}),
            judge=None,
            shape=shape_for(build("kl_leave_one_out")),
            terms=terms("kl_leave_one_out"),
            weight=weight,
            name="kl",
        )

    losses = {}
    for weight in (0.0001, 1.0):
        folder = tmp_path / str(weight)
        run(folder, [stage(terms("dpo", beta=0.1), anchors=(anchor(weight),), num_rounds=2)])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[weight] = [line for line in lines if "kl/loss" in line]
    assert losses[1.0]
    # At the start policy and reference are the same, so the anchor's gradient is 0; later it is not.
    assert losses[1.0][0]["kl/loss"] == pytest.approx(0.0, abs=1e-6)
    first = [line["grad_norm"] for line in losses[0.0001] if "grad_norm" in line]
    second = [line["grad_norm"] for line in losses[1.0] if "grad_norm" in line]
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    assert abs(first[-1] - second[-1]) > 1e-4


def test_a_critic_learns_the_value_of_its_contexts(tmp_path):
    objective = terms("ppo", Term(build("ppo_value", clip=10.0), 1.0), clip=0.2)
    made = stage(
        objective,
        shape=("units", {"credit": "gae", "fields": ["advantage", "old", "old_value", "target"]}),
        has_critic=True,
        num_rounds=30,
        num_contexts=8,
        k=8,
    )
    model, *_ = run(tmp_path, [made], config=optim(batch_size=8, micro_batch_size=8, lr=0.03))
    reward = (model.conditionals().detach()[:, 0].exp() * torch.tensor(REWARD)).sum(-1)
    assert expected_reward(model) > expected_reward(policy()) + 0.1
    assert (model.critic.detach()[:, 0] - reward).abs().mean() < 0.2


def test_shards_are_refused(tmp_path, monkeypatch):
    model = policy()
    model.logits.device_mesh = "a mesh"
    with pytest.raises(ValueError, match="use DDP, not FSDP"):
        run(tmp_path, [stage(terms("dpo", beta=0.1))], model=model, accelerator=cpu_accelerator())


def test_metrics_say_how_a_round_went(tmp_path):
    run(tmp_path, [stage(terms("dpo", beta=0.1), judge=Remembering(), num_rounds=2)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "reward" in line]
    assert [line["step"] for line in rounds] == [1, 3]
    assert rounds[0]["round/groups"] == 6
    assert rounds[0]["reward_best"] >= rounds[0]["reward"]
    assert rounds[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_shapes_are_those_of_the_registry():
    assert {"pairs", "lists", "labelled", "units"} <= set(SHAPES.names())
