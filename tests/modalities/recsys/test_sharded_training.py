"""Runs whose tables two ranks share out: the numbers of one process, exact resuming, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from toy import cpu_accelerator, run_ranks
from training_ranks import (
    HALF,
    NUM_STEPS,
    OVERRIDE,
    begun,
    configured,
    everything,
    half_of,
    scripted,
    trained_run,
    write_events,
)

from triptych.modalities.recsys.exported import load
from triptych.modalities.recsys.outcome import validation
from triptych.modalities.recsys.setup import RecsysConfig, TablesConfig
from triptych.modalities.recsys.sharded_run import sharing
from triptych.modalities.recsys.sharded_tables import TorchrecTables
from triptych.modalities.recsys.tables import TableSpec
from triptych.scripts import recommend
from triptych.scripts.common import parse
from triptych.training.checkpoint import CheckpointError, load_checkpoint
from triptych.training.config import learning_rate
from triptych.training.fit import load_learner
from triptych.training.order import window

SGD = TablesConfig(optimizer="sgd", lr=0.1)
TABLES = {
    "tokens.item_table.tables.collection.embeddings.item.weight": (15, 8),
    "tokens.item_table.tables.collection.embeddings.genre.weight": (3, 8),
    "tokens.user_table.tables.collection.embeddings.user.weight": (14, 8),
}


@pytest.fixture(scope="module")
def torchrec_there():
    try:
        TorchrecTables((TableSpec("item", 2),), 4)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def two(torchrec_there, tmp_path_factory):
    """A folder of runs, of one process and of two, and what each rank found."""
    folder = tmp_path_factory.mktemp("two")
    events = write_events(folder / "events.csv")
    trained_run(configured(folder / "one", events))
    assert run_ranks(everything, 2, str(folder), str(events)) == [0, 0]
    return folder, [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)]


def plain_name(name):
    """A table's name with torch's tables."""
    return name.replace(".collection.embeddings.", ".embeddings.")


def logged(folder, name="loss"):
    """A metric by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def alone(config):
    """Losses and weights of one process's steps: SGD for torch's tables, AdamW and clipping for the rest."""
    made, _ = begun(config, cpu_accelerator())
    task, policy, optim = made.task, made.policy.train(), config.optim
    named = dict(policy.named_parameters())
    tables = [named.pop(plain_name(name)) for name in TABLES]
    rest = torch.optim.AdamW(named.values(), lr=1.0, eps=optim.eps, weight_decay=0.0)
    sgd, losses = torch.optim.SGD(tables, lr=1.0), []
    for step in range(NUM_STEPS):
        draws = window(seed=0, step=step, num_samples=len(task.examples), batch_size=optim.batch_size)
        batch = task.collate([task.examples[d.index] for d in draws], draws)
        loss_B, _ = task.terms({"none": task.likelihood(policy, batch)})
        loss = task.fold(loss_B, batch).sum() / optim.batch_size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), optim.max_grad_norm)
        rate = learning_rate(optim, step=step, num_steps=NUM_STEPS)
        rest.param_groups[0]["lr"], sgd.param_groups[0]["lr"] = rate, SGD.lr * rate / optim.lr
        for optimizer in (rest, sgd):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in policy.named_parameters()}


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_one_optimizer_for_tables_and_one_for_the_rest(two):
    folder, _ = two
    losses, weights = alone(configured(folder / "none", folder / "events.csv", model={"tables": "torch"}))
    assert [*logged(folder / "sgd").values()] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 1
    found, fresh = (
        load_file(folder / "sgd.safetensors"),
        begun(
            configured(folder / "none", folder / "events.csv", model={"tables": "torch"}), cpu_accelerator()
        )[0].policy,
    )
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    for name in TABLES:
        before = dict(fresh.named_parameters())[plain_name(name)]
        assert (weights[plain_name(name)] - before).abs().max() > 0.01


@pytest.mark.slow
def test_a_run_that_goes_on_in_the_middle_ends_with_the_same_bytes(two):
    folder, ranks = two
    last = f"checkpoints/step-{NUM_STEPS:08d}"
    for name in ("metrics.jsonl", *(f"{last}/{g}.safetensors" for g in ("policy", "optimizer", "fused"))):
        assert (folder / "halves" / name).read_bytes() == (folder / "default" / name).read_bytes(), name
    assert all(f"resumed from checkpoints/step-{HALF:08d}" in rank["lines halves"] for rank in ranks)
    assert not any("begins anew" in line for rank in ranks for line in rank["lines halves"])


