"""The moving average of the weights, `optim.average`, and the untrained policy as its own reference."""

import math
import shutil
from pathlib import Path

import pytest
import round_cases
import torch
from toy import (
    Run,
    ToyLikelihood,
    collate,
    make_policy,
    make_samples,
    make_task,
    optim,
    same_bits,
    train,
    weights,
)

from triptych.training.checkpoint import load_checkpoint
from triptych.training.logs import read_metrics
from triptych.training.loop import referenced
from triptych.training.references import Cached, FrozenCopy, Untrained
from triptych.training.values import ValueStore

NUM_STEPS = 12
DECAY = 0.4  # (1 + n) / (10 + n) is less up to step 4, so both halves of the rule are seen
EVERY = {"save_every": 1, "keep_checkpoints": NUM_STEPS}
AVERAGED = {"average": DECAY}


def checkpoint(folder, step):
    return load_checkpoint(Path(folder) / "checkpoints" / f"step-{step:08d}").tensors


def result(folder):
    """What a run leaves that must be the same bit by bit."""
    last = Path(folder) / "checkpoints" / f"step-{NUM_STEPS:08d}"
    names = ("policy.safetensors", "average.safetensors", "optimizer.safetensors", "state.json")
    return [(Path(folder) / "metrics.jsonl").read_bytes(), *((last / name).read_bytes() for name in names)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with an average and a checkpoint at every step, and its learner."""
    folder = tmp_path_factory.mktemp("averaged")
    _, learner, _, _ = train(Run(str(folder), lora=False, optim=AVERAGED, run=EVERY))
    return folder, learner


@pytest.fixture(scope="module")
def by_hand(uninterrupted):
    """a_0 = w_0, a_n = d a_(n-1) + (1 - d) w_n with d = min(decay, (1 + n) / (10 + n)), in float64."""
    average = {n: p.double() for n, p in weights(make_policy(dropout=0.3)).items()}
    found = [average]
    for step in range(1, NUM_STEPS + 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        raw = checkpoint(uninterrupted[0], step)["policy"]
        average = {n: decay * a + (1 - decay) * raw[n].double() for n, a in average.items()}
        found.append(average)
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_average_and_the_final_policy_are_those_worked_by_hand(uninterrupted, by_hand):
    folder, learner = uninterrupted
    for step in range(1, NUM_STEPS + 1):
        assert_close(checkpoint(folder, step)["average"], by_hand[step])
    last = checkpoint(folder, NUM_STEPS)
    assert same_bits(weights(learner.policy), last["average"])
    # The last weights themselves are elsewhere, and are not lost.
    assert max(float((last["policy"][n] - last["average"][n]).abs().max()) for n in last["policy"]) > 1e-4


def test_held_out_metrics_are_the_averages(uninterrupted, by_hand):
    events = read_metrics(uninterrupted[0] / "metrics.jsonl")
    found = {e["step"]: e["loss"] for e in events if e["split"] == "eval"}
    # The toy evaluation is the sum of all weights.
    expected = {step: sum(float(a.sum()) for a in by_hand[step].values()) for step in (0, 4, 8, 12)}
    assert found == pytest.approx(expected, abs=1e-5)
    raw = sum(float(p.double().sum()) for p in checkpoint(uninterrupted[0], 8)["policy"].values())
    assert abs(raw - expected[8]) > 1e-3


def test_training_goes_on_with_the_weights_themselves(uninterrupted, tmp_path):
    """Step by step the weights and losses are those of a run without an average."""
    train(Run(str(tmp_path), lora=False, run=EVERY))
    for step in (4, 5, NUM_STEPS):
        found, plain = checkpoint(uninterrupted[0], step), checkpoint(tmp_path, step)
        assert "average" not in plain
        for group in ("policy", "optimizer"):
            assert same_bits(found[group], plain[group])
    logged = [
        [e for e in read_metrics(folder / "metrics.jsonl") if e["split"] == "train"]
        for folder in (uninterrupted[0], tmp_path)
    ]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_with_an_average_ends_as_if_it_was_not(lora, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, learner, _, _ = train(Run(str(whole), lora=lora, optim=AVERAGED))
    _, stopped, _, _ = train(Run(str(parts), lora=lora, optim=AVERAGED, stop_at=5))
    # A run that is to go on keeps its own weights.
    raw = checkpoint(parts, 5)["policy"]
    assert same_bits({n: p for n, p in weights(stopped.policy).items() if n in raw}, raw)
    _, again, lines, _ = train(Run(str(parts), lora=lora, optim=AVERAGED))
    assert lines == ["resumed from checkpoints/step-00000005"]
    assert result(parts) == result(whole)
    assert same_bits(weights(again.policy), weights(learner.policy))


def test_a_run_that_lost_steps_since_its_last_checkpoint_repeats_them_with_the_same_average(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Run(str(whole), optim=AVERAGED))
    train(Run(str(parts), optim=AVERAGED, stop_at=8))
    shutil.rmtree(parts / "checkpoints" / "step-00000008")  # as a kill after step 8 leaves it
    _, _, lines, _ = train(Run(str(parts), optim=AVERAGED))
    assert lines == ["resumed from checkpoints/step-00000006"]
    assert result(parts) == result(whole)


def test_a_finished_run_called_again_still_ends_with_its_average(tmp_path):
    _, learner, _, _ = train(Run(str(tmp_path), optim=AVERAGED))
    _, again, _, events = train(Run(str(tmp_path), optim=AVERAGED))
    assert events.names == []
    assert same_bits(weights(again.policy), weights(learner.policy))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"optim\.average={decay} is a decay and must be in \[0, 1\)"):
        optim(average=decay)


def test_rounds_refuse_an_average_of_the_weights(tmp_path):
    stages = (round_cases.stage(round_cases.terms("grpo", clip=0.2, reference="none")),)
    with pytest.raises(ValueError, match=r"rounds keep no average of the weights.*optim\.average=0"):
        round_cases.run(tmp_path, stages, config=round_cases.optim(average=0.9))


def test_the_untrained_policy_is_its_own_reference_and_loses_nothing_by_it():
    policy, batch = make_policy(dropout=0.5), collate(make_samples(6))
    policy.hidden.weight.requires_grad_(False)
    before = (
        weights(policy),
        [m.training for m in policy.modules()],
        [p.requires_grad for p in policy.parameters()],
    )
    terms = Untrained()(ToyLikelihood(), policy, batch)
    # Without dropout, although the policy trains with it, and without a gradient.
    assert torch.equal(terms, FrozenCopy.of(policy)(ToyLikelihood(), policy, batch))
    assert not terms.requires_grad
    assert same_bits(weights(policy), before[0])
    assert [m.training for m in policy.modules()] == before[1]
    assert [p.requires_grad for p in policy.parameters()] == before[2]
    with Untrained().active(policy) as module:
        assert module is policy


def test_the_untrained_policy_makes_dpo_start_at_log_two_and_its_cached_values_stay():
    policy, samples = make_policy(), make_samples(6)
    cached = Cached(ValueStore(None), "base", Untrained())
    assert cached.fill(ToyLikelihood(), policy, [collate(samples)], torch.device("cpu")) == 12
    copied = FrozenCopy.of(policy)
    task = make_task(samples, {"frozen": cached})
    loss_B, _ = task.terms(referenced(task, policy.eval(), collate(samples)))
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-6)
    with torch.no_grad():
        policy.score.bias.add_(1.0)
    # Training reaches neither the table nor a copy; the bare reference would follow.
    batch = collate(samples)
    stored, live = (r(ToyLikelihood(), policy, batch) for r in (cached, copied))
    assert torch.equal(stored, live)
    assert not torch.equal(Untrained()(ToyLikelihood(), policy, batch), live)
