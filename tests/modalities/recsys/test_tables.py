"""Tables of embeddings in plain torch, worked by hand."""

import pytest
import torch

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.tables import ItemTable, TableSpec, TorchTables, one_row, summed

SPECS = (TableSpec("item", 4), TableSpec("genre", 3))


def counted():
    """Tables of width 2 whose rows are [0, 1], [2, 3], ..., and 100 more for genres."""
    tables = TorchTables(SPECS, 2)
    with torch.no_grad():
        tables.embeddings["item"].weight.copy_(torch.arange(8.0).view(4, 2))
        tables.embeddings["genre"].weight.copy_(100 + torch.arange(6.0).view(3, 2))
    return tables


def rows(*lists):
    return Jagged.of([torch.tensor(row, dtype=torch.int64) for row in lists])


def test_features_are_looked_up_in_the_order_of_their_values():
    found = counted()({"item": rows([3, 0], [], [3]), "genre": rows([2])})
    assert found["item"].tolist() == [[6, 7], [0, 1], [6, 7]]
    assert found["genre"].tolist() == [[104, 105]]
    assert list(counted()({"genre": rows([0])})) == ["genre"]


def test_the_state_dict_names_the_tables_and_weights_are_small():
    torch.manual_seed(0)
    tables = TorchTables((TableSpec("item", 2000),), 8)
    assert list(tables.state_dict()) == ["embeddings.item.weight"]
    assert tables.width == 8
    weight = tables.state_dict()["embeddings.item.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_values_of_a_row_are_summed_and_an_empty_row_is_zero():
    tables, genres = counted(), rows([2, 0], [], [1], [])
    sums = summed(tables({"genre": genres})["genre"], genres)
    assert sums.tolist() == [[204, 206], [0, 0], [102, 103], [0, 0]]
    (sums * torch.tensor([[1.0], [10.0], [5.0], [10.0]])).sum().backward()
    assert tables.embeddings["genre"].weight.grad.tolist() == [[1, 1], [5, 5], [1, 1]]


def test_a_value_looked_up_twice_gets_both_gradients():
    tables = counted()
    weights = torch.tensor([[1.0], [2.0], [4.0]])
    (tables({"item": rows([1, 3], [1])})["item"] * weights).sum().backward()
    assert tables.embeddings["item"].weight.grad.tolist() == [[0, 0], [5, 5], [0, 0], [2, 2]]


def test_tables_serve_as_a_models_item_table():
    table = ItemTable(counted())
    assert table(torch.tensor([2, 1])).tolist() == [[4, 5], [2, 3]]
    assert table(torch.tensor([], dtype=torch.int64)).shape == (0, 2)
    assert "tables.embeddings.item.weight" in table.state_dict()
    assert ItemTable(counted(), feature="genre")(torch.tensor([0])).tolist() == [[100, 101]]


def test_one_row_holds_all_values():
    flat = one_row(torch.tensor([5, 6]))
    assert (flat.values.tolist(), flat.offsets.tolist(), flat.longest) == ([5, 6], [0, 2], 2)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="no table for the feature author; there are item, genre"):
        counted()({"item": rows([1]), "author": rows([1])})
    with pytest.raises(ValueError, match="table item is given twice"):
        TorchTables((*SPECS, TableSpec("item", 2)), 2)
    with pytest.raises(ValueError, match="at least one table"):
        TorchTables((), 2)
    with pytest.raises(ValueError, match="table item: num_rows=0"):
        TableSpec("item", 0)
    with pytest.raises(ValueError, match=r"'a\.b' must be a word without dots"):
        TableSpec("a.b", 1)
