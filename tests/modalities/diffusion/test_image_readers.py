"""Reading image preferences in every layout: what comes out, what is left out and what is said about it."""

import contextlib
import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import (
    Errors,
    jpeg,
    pick,
    write_images,
    write_json,
    write_lines,
    write_pickapic,
    write_tar,
)

from triptych.modalities.diffusion import json_rows, readers_pickapic, readers_webdataset
from triptych.modalities.diffusion.layouts import PARSERS, detect_layout, parse_row
from triptych.modalities.diffusion.readers import LAYOUTS, read_records
from triptych.modalities.diffusion.records import ImageRecord, ImageSource
from triptych.training.quarantine import DataError, Quarantine

NAMES = ("img/a.jpg", "img/b.jpg", "img/c.jpg", "img/d.jpg")
PAIR = {"prompt": "a cat", "chosen": "img/a.jpg", "rejected": "img/b.jpg"}


def read(path, **options):
    errors, lines = Errors(), []
    records = []
    try:
        records.extend(read_records(path, quarantine=errors, report=lines.append, **options))
    except DataError as error:
        if error.reason != "holds no usable record":
            raise
    return records, errors, lines


def images(record):
    return [image.name.split("/")[-1] for image in record.images]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, NAMES)
    return tmp_path


# ---- Pick-a-Pic


def test_pickapic_pairs_have_the_chosen_image_first_and_the_person_as_group(tmp_path):
    path = write_pickapic(tmp_path / "train-00000.parquet", [pick(0, 1.0), pick(1, 0.0), pick(2, 1.0)])
    records, errors, lines = read(path)
    assert errors.told() == []
    assert [r.prompt for r in records] == ["a picture of 0", "a picture of 1", "a picture of 2"]
    assert [r.group for r in records] == ["0", "1", "0"]
    assert [r.source for r in records] == [f"train-00000.parquet[{i}]" for i in range(3)]
    assert all((r.kind, r.strength) == ("pair", None) for r in records)
    expected = [(jpeg(0), jpeg(1)), (jpeg(3), jpeg(2)), (jpeg(4), jpeg(5))]
    assert [tuple(image.read() for image in r.images) for r in records] == expected
    assert [image.column for image in records[1].images] == ["jpg_1", "jpg_0"]
    assert lines == ["train-00000.parquet: layout pickapic (detected), 1 file, ties: drop"]


def test_pickapic_ties_are_dropped_with_a_count_or_kept_with_strength_one_half(tmp_path):
    path = write_pickapic(tmp_path / "a.parquet", [pick(0), pick(1, 0.5), pick(2, 0.5)])
    records, errors, _ = read(path)
    assert len(records) == 1
    assert errors.counts == {"is a tie": 2}
    assert errors.errors[0].source == "a.parquet[1]"
    records, errors, lines = read(path, ties="half")
    assert [r.strength for r in records] == [None, 0.5, 0.5]
    assert errors.total == 0
    assert lines[0].endswith("ties: half")


BAD_PICKS = {
    "no label": ({"has_label": False}, "has_label", "has no label"),
    "null label": ({"label_0": None}, "label_0", "is null"),
    "strange label": ({"label_0": 0.7, "label_1": 0.3}, "label_0", "is no preference"),
    "both preferred": ({"label_1": 1.0}, "label_0", "is no preference"),
    "NaN label": ({"label_1": float("nan")}, "label_1", "is not finite"),
    "no image": ({"jpg_1": None}, "jpg_1", "is null"),
    "empty caption": ({"caption": " "}, "caption", "is empty"),
    "null caption": ({"caption": None}, "caption", "is null"),
    "NUL in the caption": ({"caption": "a\0b"}, "caption", "holds a NUL character"),
    "the same image": ({"jpg_1": jpeg(2)}, "jpg_1", "is the same as another image of its record"),
}


@pytest.mark.parametrize("kind", BAD_PICKS)
def test_a_bad_row_of_pickapic_is_left_out_and_the_others_kept(tmp_path, kind):
    changes, column, reason = BAD_PICKS[kind]
    path = write_pickapic(tmp_path / "a.parquet", [pick(0), pick(1) | changes, pick(2)])
    records, errors, _ = read(path)
    assert [r.prompt for r in records] == ["a picture of 0", "a picture of 2"]
    assert errors.told() == [("a.parquet[1]", column, reason)]
    assert errors.errors[0].remedy


def test_pickapic_captions_that_are_no_utf8_cost_one_row(tmp_path):
    table = pa.Table.from_pylist([pick(0), pick(1), pick(2)])
    captions = pa.array([b"one", b"tw\xff", b"three"], pa.binary()).cast(pa.string(), safe=False)
    table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
    pq.write_table(table, tmp_path / "a.parquet")
    records, errors, _ = read(tmp_path / "a.parquet")
    assert [r.prompt for r in records] == ["one", "three"]
    assert errors.told() == [("a.parquet[1]", "", "is not valid UTF-8")]


def test_pickapic_without_the_optional_columns_and_with_images_as_structs(tmp_path):
    def packed(i):
        row = pick(i)
        for name in ("has_label", "user_id"):
            del row[name]
        return row | {c: {"bytes": row[c], "path": "/etc/passwd"} for c in ("jpg_0", "jpg_1")}

    write_pickapic(tmp_path / "a.parquet", [packed(0), packed(1)])
    records, errors, _ = read(tmp_path / "a.parquet")
    assert errors.total == 0
    assert records[1].images[0].read() == jpeg(2)
    assert records[0].group is None