@pytest.mark.slow
def test_a_checkpoint_holds_tables_whole_by_the_names_of_one_process(two):
    folder, _ = two
    step = f"checkpoints/step-{HALF:08d}"
    mine, theirs = (load_checkpoint(folder / name / step) for name in ("default", "one"))
    shapes = [{n: tuple(t.shape) for n, t in c.tensors["policy"].items()} for c in (mine, theirs)]
    assert shapes[0] == shapes[1]
    assert {n: shapes[0][n] for n in TABLES} == TABLES
    assert mine.state["fused"] == sorted(TABLES)
    assert "fused" not in theirs.state
    # Row-wise Adagrad's memory is a number a row.
    remembered = {n: tuple(t.shape) for n, t in mine.tensors["fused"].items()}
    assert remembered == {f"{plain_name(name)}.momentum1": shape[:1] for name, shape in TABLES.items()}
    assert all(t.max() > 0 for t in mine.tensors["fused"].values())
    assert "fused" not in load_checkpoint(folder / "sgd" / step).tensors  # SGD remembers nothing


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(two, tmp_path):
    folder, _ = two
    half_of(folder / "sgd", tmp_path / "run")
    events = folder / "events.csv"
    with pytest.raises(CheckpointError, match="num_ranks: 2 in the checkpoint, 1 now"):
        trained_run(configured(tmp_path / "run", events))
    config = configured(tmp_path / "run", events, run={"resume_override": OVERRIDE})
    checkpoint = load_checkpoint(folder / "sgd" / f"checkpoints/step-{HALF:08d}")
    learner = begun(config, cpu_accelerator())[1]
    load_learner(learner, checkpoint)
    for name, parameter in learner.named.items():
        assert torch.equal(parameter, checkpoint.tensors["policy"][name]), name
        state = learner.optimizer.optimizer.state.get(parameter, {})
        if name in TABLES:
            assert not state
        else:
            assert torch.equal(state["exp_avg"], checkpoint.tensors["optimizer"][f"state/{name}/exp_avg"])
    _, _, lines = trained_run(config)
    assert sum("another optimizer than in the checkpoint" in line for line in lines) == 1
    # The loss of the first step is of the weights alone.
    losses = logged(tmp_path / "run"), logged(folder / "sgd")
    assert losses[0][HALF + 1] == pytest.approx(losses[1][HALF + 1], abs=1e-5)
    assert max(losses[0]) == NUM_STEPS


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_in_two_ranks(two):
    folder, ranks = two
    for rank in ranks:
        assert sum("another optimizer than in the checkpoint" in line for line in rank["lines from one"]) == 1
    mine, theirs = logged(folder / "from one"), logged(folder / "one")
    assert [*mine] == [HALF + 1, HALF + 2, NUM_STEPS]
    assert mine[HALF + 1] == pytest.approx(theirs[HALF + 1], abs=1e-5)
    checkpoint = load_checkpoint(folder / "from one" / f"checkpoints/step-{NUM_STEPS:08d}")
    assert {*checkpoint.tensors["optimizer"]}.isdisjoint(f"state/{name}/exp_avg" for name in TABLES)
    # AdamW's step count of the rest went on.
    assert checkpoint.tensors["optimizer"]["state/norm.weight/step"] == NUM_STEPS


@pytest.mark.slow
def test_held_out_metrics_are_of_the_whole_policy(two):
    folder, _ = two
    config = configured(folder / "none", folder / "events.csv", model={"tables": "torch"})
    made, _ = begun(config, cpu_accelerator())
    made.policy.load_state_dict(load_file(folder / "default.safetensors"), strict=False)
    found = validation(made, config)(made.policy)
    assert logged(folder / "default", "ranking/ndcg@3")[NUM_STEPS] == pytest.approx(found["ranking/ndcg@3"])
    assert [*logged(folder / "default", "ranking/ndcg@3")] == [0, HALF, NUM_STEPS]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_any_table_changes(two):
    mine, theirs = (rank["loss"] for rank in two[1])
    assert mine["message"] == theirs["message"]
    assert "the loss is not finite for user p" in mine["message"]
    assert mine["message"].endswith("The weights were not changed. Look at these records.")
    assert not any(rank[what] for rank in (mine, theirs) for what in ("tables", "dense"))


