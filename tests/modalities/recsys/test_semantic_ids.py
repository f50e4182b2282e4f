import json

import pytest
import torch

from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.training.quarantine import DataError


def ids(rows, sizes=(4, 4)):
    return SemanticIds(
        codes_IL=torch.tensor(rows), sizes=sizes, items=tuple(f"i{n}" for n in range(len(rows)))
    )


SHARED_IDS = [[0, 1], [0, 1], [2, 3], [0, 1], [2, 3], [1, 1]]


def test_groups_are_a_partition_of_the_items():
    group, count = ids(SHARED_IDS).groups()
    assert count.tolist() == [3, 1, 2]
    assert group.tolist() == [0, 0, 2, 0, 2, 1]
    assert ids(SHARED_IDS).num_colliding == 5


def test_a_suffix_counts_the_items_of_an_id_the_first_first():
    found = ids(SHARED_IDS).without_collisions("suffix", order=torch.tensor([3, 0, 1, 4, 2, 5]))
    assert found.codes_IL[:, 2].tolist() == [1, 2, 1, 0, 0, 0]
    assert found.sizes == (4, 4, 3)
    assert found.num_colliding == 0


def test_reassignment_takes_the_next_free_code_of_the_last_level():
    found = ids(SHARED_IDS).without_collisions("reassign")
    assert found.codes_IL.tolist() == [[0, 1], [0, 2], [2, 3], [0, 3], [2, 0], [1, 1]]
    with pytest.raises(ValueError, match=r"3 items share the first codes \[0\] and the last level has 2"):
        ids([[0, 0], [0, 1], [0, 1]], (1, 2)).without_collisions("reassign")


def test_keeping_collisions_changes_nothing():
    assert ids(SHARED_IDS).without_collisions("keep").codes_IL.tolist() == SHARED_IDS


def test_what_is_written_is_read_again_in_the_order_asked_for(tmp_path):
    path = tmp_path / "index.json"
    ids(SHARED_IDS).write(path)
    assert json.loads(path.read_text())["i2"] == ["<a_2>", "<b_3>"]
    assert SemanticIds.read(path, ["i2", "i0"]).codes_IL.tolist() == [[2, 3], [0, 1]]
    # Sizes are those of the whole file, so that part of it fits the same model.
    assert SemanticIds.read(path, ["i0"]).sizes == (3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not {item"),
        ('{"x": ["<a_1>", "<c_2>"]}', r"index.json\[x\]: is not a semantic id"),
        ('{"x": ["a"]}', "is not a semantic id"),
        ('{"x": [NaN]}', "is not a semantic id"),
        ('{"x": []}', "is not a semantic id"),
        ('{"x": ["<a_1>"], "y": ["<a_1>", "<b_1>"]}', r"index.json\[y\]: has ids of 1 levels and others"),
    ],
)
def test_files_that_are_no_ids_are_named_with_the_item(tmp_path, content, message):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        SemanticIds.read(path)


def test_items_without_an_id_are_counted_and_one_is_named(tmp_path):
    path = tmp_path / "index.json"
    ids(SHARED_IDS).write(path)
    with pytest.raises(DataError, match="lacks ids; 2 items have none, such as nobody"):
        SemanticIds.read(path, ["i0", "nobody", "nothing"])


def test_codes_outside_their_codebook_are_refused():
    with pytest.raises(ValueError, match="below the sizes"):
        ids([[0, 4]])