def test_urls_are_never_read_or_fetched(tmp_path, monkeypatch):
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        asked.extend(options["columns"])
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.3)
        visits = []

        def listen():
            try:
                visits.append(server.accept())
            except TimeoutError:
                return

        thread = threading.Thread(target=listen)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.jpg"
        write_pickapic(tmp_path / "a.parquet", [pick(0, image_0_url=url, image_1_url=url)])
        assert len(read(tmp_path / "a.parquet")[0]) == 1
        write_lines(tmp_path / "metadata.jsonl", [PAIR | {"chosen": url + ".jpg", "rejected": url}])
        assert read(tmp_path / "metadata.jsonl", layout="folder")[1].counts == {"is a URL": 1}
        thread.join()
    assert visits == []
    assert set(asked) == {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "user_id"}


def test_a_folder_gives_the_files_of_one_split_in_order(tmp_path):
    for number, name in enumerate(
        ["train-00001", "train-00000", "validation-00000", "validation_unique-00000", "test_unique-00000"]
    ):
        write_pickapic(tmp_path / "data" / f"{name}-of-00002.parquet", [pick(number)])
    write_json(tmp_path / "dataset_infos.json", {"a": 1})
    assert [r.prompt[-1] for r in read(tmp_path)[0]] == ["1", "0"]
    assert [r.prompt[-1] for r in read(tmp_path, split="validation")[0]] == ["2"]
    assert [r.prompt[-1] for r in read(tmp_path, split="validation_unique")[0]] == ["3"]
    with pytest.raises(DataError, match="has no file for split 'dev'; it holds test_unique-00000"):
        read(tmp_path, split="dev")


def test_a_pattern_gives_the_files_it_matches(tmp_path):
    for number, name in enumerate(["train-0", "train-1", "other-0"]):
        write_pickapic(tmp_path / name / "part.parquet", [pick(number)])
    records, _, lines = read(tmp_path / "train-*" / "*.parquet")
    assert [r.source for r in records] == ["train-0/part.parquet[0]", "train-1/part.parquet[0]"]
    assert "2 files" in lines[0]
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "nothing-*.parquet")


def test_a_damaged_parquet_file_costs_itself_only(tmp_path):
    good = write_pickapic(tmp_path / "a-0.parquet", [pick(0)]).read_bytes()
    (tmp_path / "a-1.parquet").write_bytes(good[: len(good) // 2])
    write_pickapic(tmp_path / "a-2.parquet", [pick(2)])
    records, errors, _ = read(tmp_path)
    assert [r.prompt[-1] for r in records] == ["0", "2"]
    assert errors.told() == [("a-1.parquet", "", "is damaged or cut off")]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path):
    path = write_pickapic(tmp_path / "a.parquet", [pick(i) for i in range(6)], row_group_size=2)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    names = pq.ParquetFile(path).schema_arrow.names
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(names.index("jpg_0"))
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    records, errors, _ = read(path)
    assert [r.prompt[-1] for r in records] == ["0", "1", "4", "5"]
    assert errors.told() == [("a.parquet[2]", "", "is damaged or cut off")]


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_pickapic, "_MAX_ROW_GROUP_BYTES", 20_000)
    rows = [pick(0), pick(1, caption="x" * 20_000), pick(2)]
    path = write_pickapic(tmp_path / "a.parquet", rows, row_group_size=1)
    records, errors, _ = read(path)
    assert [r.prompt[-1] for r in records] == ["0", "2"]
    assert errors.told() == [("a.parquet[1]", "", "unpacks to too much")]


def test_a_parquet_file_of_texts_is_refused_at_once(tmp_path):
    write_pickapic(tmp_path / "a.parquet", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"a.parquet: field 'caption' is missing; found prompt, chosen, rej"):
        read_records(tmp_path, quarantine=Quarantine())


STREAM = """
import sys
from triptych.modalities.diffusion.readers import read_records
from triptych.training.quarantine import Quarantine
# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
records = read_records(sys.argv[1], quarantine=Quarantine())
total = sum(len(image.read()) for image in next(records).images)
before, n = peak(), 1
for record in records:
    total += sum(len(image.read()) for image in record.images)
    n += 1
print(n, total, peak() - before)
"""


