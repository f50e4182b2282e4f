import json

import pytest
import torch
from safetensors.torch import save_file
from scorer_cases import SOFT

from triptych.training.feature_data import (
    FeatureCollator,
    FeatureConfig,
    read_features,
    split,
    standardised,
    standardised_ratings,
    standardised_sample,
    tensor_rows,
)
from triptych.training.feature_vectors import Standardise
from triptych.training.quarantine import DataError, Quarantine
from triptych.training.scorers import FeatureReward, fit_scorer
from triptych.training.scoring import ScoreLikelihood


def config(**changes):
    return FeatureConfig(**({"source": "x.jsonl"} | changes))


def read(rows, *, users=False, prompts=False, **changes):
    quarantine = Quarantine()
    placed = [(f"x.jsonl:{i + 1}", row) for i, row in enumerate(rows)]
    return read_features(
        placed, config(**changes), quarantine=quarantine, users=users, prompts=prompts
    ), quarantine


def test_pairs_in_rows_and_in_tensors_are_the_same_samples(tmp_path):
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    tensors = {
        "features": vectors,
        "pairs": torch.tensor([[0, 1], [2, 0]]),
        "margin": torch.tensor([0.5, 2.0]),
        "user": torch.tensor([7, 8]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    rows = [
        {"chosen": [1.0, 2.0], "rejected": [3.0, 4.0], "margin": 0.5, "user": 7},
        {"chosen": [5, 6], "rejected": [1, 2], "margin": 2, "user": 8},
    ]
    listed, _ = read(rows, users=True, keep=["margin"])
    packed = read_features(
        tensor_rows(tmp_path / "x.safetensors"), config(keep=["margin"]), quarantine=Quarantine(), users=True
    )
    assert [e.sample for e in packed] == [e.sample for e in listed]
    assert [e.sample.margin for e in packed] == [0.5, 2.0]
    assert [e.user for e in packed] == ["7", "8"]
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(packed, listed, strict=True))
    batch = FeatureCollator({"7": 0, "8": 1})(packed)
    assert batch.inputs.values.tolist() == [[1, 2], [3, 4], [5, 6], [1, 2]]
    assert batch.inputs.users.tolist() == [0, 0, 1, 1]
    assert batch.margin.tolist() == [0.5, 2.0]


def test_ratings_in_rows_and_in_tensors_are_the_same_samples(tmp_path):
    nan = float("nan")
    tensors = {"features": torch.eye(2), "ratings": torch.tensor([[1.0, nan], [2.0, 3.0]])}
    save_file(tensors, tmp_path / "x.safetensors")
    rows = [
        {"features": [1, 0], "ratings": {"a": 1, "b": None}},
        {"features": [0, 1], "ratings": {"b": 3, "a": 2, "other": 9}},
    ]
    listed, _ = read(rows, attributes=["a", "b"])
    chosen = config(attributes=["a", "b"])
    packed = read_features(tensor_rows(tmp_path / "x.safetensors"), chosen, quarantine=Quarantine())
    assert [e.sample for e in packed] == [e.sample for e in listed]
    assert [e.sample.ratings for e in packed] == [(1.0, None), (2.0, 3.0)]
    outputs = standardised_ratings([e.sample for e in packed])
    assert outputs.mean.tolist() == [1.5, 3.0]
    assert standardised_sample(packed[0].sample, outputs).ratings == (-1.0, None)


BAD = [
    ({"chosen": [1.0], "rejected": [1.0, 2.0]}, "has another length"),
    ({"chosen": [1.0, 2.0, 3.0], "rejected": [1.0, 2.0, 4.0]}, "has another length"),
    ({"chosen": "12", "rejected": [1.0, 2.0]}, "is no list of numbers"),
    ({"chosen": [], "rejected": [1.0, 2.0]}, "is no list of numbers"),
    ({"chosen": [True, False], "rejected": [1.0, 2.0]}, "is no list of numbers"),
    ({"chosen": [1.0, float("inf")], "rejected": [1.0, 2.0]}, "has numbers that are not finite"),
    ({"chosen": [1.0, 2.0], "rejected": [1.0, 2.0]}, "has equal candidates"),
    ([1, 2], "is not an object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[f"{r} {i}" for i, (_, r) in enumerate(BAD)])
def test_a_bad_row_is_left_out_with_its_reason(row, reason):
    found, quarantine = read([{"chosen": [1.0, 2.0], "rejected": [2.0, 1.0]}, row])
    assert len(found) == 1
    assert quarantine.counts == {reason: 1}


def test_a_setting_that_every_record_needs_leaves_out_those_without_it():
    rows = [
        {"chosen": [1.0], "rejected": [2.0]},
        {"chosen": [1.0], "rejected": [2.0], "margin": 1.0, "user": "u"},
    ]
    assert len(read(rows)[0]) == 2
    assert read(rows)[0][1].sample.margin is None
    assert len(read(rows, keep=["margin"])[0]) == 1
    found, quarantine = read(rows, users=True)
    assert [e.user for e in found] == ["u"]
    assert quarantine.counts == {"is missing": 1}
    with pytest.raises(DataError, match="holds no usable record"):
        read(rows[:1], users=True)


def test_a_tensor_file_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"features": torch.eye(2)}, path)
    with pytest.raises(DataError, match=r"it holds features; give features \[M, D\] with pairs"):
        list(tensor_rows(path))
    save_file({"features": torch.eye(2), "pairs": torch.tensor([[0, 2]])}, path)
    with pytest.raises(DataError, match="among 2 features"):
        list(tensor_rows(path))
    path.write_text(json.dumps({}))
    with pytest.raises(DataError, match="is no safetensors file"):
        list(tensor_rows(path))


def test_a_pair_and_its_reverse_and_records_of_one_context_are_on_one_side_of_the_split():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 2, 2, generator=generator).tolist()
    rows = [{"chosen": a, "rejected": b} for a, b in table] + [{"chosen": b, "rejected": a} for a, b in table]
    rows += [{"chosen": a, "rejected": b, "context": f"c{i % 9}"} for i, (a, b) in enumerate(table)]
    examples, _ = read(rows)
    data = split(examples, None, fraction=0.3, seed=0)
    assert data.train
    assert data.held_out
    assert not {e.context for e in data.train} & {e.context for e in data.held_out}
    assert all(a.context == b.context for a, b in zip(examples[:60], examples[60:120], strict=True))
    assert 0.15 < len(data.held_out) / len(examples) < 0.45
    again = split(examples, None, fraction=0.3, seed=0)
    assert again.fingerprint == data.fingerprint
    assert split(examples, None, fraction=0.3, seed=1).fingerprint != data.fingerprint
    # Held-out data of their own lose what is trained on.
    apart = split(examples[:60], [*examples[30:60], *examples[120:]], fraction=0.3, seed=0)
    assert len(apart.held_out) == 60


