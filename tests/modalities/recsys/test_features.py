import pytest
import torch
from tiny_sessions import SIZES, codes

from triptych.modalities.recsys.features import EntityVectors, Feature, Sides, picked
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ModelConfig, Sessions
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.setup import make_policy
from triptych.modalities.recsys.tables import TorchTables

GENRES = Feature.of([["drama", "war"], [], ["comedy"]])


def test_values_are_numbered_in_order_and_come_back_as_names():
    assert GENRES.values == ("comedy", "drama", "war")
    assert GENRES.ids_NP.tolist() == [[1, 2], [-1, -1], [0, -1]]
    assert GENRES.rows == [["drama", "war"], [], ["comedy"]]
    assert Feature.of([[], []]).ids_NP.tolist() == [[-1], [-1]]


def test_an_items_vector_is_its_own_and_those_of_its_values_and_nothing_for_somebody_unknown():
    vectors = EntityVectors(TorchTables, 2, own="item", num=3, features={"genre": GENRES})
    with torch.no_grad():
        vectors.tables.embeddings["item"].weight.copy_(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        vectors.tables.embeddings["genre"].weight.copy_(torch.tensor([[0, 10.0], [0, 20], [0, 40]]))
    found = vectors(torch.tensor([0, 2, 1, -1]))
    assert found.tolist() == [[1, 60], [3, 10], [2, 0], [0, 0]]
    found.sum().backward()
    # A place without a value is looked up as the first one, which gets no gradient from it.
    assert vectors.tables.embeddings["genre"].weight.grad[:, 0].tolist() == [1, 1, 1]
    assert vectors.tables.embeddings["item"].weight.grad[:, 0].tolist() == [1, 1, 1]


def sides(num_items):
    return Sides(
        num_items=num_items,
        num_users=4,
        item_features={"genre": Feature.of([["a", "b"][: i % 3] for i in range(num_items)])},
        user_features={"age": Feature.of([["old"], ["young"], [], ["old"]])},
    )


def policy(**options):
    ids = SemanticIds(codes_IL=codes(), sizes=SIZES, items=tuple(map(str, range(len(codes())))))
    config = ModelConfig(
        **{"context": "causal", "width": 16, "heads": 2, "dropout": 0.0, "kernel": "reference"} | options
    )
    torch.manual_seed(0)
    return make_policy(config, ids, sides(len(codes()))).eval()


def logps(model, owners):
    history = Jagged.of([torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])], torch.tensor(owners))
    sessions = Sessions(
        items=torch.tensor([[4], [4]]), user=torch.tensor([0, 1]), seen=torch.tensor([3, 3]), most=1
    )
    return model(history, sessions).sum(-1)


def test_the_same_history_of_another_user_has_other_log_probs_where_users_are_looked_up():
    plain, personal = policy(), policy(user_vectors=True, user_features=["age"])
    with torch.no_grad():
        for table in personal.tokens.user_table.tables.embeddings.values():
            table.weight.mul_(50)
    a, b = logps(plain, [0, 1])
    assert a == b
    a, b = logps(personal, [0, 1])
    assert abs(a - b) > 1e-3
    first, second = logps(personal, [0, 0]), logps(personal, [-1, -1])
    assert first[0] == first[1] == a
    assert second[0] == second[1]
    assert abs(first[0] - second[0]) > 1e-3


def test_features_of_items_change_what_a_history_says():
    model = policy(item_vectors=True, item_features=["genre"])
    before = logps(model, [0, 0])
    with torch.no_grad():
        model.tokens.item_table.tables.embeddings["genre"].weight.add_(1.0)
    assert (logps(model, [0, 0]) - before).abs().min() > 1e-4


def test_a_feature_that_the_data_lack_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"model\.item_features: .* no feature 'colour'; they have genre"):
        policy(item_features=["colour"])
    with pytest.raises(ValueError, match="they have none"):
        picked({}, ["x"], "model.user_features")