def streamed(path):
    """Records, bytes of their images, and what reading them added to the peak after the first."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak memory of a process is read from /proc")
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return tuple(int(word) for word in done.stdout.split())


def test_memory_does_not_grow_with_the_rows_of_a_parquet_file(tmp_path):
    """100 MB in 100 row groups of 1 MB."""
    path = tmp_path / "big.parquet"
    kept = (*readers_pickapic.COLUMNS, "has_label", "user_id")
    schema = pa.Table.from_pylist([{c: pick(0)[c] for c in kept}]).schema
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for group in range(100):
            rows = [pick(0, jpg_0=os.urandom(25_000), jpg_1=os.urandom(25_000)) for _ in range(20)]
            rows = [{c: row[c] for c in kept} | {"caption": f"group {group}"} for row in rows]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    num_records, num_bytes, added = streamed(path)
    assert (num_records, num_bytes) == (2000, 100_000_000)
    assert added < 20_000_000


def test_memory_does_not_grow_with_the_members_of_a_tar(tmp_path):
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(4000):
            for name, data in (
                ("txt", b"a prompt"),
                ("chosen.jpg", os.urandom(5_000)),
                ("rejected.jpg", os.urandom(5_000)),
            ):
                info = tarfile.TarInfo(f"{i:06}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    num_records, num_bytes, added = streamed(path)
    assert (num_records, num_bytes) == (4000, 40_000_000)
    assert added < 5_000_000


# ---- JSON layouts


def test_hpdv2_train_is_read_as_pairs_below_its_split_folder(tmp_path):
    write_images(tmp_path / "train", ["1.jpg", "2.jpg", "3.jpg"])
    rows = [
        {"human_preference": [1, 0], "prompt": "a", "image_path": ["1.jpg", "2.jpg"], "user_hash": "u"},
        {"human_preference": [0, 1], "prompt": "b", "file_path": ["1.jpg", "3.jpg"], "user_hash": "v"},
        {"human_preference": [1, 1], "prompt": "c", "image_path": ["1.jpg", "3.jpg"], "user_hash": "v"},
    ]
    write_json(tmp_path / "train.json", rows)
    write_json(tmp_path / "test.json", [])
    records, errors, lines = read(tmp_path)
    assert [(images(r), r.group, r.strength) for r in records] == [
        (["1.jpg", "2.jpg"], "u", None),
        (["3.jpg", "1.jpg"], "v", None),
    ]
    assert errors.told() == [("train.json:26", "", "is a tie")]
    assert f"layout hpdv2 (detected), 1 file, images below {tmp_path / 'train'}" in lines[0]
    assert [r.strength for r in read(tmp_path, ties="half")[0]] == [None, None, 0.5]


def test_a_folder_named_as_the_file_holds_the_images_of_hpdv2_only(folder):
    write_images(folder / "train", ["img/a.jpg"])
    write_json(folder / "train.json", [{"prompt": "a", "path1": "img/a.jpg", "path2": "img/b.jpg"}])
    records, errors, _ = read(folder)
    assert errors.total == 0
    assert records[0].images[0].path == (folder / "img/a.jpg").resolve()


def test_hpdv2_test_is_read_as_lists_with_one_for_the_best_rank(tmp_path):
    write_images(tmp_path / "elsewhere", ["1.jpg", "2.jpg", "3.jpg"])
    row = {"prompt": "a", "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [2, 3, 1]}
    row["raw_annotations"] = [{"rank": [2, 3, 1], "user_hash": "u"}]
    write_json(tmp_path / "test.json", [row])
    records, errors, _ = read(tmp_path, split="test", image_root=tmp_path / "elsewhere")
    assert errors.total == 0
    assert (records[0].kind, images(records[0])) == ("list", ["1.jpg", "2.jpg", "3.jpg"])
    assert records[0].relevance == (0.5, 0.0, 1.0)


def test_hpdv3_pairs_take_their_strength_from_the_votes_or_the_confidence(folder):
    base = {"prompt": "a", "path1": "img/b.jpg", "path2": "img/a.jpg", "model1": "x", "model2": "y"}
    rows = [
        base | {"confidence": 0.97, "choice_dist": [12, 4]},
        base | {"confidence": 0.97, "choice_dist": None},
        base,
        base | {"choice_dist": [5, 15]},
        base | {"choice_dist": [3, 3]},
        base | {"choice_dist": [0, 0]},
        base | {"confidence": 1.2},
    ]
    records, errors, lines = read(write_json(folder / "train.json", rows))
    assert [r.strength for r in records] == [0.75, 0.97, None, 0.75]
    assert {tuple(images(r)) for r in records} == {("b.jpg", "a.jpg")}
    assert [(e.field, e.reason) for e in errors.errors] == [
        ("", "is a tie"),
        ("choice_dist", "is no count of votes"),
        ("confidence", "is no probability"),
    ]
    assert "layout hpdv3 (detected)" in lines[0]


def test_imagereward_rankings_become_lists_and_keep_their_ties(folder):
    rows = [
        {"id": "1-0", "prompt": "a", "generations": list(NAMES), "ranking": [1, 3, 3, 5]},
        {"id": "1-1", "prompt": "a", "generations": list(NAMES[:2]), "ranking": [5, 2]},
        {"id": "1-2", "prompt": "a", "generations": list(NAMES[:2]), "ranking": [1, 1]},
        {"id": "1-3", "prompt": "a", "generations": list(NAMES[:2]), "ranking": [1, 2, 3]},
    ]
    records, errors, lines = read(write_json(folder / "train.json", rows))
    assert records[0].relevance == pytest.approx((1.0, 1 / 3, 1 / 3, 0.0))
    assert (records[1].kind, images(records[1])) == ("pair", ["b.jpg", "a.jpg"])
    assert [e.reason for e in errors.errors] == ["is a tie", "has another length than the images"]
    assert "layout imagereward (detected)" in lines[0]
    kept = read(folder / "train.json", ties="half")[0]
    assert [r.is_tie for r in kept] == [False, False, True]


def test_metadata_folders_hold_pairs_lists_and_single_images(folder):
    listed = {"prompt": "a", "images": list(NAMES[:3])}
    rows = [
        PAIR | {"strength": 0.9, "margin": 1.5, "user_id": 7},
        listed | {"relevance": [3, 0, 1.5]},
        listed | {"ranking": [2, 1, 3]},
        listed | {"scores": [20.0, 30.0, 25.0]},
        listed | {"votes": [[3, 2, 1], [1, 3, 2]]},
        listed | {"votes": {"pickscore": [21.0, 20.0, 19.0], "hps": [0.1, 0.3, 0.2]}},
        {"prompt": "a", "image": "img/a.jpg"},
        {"caption": "a", "image": "img/a.jpg", "desirable": False},
        {"text": "a", "file_name": "img/a.jpg", "desirable": 1},
    ]
    write_lines(folder / "metadata.jsonl", rows)
    records, errors, lines = read(folder)
    assert errors.told() == []
    assert [r.relevance for r in records] == [
        (1, 0),
        (3, 0, 1.5),
        (0.5, 1, 0),
        (0, 1, 0.5),
        (0.5, 0.75, 0.25),
        (0.5, 0.75, 0.25),
        (1,),
        (0,),
        (1,),
    ]
    assert (records[0].strength, records[0].margin, records[0].group) == (0.9, 1.5, "7")
    assert records[0].source == "metadata.jsonl:1"
    assert "layout folder (detected)" in lines[0]


def test_a_folder_of_splits_gives_the_metadata_of_the_one_asked_for(tmp_path):
    for split, name in (("train", "a.jpg"), ("test", "b.jpg")):
        write_images(tmp_path / split, [name])
        write_lines(tmp_path / split / "metadata.jsonl", [{"prompt": split, "image": name}])
    assert [r.prompt for r in read(tmp_path)[0]] == ["train"]
    assert [r.prompt for r in read(tmp_path, split="test")[0]] == ["test"]


OUTSIDE = {
    "parent": ("../outside.jpg", "leaves the data's folder"),
    "hidden parent": ("img/../../outside.jpg", "leaves the data's folder"),
    "parent the other way": ("img\\..\\..\\outside.jpg", "leaves the data's folder"),
    "absolute": ("/etc/passwd", "is an absolute path"),
    "drive": ("C:\\secret.jpg", "is an absolute path"),
    "network": ("\\\\server\\share.jpg", "is an absolute path"),
    "http": ("http://127.0.0.1/a.jpg", "is a URL"),
    "file URL": ("file:///etc/passwd", "is a URL"),
    "data URL": ("data:image/png;base64,AAAA", "is a URL"),
    "hub": ("hf://datasets/a/b.jpg", "is a URL"),
    "link": ("out.jpg", "links out of the data's folder"),
    "linked folder": ("outfolder/outside.jpg", "links out of the data's folder"),
    "loop": ("loop.jpg", "is no path"),
    "missing": ("img/none.jpg", "does not exist"),
    "folder": ("img", "is not a regular file"),
    "pipe": ("pipe.jpg", "is not a regular file"),
    "NUL": ("img/a\0.jpg", "is no path"),
    "blank": (" ", "is no path"),
    "long": ("a" * 5000, "is no path"),
    "surrogate": ("\ud83d.jpg", "is no path"),
    "number": (7, "has the wrong type"),
    "null": (None, "is null"),
}


@pytest.mark.parametrize("column", ["chosen", "images[1]", "path2"])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_paths_that_name_no_file_of_the_data_are_refused(tmp_path, kind, column):
    root = tmp_path / "data"
    write_images(root, NAMES)
    (tmp_path / "outside.jpg").write_bytes(jpeg(9))
    (root / "out.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "outfolder").symlink_to(tmp_path)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "inside.jpg").symlink_to(root / "img/a.jpg")
    os.mkfifo(root / "pipe.jpg")
    value, reason = OUTSIDE[kind]
    rows = {
        "chosen": PAIR | {"chosen": value},
        "images[1]": {"prompt": "a", "images": ["img/a.jpg", value], "scores": [1, 2]},
        "path2": {"prompt": "a", "path1": "img/a.jpg", "path2": value},
    }
    good = PAIR | {"chosen": "inside.jpg"} if column != "path2" else rows["path2"] | {"path2": "inside.jpg"}
    if column == "path2":
        good["path1"] = "img/b.jpg"
    path = write_lines(root / "metadata.jsonl", [good, rows[column], good])
    records, errors, _ = read(path)
    assert len(records) == 2
    reason = "has the wrong type" if (kind, column) == ("null", "images[1]") else reason
    assert errors.told() == [("metadata.jsonl:2", column, reason)]


LISTED = {"prompt": "a", "images": list(NAMES[:3])}
BAD_ROWS = {
    "no prompt": ({"chosen": "img/a.jpg", "rejected": "img/b.jpg"}, "prompt", "is missing"),
    "empty prompt": (PAIR | {"prompt": ""}, "prompt", "is empty"),
    "surrogate": (PAIR | {"prompt": "a\ud83d"}, "prompt", "holds a lone surrogate"),
    "messages": (PAIR | {"prompt": [{"role": "user"}]}, "prompt", "has the wrong type"),
    "one side": ({"prompt": "a", "chosen": "img/a.jpg"}, "rejected", "is missing"),
    "same file": (PAIR | {"rejected": "img/a.jpg"}, "rejected", "is the same as another image of its record"),
    "strength": (PAIR | {"strength": 2}, "strength", "is no probability"),
    "margin": (PAIR | {"margin": float("inf")}, "margin", "is not finite"),
    "huge margin": (PAIR | {"margin": 10**400}, "margin", "is not finite"),
    "margin text": (PAIR | {"margin": "1"}, "margin", "has the wrong type"),
    "no grades": (LISTED, "images", "has no grades"),
    "two grades": (
        LISTED | {"ranking": [1, 2, 3], "scores": [1, 2, 3]},
        "images",
        "has several kinds of grades",
    ),
    "few grades": (LISTED | {"ranking": [1, 2]}, "ranking", "has another length than the images"),
    "grade text": (LISTED | {"scores": [1, "2", 3]}, "scores", "has the wrong type"),
    "grade true": (LISTED | {"relevance": [1, True, 3]}, "relevance", "has the wrong type"),
    "no scorer": (LISTED | {"votes": []}, "votes", "has the wrong type"),
    "vote is a number": (LISTED | {"votes": 3}, "votes", "has the wrong type"),
    "all equal": (LISTED | {"scores": [2, 2, 2]}, "", "is a tie"),
    "one image": ({"prompt": "a", "images": ["img/a.jpg"], "relevance": [1]}, "images", "has too few images"),
    "many images": (
        {"prompt": "a", "images": ["img/a.jpg"] * 65, "scores": list(range(65))},
        "images",
        "has too many images",
    ),
    "repeated image": (
        {"prompt": "a", "images": ["img/a.jpg", "img/b.jpg", "img/a.jpg"], "scores": [1, 2, 3]},
        "images[2]",
        "is the same as another image of its record",
    ),
    "images is a text": ({"prompt": "a", "images": "img/a.jpg"}, "images", "has the wrong type"),
    "desirable": (
        {"prompt": "a", "image": "img/a.jpg", "desirable": "yes"},
        "desirable",
        "has the wrong type",
    ),
    "not an object": ([1], "", "is not an object"),
    "not JSON": (b'{"prompt": "a",', "", "is not valid JSON"),
    "too deep": (b"[" * 100_000, "", "is not valid JSON"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', "", "is not valid UTF-8"),
    "long": (PAIR | {"prompt": "x" * 1_000_001}, "", "is longer than the limit"),
    "huge number": (b'{"prompt": "a", "margin": ' + b"9" * 5000 + b"}", "", "is not valid JSON"),
}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_of_a_folder_is_left_out_with_its_line_and_the_others_kept(folder, kind, position):
    row, column, reason = BAD_ROWS[kind]
    rows = [PAIR, PAIR | {"prompt": "a dog"}]
    rows.insert(position, row)
    write_lines(folder / "metadata.jsonl", rows)
    records, errors, _ = read(folder)
    assert [r.prompt for r in records] == ["a cat", "a dog"]
    assert errors.told() == [(f"metadata.jsonl:{position + 1}", column, reason)]


def test_the_quarantine_may_stop_at_the_first_bad_record_and_writes_where_it_is(folder):
    write_lines(folder / "metadata.jsonl", [PAIR, PAIR | {"chosen": "none.jpg"}])
    with pytest.raises(DataError, match=r"metadata.jsonl:2: field 'chosen' does not exist"):
        list(read_records(folder, quarantine=Quarantine(strict=True)))
    list(read_records(folder, quarantine=Quarantine(folder / "quarantine.jsonl")))
    line = json.loads((folder / "quarantine.jsonl").read_text())
    assert (line["source"], line["line"], line["field"]) == ("metadata.jsonl", 2, "chosen")
    assert line["preview"] == "none.jpg"


# ---- how JSON files are read


def pairs_file(path, num_rows, *, indent=None, separators=None):
    rows = [PAIR | {"prompt": f"number {i}"} for i in range(num_rows)]
    path.write_text(json.dumps(rows, indent=indent, separators=separators))
    return path


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_arrays_are_read_in_pieces_whatever_their_layout(folder, monkeypatch, indent):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    path = pairs_file(folder / "train.json", 300, indent=indent)
    records, errors, _ = read(path)
    assert errors.total == 0
    assert [r.prompt for r in records] == [f"number {i}" for i in range(300)]
    lines = path.read_text().splitlines()
    for record in records[::50]:
        number = int(record.source.rpartition(":")[2])
        assert json.dumps(record.prompt) in "".join(lines[number - 1 : number + 4])


def test_characters_across_the_pieces_of_an_array_stay_whole(folder, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 120)
    rows = [PAIR | {"prompt": "ä€😀" * (1 + i % 5)} for i in range(60)]
    (folder / "train.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False), "utf-8")
    assert [r.prompt for r in read(folder / "train.json")[0]] == [row["prompt"] for row in rows]


ARRAYS = {
    "bad element": ('[\n {A},\n {"prompt": oops},\n {B}\n]', [("train.json:3", "is not valid JSON")], 2),
    "long element": (
        '[\n {A},\n {"prompt": "' + "x" * 2_500_000 + '"},\n {B}\n]',
        [("train.json:3", "is longer than the limit")],
        2,
    ),
    "trailing comma": ("[\n {A},\n {B},\n]", [("train.json:4", "has a trailing comma")], 2),
    "cut off": ("[\n {A},\n {B},\n", [("train.json:4", "is damaged or cut off")], 2),
    "cut in an element": ('[\n {A},\n {B},\n {"prompt', [("train.json:4", "is not valid JSON")], 2),
    "bad on one line": ('[{A}, {"prompt": oops}, {B}]', [("train.json:1", "is not valid JSON")], 1),
    "invalid UTF-8": (
        '[\n {A},\n {"prompt": "\udcff"},\n {B}\n]',
        [("train.json:3", "is not valid UTF-8")],
        2,
    ),
    "too deep": ("[\n {A},\n " + "[" * 50_000 + ",\n {B}\n]", [("train.json:3", "is not valid JSON")], 2),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_bad_element_of_an_array_costs_itself_where_lines_allow(folder, kind):
    text, expected, num_kept = ARRAYS[kind]
    for letter in "AB":
        text = text.replace("{" + letter + "}", json.dumps(PAIR | {"prompt": letter}))
    (folder / "train.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    records, errors, _ = read(folder / "train.json")
    assert [r.prompt for r in records] == ["A", "B"][:num_kept]
    assert [(source, reason) for source, _, reason in errors.told()] == expected
    if num_kept == 1:
        assert "the rest of the file was not read" in errors.errors[0].remedy


# ---- WebDataset


def pair_members(key, seed=0, text=b"a cat"):
    return [
        (f"{key}.txt", text),
        (f"{key}.chosen.jpg", jpeg(seed)),
        (f"{key}.rejected.jpg", jpeg(seed + 1)),
    ]


def list_members(key, row, num_images=3):
    images = [(f"{key}.{k}.png", jpeg(10 + k)) for k in range(num_images)]
    return [(f"{key}.json", json.dumps(row).encode()), *images]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_tars_hold_pairs_lists_and_single_images(tmp_path, ending):
    members = [
        *pair_members("train/000001"),
        ("train/000001.json", b'{"user_id": "anna", "strength": 0.8, "margin": 2, "prompt": "other"}'),
        ("train/000001.cls", b"7"),
        *list_members("train/2", {"prompt": "b", "votes": [[3, 2, 1], [1, 3, 2]], "user": 4}),
        ("000003.JPEG", jpeg(30)),
        ("000003.txt", b"\xef\xbb\xbfalone\n"),
        ("4.webp", jpeg(40)),
        ("4.json", b'{"caption": "bad", "desirable": false}'),
    ]
    path = write_tar(tmp_path / f"shard.{ending}", members, "w" if ending == "tar" else "w:gz")
    records, errors, lines = read(path)
    assert errors.told() == []
    assert [(r.prompt, r.relevance, r.group) for r in records] == [
        ("a cat", (1, 0), "anna"),
        ("b", (0.5, 0.75, 0.25), "4"),
        ("alone", (1,), None),
        ("bad", (0,), None),
    ]
    assert (records[0].strength, records[0].margin) == (0.8, 2)
    assert [image.read() for image in records[0].images] == [jpeg(0), jpeg(1)]
    assert [image.read() for image in records[1].images] == [jpeg(10), jpeg(11), jpeg(12)]
    assert records[0].source == f"shard.{ending}/train/000001"
    assert "layout webdataset (detected)" in lines[0]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GRADED = {"prompt": "b", "scores": [1, 2, 3]}
BAD_KEYS = {
    "one side": (pair_members("k")[:2], "rejected", "is missing"),
    "no prompt": (pair_members("k")[1:], "prompt", "is missing"),
    "empty prompt": (pair_members("k", text=b" \n"), "prompt", "is empty"),
    "prompt is no UTF-8": (pair_members("k", text=b"\xff\xfe"), "txt or json", "is not valid UTF-8"),
    "bad json": ([("k.json", b"{"), ("k.0.jpg", jpeg(0)), ("k.1.jpg", jpeg(1))], "json", "is not valid JSON"),
    "deep json": ([("k.json", b"[" * 99_999), ("k.jpg", jpeg(0))], "json", "is not valid JSON"),
    "json is a list": ([("k.json", b"[1]"), ("k.jpg", jpeg(0))], "json", "is not an object"),
    "no image": ([("k.txt", b"hello")], "image", "is missing"),
    "gap": ([*list_members("k", GRADED, 2), ("k.3.jpg", jpeg(9))], "3", "has a gap"),
    "one of a list": (list_members("k", GRADED, 1), "images", "has too few images"),
    "no grades": (list_members("k", {"prompt": "b"}), "images", "has no grades"),
    "twice": ([*pair_members("k"), ("k.chosen.png", jpeg(5))], "chosen", "appears twice"),
    "pair and list": ([*pair_members("k"), ("k.0.png", jpeg(5))], "", "mixes kinds of records"),
    "the same image": (
        [*pair_members("k")[:2], ("k.rejected.jpg", jpeg(0))],
        "rejected",
        "is the same as another image of its record",
    ),
    "link": (
        [link("k.chosen.jpg", "/etc/passwd"), *pair_members("k")[2:]],
        "chosen",
        "is not a regular file",
    ),
    "hard link": (
        [*pair_members("k")[:2], link("k.rejected.jpg", "k.chosen.jpg", tarfile.LNKTYPE)],
        "rejected",
        "is not a regular file",
    ),
    "device": ([link("k.jpg", "", tarfile.CHRTYPE)], "image", "is not a regular file"),
    "parent": ([("../k.txt", b"x"), ("../k.jpg", jpeg(0))], "txt", "leaves the archive"),
    "absolute": ([("/k.txt", b"x"), ("/k.jpg", jpeg(0))], "txt", "leaves the archive"),
    "long text": (pair_members("k", text=b"x" * (1 << 20) + b"x"), "txt", "is larger than the limit"),
}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", BAD_KEYS)
def test_a_bad_key_of_a_tar_is_left_out_once_and_the_others_kept(tmp_path, kind, position):
    members, column, reason = BAD_KEYS[kind]
    parts = [pair_members("a", 20), pair_members("b", 30)]
    parts.insert(position, members)
    path = write_tar(tmp_path / "shard.tar", [m for part in parts for m in part])
    records, errors, _ = read(path)
    assert [r.source for r in records] == ["shard.tar/a", "shard.tar/b"]
    key = "../k" if kind == "parent" else "k"
    assert errors.told() == [(f"shard.tar/{key}", column, reason)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard.tar"]
    assert sorted(p.name for p in tmp_path.parent.glob("k.*")) == []


def test_a_key_with_too_many_bytes_or_images_is_left_out(tmp_path, monkeypatch):
    row = {"prompt": "b", "scores": list(range(70))}
    path = write_tar(tmp_path / "a.tar", [*list_members("k", row, 70), *pair_members("l")])
    assert read(path)[1].told() == [("a.tar/k", "65", "has too many images")]
    monkeypatch.setattr(readers_webdataset, "_MAX_KEY_BYTES", len(jpeg(0)) + 10)
    records, errors, _ = read(write_tar(tmp_path / "b.tar", pair_members("l")))
    assert (records, errors.told()) == ([], [("b.tar/l", "rejected", "is larger than the limit")])


def test_a_tar_that_is_cut_off_keeps_its_whole_keys(tmp_path):
    path = write_tar(tmp_path / "shard.tar", [m for i in range(4) for m in pair_members(f"{i:03}", 2 * i)])
    data = path.read_bytes()
    for missing in ("002.chosen.jpg", "002.rejected.jpg"):
        path.write_bytes(data[: data.index(missing.encode()) + 600])
        records, errors, _ = read(path)
        assert [r.source for r in records] == ["shard.tar/000", "shard.tar/001"]
        assert errors.told() == [("shard.tar/002", "", "is damaged or cut off")]
    packed = gzip.compress(data, mtime=0)
    (tmp_path / "shard.tgz").write_bytes(packed[: len(packed) // 2])
    records, errors, _ = read(tmp_path / "shard.tgz")
    assert [r.source[-3:] for r in records] in (["000"], ["000", "001"])
    assert [reason for _, _, reason in errors.told()] == ["is damaged or cut off"]


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    records, errors, _ = read(path)
    assert records == []
    assert "an extended header has 8,589,934,592 bytes" in errors.errors[0].remedy


def test_what_is_no_tar_is_one_error(tmp_path):
    for name, data in (("a.tar", b"no tar" * 999), ("b.tar.gz", b"no gzip"), ("c.tar", b"")):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name)[1].told() == [(name, "", "is damaged or cut off")]


def test_shards_of_a_folder_are_read_in_order(tmp_path):
    for number in (1, 0):
        write_tar(tmp_path / f"train-{number}.tar", pair_members(f"k{number}", 2 * number))
    write_tar(tmp_path / "val-0.tar", pair_members("v"))
    records, _, _ = read(tmp_path / "train-*.tar")
    assert [r.source for r in records] == ["train-0.tar/k0", "train-1.tar/k1"]


# ---- what is found


WRONG = {
    "texts": ([{"prompt": "a", "chosen": "yes", "rejected": "no"}], "is about texts, not images"),
    "messages": (
        [{"prompt": "a", "chosen": [{"role": "x"}], "rejected": [{"role": "x"}]}],
        "is about texts, not images",
    ),
    "no prompt": ([{"chosen": "a.jpg", "rejected": "b.jpg"}], "has columns of no known layout"),
    "other columns": ([{"prompt": "a", "completion": "b"}], "has columns of no known layout"),
    "numbers": ([1, 2], "is not an object"),
    "nothing": ([], "holds no record"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_data_of_another_kind_is_refused_at_once_in_one_line(tmp_path, kind):
    rows, reason = WRONG[kind]
    write_lines(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, quarantine=Quarantine())
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_paths_that_hold_no_data_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    both = tmp_path / "both"
    both.mkdir()
    (both / "a.parquet").touch()
    (both / "a.tar").touch()
    (tmp_path / "data.pkl").write_bytes(b"x")
    for path, reason in (
        (tmp_path / "none", "does not exist"),
        ("https://example.org/a.parquet", "is a URL"),
        (empty, "holds no data file"),
        (tmp_path / "data.pkl", "is not a file type of image preferences"),
        (both, "holds files of several kinds"),
        (" ", "is no path"),
    ):
        with pytest.raises(DataError) as caught:
            read_records(path, quarantine=Quarantine())
        assert caught.value.reason == reason


def test_links_out_of_a_folder_are_refused_and_a_pattern_may_follow_them(tmp_path):
    write_pickapic(tmp_path / "blobs" / "x.parquet", [pick(0)])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").symlink_to(tmp_path / "blobs" / "x.parquet")
    with pytest.raises(DataError, match=r"links out of its folder; .* give a pattern"):
        read(tmp_path / "data")
    assert len(read(tmp_path / "data" / "*.parquet")[0]) == 1


def test_a_layout_that_is_given_is_taken_and_must_fit_the_files(folder):
    write_lines(folder / "metadata.jsonl", [PAIR | {"path1": "img/c.jpg", "path2": "img/d.jpg"}])
    assert images(read(folder)[0][0]) == ["c.jpg", "d.jpg"]
    records, _, lines = read(folder, layout="folder")
    assert images(records[0]) == ["a.jpg", "b.jpg"]
    assert "layout folder (given)" in lines[0]
    with pytest.raises(DataError, match=r"holds json files; layout pickapic needs \.parquet"):
        read(folder, layout="pickapic")


def test_settings_are_checked_before_anything_is_read(folder):
    write_lines(folder / "metadata.jsonl", [PAIR])
    options = {"quarantine": Quarantine()}
    with pytest.raises(ValueError, match=r"layout is 'pick'; it is one of auto, pickapic, hpdv2"):
        read_records(folder, layout="pick", **options)
    with pytest.raises(ValueError, match="ties is 'keep'; it is drop or half"):
        read_records(folder, ties="keep", **options)
    with pytest.raises(DataError, match="field 'image_root' is no folder"):
        read_records(folder, image_root=folder / "none", **options)
    path = write_tar(folder / "a.tar", pair_members("k"))
    with pytest.raises(ValueError, match=r"image_root=.* is for images that are files"):
        read_records(path, image_root=folder, **options)
    assert set(PARSERS) < set(LAYOUTS)


def test_no_usable_record_is_an_error_at_the_end(folder):
    write_lines(folder / "metadata.jsonl", [PAIR | {"chosen": "none.jpg"}] * 3)
    with pytest.raises(DataError, match=r"holds no usable record; 3 records left out: 3 does not exist"):
        list(read_records(folder, quarantine=Quarantine()))


def test_nothing_is_opened_before_the_first_record_is_asked_for_and_few_after(tmp_path):
    path = write_pickapic(tmp_path / "a.parquet", [pick(i) for i in range(20)], row_group_size=2)
    records = read_records(path, quarantine=Quarantine())
    assert next(records).prompt == "a picture of 0"
    records.close()


def test_ids_do_not_depend_on_the_container(tmp_path):
    write_pickapic(tmp_path / "a.parquet", [pick(0, user_id=None)])
    members = [("k.txt", b"a picture of 0"), ("k.chosen.jpg", jpeg(0)), ("k.rejected.jpg", jpeg(1))]
    write_tar(tmp_path / "a.tar", members)
    (one,), (other,) = read(tmp_path / "a.parquet")[0], read(tmp_path / "a.tar")[0]
    assert one.id == other.id
    assert one.source != other.source


# ---- any row at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.just("img/a.jpg"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
COLUMNS = (
    "prompt", "caption", "text", "image_path", "file_path", "human_preference", "rank", "user_hash",
    "path1", "path2", "confidence", "choice_dist", "generations", "ranking", "chosen", "rejected",
    "images", "relevance", "scores", "votes", "image", "file_name", "desirable", "strength",
    "margin", "user_id", "group",
)  # fmt: skip


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(PARSERS)), st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=9) | VALUES
)
def test_any_row_is_a_record_or_a_data_error(layout, row):
    if isinstance(row, dict):
        row = {"prompt": "a", "human_preference": [1, 0], "ranking": [1, 2]} | row

    def image(value, column):
        if not isinstance(value, str):
            raise DataError("has the wrong type", field=column)
        return ImageSource(value, data=value.encode(errors="replace"), place="x:1", column=column)

    for parse in (lambda: detect_layout(row), lambda: parse_row(row, layout, "x:1", image)):
        with contextlib.suppress(DataError):
            assert isinstance(parse(), (str, ImageRecord))


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 20_000) | st.none(),
    st.sampled_from(["a.tar", "a.tar.gz", "a.parquet", "a.jsonl", "a.json"]),
)
def test_damaged_files_give_records_and_data_errors_and_nothing_else(tmp_path, flips, cut, name):
    write_images(tmp_path, NAMES[:2])
    path = tmp_path / name
    if name.endswith("parquet"):
        write_pickapic(path, [pick(0), pick(1)], row_group_size=1)
    elif "tar" in name:
        write_tar(path, [*pair_members("a"), *list_members("b", GRADED)])
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    elif name.endswith("jsonl"):
        write_lines(path, [PAIR, PAIR | {"prompt": "b"}])
    else:
        write_json(path, [PAIR, PAIR | {"prompt": "b"}])
    damaged = bytearray(path.read_bytes())
    for place, value in flips:
        damaged[place % len(damaged)] = value
    path.write_bytes(damaged if cut is None else damaged[:cut])
    with contextlib.suppress(DataError):
        for record in read_records(path, quarantine=Quarantine()):
            assert record.images[0].read()
