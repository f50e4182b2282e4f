import math
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from accelerate import Accelerator

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.reward_model import RewardModelConfig, ScoringConfig, make_member
from triptych.modalities.recsys.reward_training import (
    ResponseLikelihood,
    RewardExample,
    RewardTrainingConfig,
    calibration_error,
    collate,
    item_mean_scores,
    reward_examples,
    reward_task,
    session_labels,
    train_reward_model,
    within_user_auc,
)
from triptych.training.config import OptimConfig
from triptych.training.evaluation import evaluate

NUM_ITEMS, NUM_TASTES = 24, 4


@dataclass(frozen=True)
class Logs:
    user_N: torch.Tensor
    history: Jagged
    items_Nm: torch.Tensor
    signals: dict
    split_N: torch.Tensor


def logs(num_users=300, num_requests=4, m=3, strength=2.5, seed=0):
    """Users like items of one taste (item number modulo 4) and all like some items a little more than others.

    Whoever has a first request alone has no history.
    """
    generator = torch.Generator().manual_seed(seed)
    quality_I = 0.5 * torch.randn(NUM_ITEMS, generator=generator)
    taste_U = torch.randint(NUM_TASTES, (num_users,), generator=generator)
    user_N = torch.arange(num_users).repeat_interleave(num_requests)
    rows = []
    for n, user in enumerate(user_N.tolist()):
        length = int(torch.randint(3, 8, (1,), generator=generator)) if n % 10 else 0
        own = torch.randint(NUM_ITEMS // NUM_TASTES, (length,), generator=generator) * NUM_TASTES
        rows.append(own + taste_U[user])
    items_Nm = torch.rand(len(rows), NUM_ITEMS, generator=generator).topk(m).indices
    items_Nm[::5, -1] = -1
    match_Nm = (items_Nm % NUM_TASTES == taste_U[user_N].unsqueeze(1)).float()
    logit_Nm = strength * (2 * match_Nm - 1) + quality_I[items_Nm.clamp(min=0)]
    there = items_Nm >= 0
    uniform = torch.rand(items_Nm.shape, generator=generator)
    found = {name: ((uniform < (logit_Nm - d).sigmoid()) & there).float() for name, d in DEPTH.items()}
    split_N = torch.tensor([0, 0, 0, 1, 2])[torch.arange(num_users) % 5][user_N]
    swt_N = found["vtr"].sum(1) / there.sum(1)
    return Logs(user_N, Jagged.of(rows), items_Nm, {"swt": swt_N, **found}, split_N)


DEPTH = {"vtr": -0.5, "ltr": 0.5, "wtr": 1.0}
SMALL = RewardModelConfig(width=16, heads=2, hidden=32, dropout=0.1, num_members=2)
OPTIM = OptimConfig(lr=5e-3, batch_size=32, micro_batch_size=32, num_epochs=15, schedule="constant")
CONFIG = RewardTrainingConfig(model=SMALL, optim=OPTIM)


def train(these, config=CONFIG, **options):
    return train_reward_model(
        these, config, num_items=NUM_ITEMS, accelerator=Accelerator(cpu=True), **options
    )


@cache
def trained():
    return train(logs())


def example(history, items, labels):
    return RewardExample(
        id="a",
        source="request 0",
        history=torch.tensor(history, dtype=torch.int64),
        items=torch.tensor(items),
        labels=torch.tensor(labels),
    )


EXAMPLES = [
    example([1, 2, 3], [4, 5], [1.0, 0.25, 0.0, 0.5]),
    example([], [6, -1], [0.0, 1.0, 1.0, 0.75]),
]


def test_the_loss_is_the_sum_of_the_towers_cross_entropies():
    model, batch = make_member(SMALL, NUM_ITEMS, seed=0).eval(), collate(EXAMPLES)
    task = reward_task(EXAMPLES)
    with torch.no_grad():
        logits = model(batch.history, batch.items_Nm).tolist()
        loss, _ = task.terms({"none": task.likelihood(model, batch)})
    expected = []
    for row, one in zip(logits, EXAMPLES, strict=True):
        p = [1 / (1 + math.exp(-z)) for z in row]
        labels = one.labels.tolist()
        expected.append(
            -sum(y * math.log(q) + (1 - y) * math.log(1 - q) for q, y in zip(p, labels, strict=True))
        )
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_a_tower_has_a_term_of_its_own_in_the_likelihood():
    model, batch = make_member(SMALL, NUM_ITEMS, seed=0).eval(), collate(EXAMPLES)
    before = ResponseLikelihood().terms(model, batch)
    with torch.no_grad():
        model.get_parameter("towers.wtr.3.bias").add_(1.0)
    changed = (ResponseLikelihood().terms(model, batch) - before).abs() > 1e-4
    assert changed.tolist() == [[False, False, True, False]] * 2


def test_held_out_loss_does_not_depend_on_the_micro_batches():
    task, model = reward_task(reward_examples(logs(20), SMALL, split=0)), make_member(SMALL, 24, seed=0)
    one, many = (
        evaluate(task, model, Accelerator(cpu=True), micro_batch_size=size, seed=0)["loss"] for size in (1, 7)
    )
    torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-5)