def test_prompts_in_rows_and_in_tensors_are_the_same_samples(tmp_path):
    tensors = {
        "features": torch.tensor([[1.0], [2.0], [3.0]]),
        "pairs": torch.tensor([[0, 1], [2, 0], [1, 2]]),
        "prompts": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
        "prompt": torch.tensor([1, 0, 1]),
        "strength": torch.tensor([1.0, 0.5, 0.75]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    rows = [
        {"chosen": [1], "rejected": [2], "prompt": [7, 8]},
        {"chosen": [3], "rejected": [1], "prompt": [5, 6], "strength": 0.5},
        {"chosen": [2], "rejected": [3], "prompt": [7, 8], "strength": 0.75},
    ]
    kept = config(keep=["strength"])
    listed, _ = read(rows, prompts=True, keep=["strength"])
    packed = read_features(
        tensor_rows(tmp_path / "x.safetensors"), kept, quarantine=Quarantine(), prompts=True
    )
    assert [e.sample for e in packed] == [e.sample for e in listed]
    assert [e.sample.strength for e in packed] == [1.0, 0.5, 0.75]
    assert [e.tied for e in packed] == [False, True, False]
    batch = FeatureCollator()(packed)
    assert batch.inputs.prompts.tolist() == [[7, 8], [7, 8], [5, 6], [5, 6], [7, 8], [7, 8]]
    assert batch.strength.tolist() == [1.0, 0.5, 0.75]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.inputs.prompts, batch.inputs.prompts)
    # Who does not ask for prompts sees none, and the same pair under another prompt is another sample.
    plain, _ = read(rows, keep=["strength"])
    assert FeatureCollator()(plain).inputs.prompts is None
    other, _ = read([rows[0] | {"prompt": [7, 9]}], prompts=True, keep=["strength"])
    assert len({plain[0].sample.id, listed[0].sample.id, other[0].sample.id}) == 3
    assert plain[0].context == listed[0].context == other[0].context


BAD_PROMPTS = [
    ({"prompt": None}, "is missing"),
    ({"prompt": "a red disc"}, "is no list of numbers"),
    ({"prompt": [1.0]}, "has another length"),
    ({"prompt": [1.0, float("nan")]}, "has numbers that are not finite"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_PROMPTS, ids=[r for _, r in BAD_PROMPTS])
def test_a_row_without_usable_features_of_its_prompt_is_left_out_with_its_reason(change, reason):
    good = {"chosen": [1.0], "rejected": [2.0], "prompt": [3.0, 4.0]}
    found, quarantine = read([good, good | change], prompts=True)
    assert len(found) == 1
    assert quarantine.counts == {reason: 1}
    # Nothing is asked of it where prompts are not used.
    assert len(read([good, good | change])[0]) == 2


def test_prompts_of_tensors_must_be_there_for_every_pair(tmp_path):
    path = tmp_path / "x.safetensors"
    base = {"features": torch.eye(2), "pairs": torch.tensor([[0, 1]])}
    save_file(base | {"prompts": torch.eye(2)}, path)
    with pytest.raises(
        DataError, match=r"it holds prompts \(2, 2\); give prompts \[Q, F\] with prompt \[1\]"
    ):
        list(tensor_rows(path))
    save_file(base | {"prompt": torch.tensor([0])}, path)
    with pytest.raises(DataError, match=r"it holds prompt \(1,\); give prompts"):
        list(tensor_rows(path))
    save_file(base | {"prompts": torch.eye(2), "prompt": torch.tensor([2])}, path)
    with pytest.raises(DataError, match="places among 2 prompts"):
        list(tensor_rows(path))


def test_a_tie_is_learnt_from_only_where_strength_is_kept_and_never_as_a_win():
    pair = {"chosen": [1.0], "rejected": [2.0]}
    rows = [pair, pair | {"strength": 0.5}, pair | {"strength": 0.9}, pair | {"strength": 0.2}]
    rows += [pair | {"strength": 1.5}, pair | {"strength": "1"}]
    found, quarantine = read(rows)
    assert [e.sample.strength for e in found] == [None, None]
    assert quarantine.counts == {"is a tie": 1, "is not in [0.5, 1]": 2, "is no number": 1}
    found, quarantine = read(rows, keep=["strength"])
    assert [e.sample.strength for e in found] == [1.0, 0.5, 0.9]
    assert "is a tie" not in quarantine.counts


def test_a_tie_costs_the_cross_entropy_of_both_labels_from_file_to_loss():
    """PickScore's loss by hand: -log sigmoid of 1 and of -1 are 0.313262 and 1.313262."""
    rows = [{"chosen": [1.2], "rejected": [0.2]}, {"chosen": [1.2], "rejected": [0.2], "strength": 0.5}]
    examples, _ = read(rows, keep=["strength"])
    scorer = FeatureReward(Standardise.identity(1))
    with torch.no_grad():
        scorer.network[0].weight.fill_(1.0)
    loss, _ = SOFT({"none": ScoreLikelihood()(scorer, FeatureCollator()(examples))})
    assert loss.tolist() == pytest.approx([0.313262, 0.813262], abs=1e-6)
    # d loss / d weight = (sigmoid(1) - p) times the difference of 1.
    (slope,) = torch.autograd.grad(loss[1], scorer.network[0].weight)
    assert slope.item() == pytest.approx(0.231059, abs=1e-6)
    # A tie pulls scores together: alone, its optimum is a gap of 0.
    fit_scorer(scorer, FeatureCollator()(examples[1:]), SOFT)
    assert scorer.network[0].weight.item() == pytest.approx(0.0, abs=1e-3)


def test_features_are_standardised_over_all_candidates():
    examples, _ = read([{"chosen": [0.0], "rejected": [2.0]}, {"chosen": [4.0], "rejected": [6.0]}])
    found = standardised(examples)
    assert found.mean.item() == 3.0
    assert found.scale.item() == pytest.approx(5**0.5)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"features\.eval_fraction=1"):
        config(eval_fraction=1)
    with pytest.raises(ValueError, match=r"features\.keep is of pairs"):
        config(attributes=["a"], keep=["margin"])
    with pytest.raises(ValueError, match=r"features\.extract=review_features makes pairs"):
        config(attributes=["a"], extract="review_features")
