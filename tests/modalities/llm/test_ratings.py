import pytest

from triptych.modalities.llm.ratings import RatingsConfig, open_rows, read_ratings
from triptych.training.quarantine import DataError, Quarantine

ASPECTS = ["helpfulness", "honesty"]


def read(*rows, **changes):
    quarantine = Quarantine()
    config = RatingsConfig(source="x.jsonl", attributes=ASPECTS, **changes)
    found = read_ratings([(f"x.jsonl:{i + 1}", r) for i, r in enumerate(rows)], config, quarantine=quarantine)
    return found, quarantine


def test_ratings_are_read_from_a_mapping_from_columns_and_from_ultrafeedback():
    note = {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}}
    found, quarantine = read(
        {"prompt": "a?", "completion": "b", "ratings": {"helpfulness": 3, "honesty": None}},
        {"prompt": "c?", "response": "d", "helpfulness": 1.5, "honesty": 2},
        {
            "instruction": "e?",
            "completions": [{"response": "f", "annotations": note}, {"response": "g", "annotations": note}],
        },
    )
    assert [r.ratings for r in found] == [(3.0, None), (1.5, 2.0), (4.0, None), (4.0, None)]
    assert [r.record.candidates for r in found] == [("b",), ("d",), ("f",), ("g",)]
    assert [r.record.source for r in found] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3#0", "x.jsonl:3#1"]
    assert not quarantine.total


def test_rows_without_a_usable_rating_are_left_out_with_a_reason():
    good = {"prompt": "a?", "completion": "b", "helpfulness": 1}
    bad = [
        {"prompt": "a?", "completion": "b"},
        good | {"honesty": "high"},
        good | {"honesty": float("nan")},
        good | {"honesty": True},
        {"prompt": "a?", "helpfulness": 1},
        "text",
        DataError("is not valid JSON", source="x"),
    ]
    found, quarantine = read(good, *bad)
    assert len(found) == 1
    assert quarantine.total == len(bad)
    assert quarantine.counts["is no number"] == 3
    assert quarantine.counts["are all missing"] == 1
    with pytest.raises(DataError, match="field 'ratings' are all missing"):
        read(bad[0], strict=True)
    with pytest.raises(DataError, match="holds no usable record"):
        read(*bad)


def test_a_limit_stops_reading_and_settings_that_mean_nothing_are_refused():
    rows = [{"prompt": f"{i}?", "completion": "b", "helpfulness": i} for i in range(5)]
    assert len(read(*rows, max_examples=2)[0]) == 2
    for changes in ({"max_examples": 0}, {"eval_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            read(*rows, **changes)
    with pytest.raises(ValueError, match="all different"):
        RatingsConfig(source="x", attributes=["a", "a"])


def test_sources_are_confined_to_the_data_root(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name in ("../x.safetensors", "../x.jsonl"):
        with pytest.raises(DataError, match="lies outside the data root"):
            list(open_rows(name, data_root=str(tmp_path / "inside")))
    with pytest.raises(DataError, match="does not exist"):
        list(open_rows("y.safetensors", data_root=str(tmp_path)))
    with pytest.raises(DataError, match="is no safetensors file"):
        list(open_rows("x.safetensors", data_root=str(tmp_path)))