def test_labels_are_means_over_the_items_that_there_are():
    items = torch.tensor([[3, 4, -1], [5, 6, 7]])
    signals = {
        "swt": torch.tensor([0.5, 1.0]),
        "vtr": torch.tensor([[1.0, 0.0, math.nan], [1.0, 1.0, 0.0]]),
    }
    found = session_labels(signals, items, ("vtr", "swt"))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [2 / 3, 1.0]]))


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ({"swt": torch.zeros(1)}, "no signal 'vtr'; there are swt"),
        ({"vtr": torch.zeros(1, 3)}, "shape \\(1, 3\\); expected \\(1, 2\\) or \\(1,\\)"),
        ({"vtr": torch.tensor([[2.0, 1.0]])}, "'vtr' must be in \\[0, 1\\]"),
        ({"vtr": torch.tensor([math.nan])}, "'vtr' must be in \\[0, 1\\]"),
    ],
)
def test_a_signal_that_is_no_label_is_refused(signals, said):
    with pytest.raises(ValueError, match=said):
        session_labels(signals, torch.tensor([[1, 2]]), ("vtr",))


def test_examples_are_the_requests_of_their_split_with_the_latest_of_their_history():
    these = logs(num_users=5, num_requests=1)
    found = reward_examples(these, replace(SMALL, window=2), split=0)
    assert [e.source for e in found] == ["request 0 of user 0", "request 1 of user 1", "request 2 of user 2"]
    row = these.history.values[these.history.offsets[1] : these.history.offsets[2]]
    assert torch.equal(found[1].history, row[-2:])
    assert [len(e.history) for e in found] == [0, 2, 2]
    assert torch.equal(found[1].items, these.items_Nm[1])
    with pytest.raises(ValueError, match="no logged session has split 4"):
        reward_examples(these, SMALL, split=4)


def test_within_user_auc_compares_sessions_of_one_user_alone():
    user = torch.tensor([7, 7, 7, 2, 2, 5])
    label = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0, 1.0])
    # User 7: (1 > .5) wrong, (1 > 0) right, (.5 > 0) right; user 2: a tie; user 5 has one session.
    score = torch.tensor([0.1, 0.9, 0.8, 0.5, 0.5, 0.0])
    assert within_user_auc(score, label, user) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert math.isnan(within_user_auc(score, torch.ones(6), user))


def test_calibration_error_by_hand():
    # Ten bins of two: nine of p = .5 with labels 0 and 1, and one of p = .9 with labels 0 and 0.
    p, y = torch.tensor([0.5] * 18 + [0.9] * 2), torch.tensor([0.0, 1.0] * 9 + [0.0, 0.0])
    assert calibration_error(p, y) == pytest.approx(0.1 * 0.9)
    assert calibration_error(y, y) == 0.0


def test_calibration_error_does_not_depend_on_the_order_of_sessions():
    p, y = torch.arange(20) / 20, torch.arange(20) % 3 / 2
    mixed = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    # Bins (0, .05), (.1, .15), ... of labels (0, .5), (1, 0), (.5, 1) and so on.
    gaps = [abs(float((p - y)[2 * i : 2 * i + 2].sum())) for i in range(10)]
    assert calibration_error(p[mixed], y[mixed]) == pytest.approx(sum(gaps) / 20)