@pytest.mark.slow
def test_where_only_the_gradient_tells_the_message_says_that_tables_have_changed(two):
    mine, theirs = (rank["gradient"] for rank in two[1])
    assert mine["message"] == theirs["message"]
    assert "Backward has changed the tables that ranks share out" in mine["message"]
    assert not mine["dense"]
    assert not theirs["dense"]


@pytest.mark.slow
@pytest.mark.usefixtures("torchrec_there")
def test_the_script_trains_reports_and_exports_on_two_ranks(tmp_path, capsys):
    events = write_events(tmp_path / "events.csv")
    assert run_ranks(scripted, 2, str(tmp_path / "run"), str(events)) == [0, 0]
    assert "Ranking of held-out items" in (tmp_path / "run" / "report.html").read_text()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{NUM_STEPS:08d}")
    exported = dict(load(tmp_path / "run" / "model").policy.named_parameters())
    assert exported.keys() == checkpoint.tensors["policy"].keys()
    for name, value in checkpoint.tensors["policy"].items():
        assert torch.equal(exported[name], value), name
    words = ["--model", str(tmp_path / "run" / "model"), "--history", "film 1,film 2", "--user", "p3"]
    assert recommend.main(words) == 0
    assert "film" in capsys.readouterr().out


def ranks(num, kind=DistributedType.MULTI_CPU):
    return SimpleNamespace(num_processes=num, distributed_type=kind, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("optim", "kind", "message"),
    [
        (
            {"batch_size": 9, "micro_batch_size": 4},
            DistributedType.MULTI_CPU,
            "optim.micro_batch_size=4: .* one micro-batch on each of 2 ranks: set optim.micro_batch_size=5",
        ),
        ({"average": 0.9}, DistributedType.MULTI_CPU, "optim.average=0.9 .* set optim.average=0"),
        ({"on_nonfinite": "skip"}, DistributedType.MULTI_CPU, "set optim.on_nonfinite=stop"),
        ({}, DistributedType.FSDP, "not with DistributedType.FSDP: start the script with plain torchrun"),
    ],
)
def test_what_backward_updates_forbid_is_refused_before_any_work(tmp_path, optim, kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        sharing(configured(tmp_path, "absent.csv", optim=optim), ranks(2, kind))
    assert "\n" not in str(caught.value)


def test_as_many_samples_as_fit_one_micro_batch_a_rank_are_accepted(tmp_path):
    config = configured(tmp_path, "absent.csv", optim={"batch_size": 9, "micro_batch_size": 5})
    assert sharing(config, ranks(2)) is not None


def test_settings_of_shared_out_tables_are_refused_where_nothing_is_shared_out(tmp_path):
    for num, tables in ((1, "torchrec"), (2, "torch")):
        config = configured(tmp_path, "absent.csv", model={"tables": tables})
        assert sharing(config, ranks(num)) is None
        config = configured(tmp_path, "absent.csv", tables=SGD, model={"tables": tables})
        with pytest.raises(ValueError, match=f"model.tables={tables} and {num} of them: leave it out"):
            sharing(config, ranks(num))
    with pytest.raises(ValueError, match=r"tables\.lr=0\.0 must be positive"):
        TablesConfig(lr=0.0)


def test_a_command_line_sets_the_optimizer_of_tables(tmp_path):
    words = [
        "--data.source=a.csv",
        "--objective.name=sft",
        "--objective.reference=none",
        "--optim.lr=1",
        "--optim.batch_size=1",
        "--optim.micro_batch_size=1",
        f"--run.output_dir={tmp_path}",
    ]
    assert parse(RecsysConfig, [*words, "--model.kind=session"], prog="p", doc="d").tables is None
    found = parse(RecsysConfig, [*words, "--model.kind=session", '--tables={"lr": 0.1}'], prog="p", doc="d")
    assert found.tables == TablesConfig(optimizer="rowwise_adagrad", lr=0.1)