def test_item_means_are_of_training_sessions_and_shrunk():
    these = Logs(
        torch.tensor([0, 1, 2]),
        Jagged.of([torch.tensor([0])] * 3),
        torch.tensor([[0, 1], [0, -1], [1, 2]]),
        {"vtr": torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), "swt": torch.tensor([1.0, 0.0, 0.5])},
        torch.tensor([0, 0, 1]),
    )
    # Mean 2/3 of three displays; item 0: (2 + 2/3) / 3 = 8/9, item 1: (2/3) / 2 = 1/3, item 2: 2/3.
    found = item_mean_scores(these, "vtr", num_items=3, prior=1.0)
    torch.testing.assert_close(found, torch.tensor([11 / 18, 8 / 9, 1 / 2], dtype=torch.float64))
    # swt: mean 2/3 too; item 0: (1 + 2/3) / 3 = 5/9, item 1: (1 + 2/3) / 2 = 5/6.
    found = item_mean_scores(these, "swt", num_items=3, prior=1.0)
    torch.testing.assert_close(found[1:], torch.tensor([5 / 9, 3 / 4], dtype=torch.float64))


def test_where_response_is_a_match_of_user_and_item_the_model_beats_item_means_within_users():
    metrics = trained().metrics
    for tower in SMALL.towers:
        assert metrics[f"{tower}/within_user_auc"] > metrics[f"{tower}/item_mean_auc"] + 0.1
        assert metrics[f"{tower}/bce"] < metrics[f"{tower}/base_rate_bce"] - 0.03
        assert metrics[f"{tower}/calibration"] < 0.15


def test_members_of_a_trained_ensemble_differ_and_z_scores_are_of_validation():
    made, these = trained().ensemble, logs()
    rows = (these.split_N == 1).nonzero()[:, 0]
    p = made.probabilities(these.history, these.items_Nm[rows], rows)
    assert float(p.std(0, correction=0).mean()) > 1e-3
    torch.testing.assert_close(made.mean_RK, p.mean(1))
    score = made.score(these.history, these.items_Nm[rows], rows)
    assert abs(float(score.mean())) < 1e-4


def test_the_best_epoch_on_validation_is_kept_and_patience_ends_training():
    found = train(logs(60), replace(CONFIG, optim=replace(OPTIM, lr=3e-2, num_epochs=40), patience=2))
    task = reward_task(reward_examples(logs(60), SMALL, split=1))
    for member, losses in zip(found.ensemble.members, found.losses, strict=True):
        best = losses.index(min(losses))
        assert len(losses) == best + 3 < 40
        rows = evaluate(task, member, Accelerator(cpu=True), micro_batch_size=32, seed=0)
        assert float(rows["loss"].mean()) == pytest.approx(losses[best], rel=1e-6)


def test_judge_users_are_never_looked_at():
    these, short = logs(30), replace(CONFIG, optim=replace(OPTIM, num_epochs=1))
    judge = these.split_N == 2
    broken = {
        name: torch.where(judge if s.ndim == 1 else judge.unsqueeze(1), 1 - s, s)
        for name, s in these.signals.items()
    }
    one, other = train(these, short), train(replace(these, signals=broken), short)
    assert one.losses == other.losses
    assert one.metrics == other.metrics
    pairs = zip(one.ensemble.state_dict().values(), other.ensemble.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_model_and_another_another():
    these, short = logs(30), replace(CONFIG, optim=replace(OPTIM, num_epochs=1))
    first, again, other = train(these, short), train(these, short), train(these, replace(short, seed=1))
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert first.losses[0] != first.losses[1]


def test_features_of_items_and_fewer_towers_are_trained_too():
    config = replace(
        CONFIG,
        model=replace(SMALL, towers=("vtr",), num_members=1),
        optim=replace(OPTIM, num_epochs=1),
        scoring=ScoringConfig(kind="one", tower="vtr"),
    )
    lines = []
    found = train(logs(30), config, features_IF=torch.eye(NUM_ITEMS), report=lines.append)
    assert set(found.metrics) == {
        f"vtr/{n}" for n in ("bce", "base_rate_bce", "calibration", "within_user_auc", "item_mean_auc")
    }
    assert lines[0].startswith("reward model 1 of 1: validation loss 0.")
    with pytest.raises(ValueError, match="features have 3 rows; expected 24"):
        train(logs(30), config, features_IF=torch.eye(3))


def test_settings_and_items_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"reward\.patience=0"):
        replace(CONFIG, patience=0)
    with pytest.raises(ValueError, match=r"reward\.optim\.average=0\.5"):
        replace(CONFIG, optim=replace(OPTIM, average=0.5))
    with pytest.raises(ValueError, match="num_items=5, but the logs have items"):
        train_reward_model(logs(30), CONFIG, num_items=5, accelerator=Accelerator(cpu=True))
