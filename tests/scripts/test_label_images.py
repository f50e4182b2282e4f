import json
import signal
import weakref
from typing import ClassVar

import encode_cases
import numpy as np
import pytest
import torch
from image_files import encoded, write_lines
from PIL import Image

from triptych.modalities.diffusion.image_scoring import SCORERS
from triptych.modalities.diffusion.readers import read_records
from triptych.scripts import label_images
from triptych.training.quarantine import Quarantine

# Colours are what the three scorers say: red is scorer a's score, green b's, blue c's.
# Votes: phi = (6, 5, 3, 3) / 9, see test_labelling.py.
COLOURS = [(90, 30, 20), (70, 40, 10), (50, 10, 30), (10, 20, 30)]
# Here every scorer has the same order.
CLEAR = [(9, 9, 9), (60, 60, 60), (30, 30, 30)]
SCORERS_GIVEN = (
    "{a: {name: channel}, b: {name: channel, options: {index: 1}}, c: {name: channel, options: {index: 2}}}"
)


class Channel:
    """The mean of one channel; it knows the batches it was given and how many like it are alive."""

    batches: ClassVar[list] = []
    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most_alive: ClassVar[int] = 0

    def __init__(self, index):
        self.index = index
        Channel.alive.add(self)
        Channel.most_alive = max(Channel.most_alive, len(Channel.alive))

    def __call__(self, images, prompts):
        Channel.batches.append((self.index, list(prompts)))
        return torch.tensor([float(np.asarray(image)[..., self.index].mean()) for image in images])


@pytest.fixture
def figures():
    """Asked for by tests that look at the figures, which take a second each."""


@pytest.fixture(autouse=True)
def channel(monkeypatch, request):
    """A scorer `channel` that counts."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(label_images, "figure", lambda *args, **options: b"figure")
        monkeypatch.setattr(label_images, "sheet", lambda lists: b"sheet")
    monkeypatch.setattr(Channel, "batches", [])
    monkeypatch.setattr(Channel, "most_alive", 0)
    monkeypatch.setitem(SCORERS._factories, "channel", lambda *, index=0, note="": Channel(index))
    return Channel


def flat(colour, size=16):
    return encoded(Image.new("RGB", (size, size), colour), "PNG")


def write_drawn(folder, lists):
    """A folder as draw_images writes it; lists: prompt -> colours, or bytes of a file."""
    rows = []
    for i, (prompt, colours) in enumerate(lists.items()):
        names = [f"images/m/{i}-{k}.png" for k in range(len(colours))]
        for name, colour in zip(names, colours, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(colour if isinstance(colour, bytes) else flat(colour))
        rows.append(
            {"prompt": prompt, "images": names, "models": ["m"] * len(names), "seeds": [1] * len(names)}
        )
    write_lines(folder / "metadata.jsonl", rows)
    return folder


@pytest.fixture
def drawn(tmp_path):
    return write_drawn(tmp_path / "drawn", {"a cat": COLOURS, "a dog": CLEAR})


def command(source, out, *more, scorers=SCORERS_GIVEN):
    given = ["--data.source", source, "--output_dir", out, "--scorers", scorers, "--batch_size", 3]
    return [str(word) for word in (*given, *more)]


def label(source, out, *more, scorers=SCORERS_GIVEN):
    assert label_images.main(command(source, out, *more, scorers=scorers)) == 0
    return rows_of(out)


def rows_of(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]


def report_of(out):
    return json.loads((out / "label_report.json").read_text("utf-8"))


def colour_of(out, name):
    with Image.open(out / name) as image:
        return image.getpixel((0, 0))


def tree(folder):
    """All files but those that name the folder or know the times of the source's files."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("config.yaml", "gathered.json"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept}


def test_lists_are_graded_by_votes_and_keep_every_score(drawn, tmp_path):
    out = tmp_path / "out"
    cat, dog = label(drawn, out, "--form", "lists")
    assert [colour_of(out, name) for name in cat["images"]] == COLOURS
    assert cat["prompt"] == "a cat"
    assert cat["relevance"] == cat["phi"] == pytest.approx([6 / 9, 5 / 9, 3 / 9, 3 / 9])
    assert cat["by_scorer"] == {"a": [90, 70, 50, 10], "b": [30, 40, 10, 20], "c": [20, 10, 30, 30]}
    # The best against the last of the worst: a and b prefer it.
    assert (cat["margin"], cat["agreement"]) == (pytest.approx(3 / 9), pytest.approx(2 / 3))
    assert dog["relevance"] == [0, 1, 0.5]
    records = list(read_records(out, quarantine=Quarantine(strict=True)))
    assert [record.relevance for record in records] == [tuple(cat["relevance"]), (0, 1, 0.5)]
    assert [record.kind for record in records] == ["list", "list"]


def test_pairs_have_the_share_of_votes_as_strength(drawn, tmp_path):
    out = tmp_path / "out"
    label(drawn, out, "--pairs", "all")
    records = list(read_records(out, quarantine=Quarantine(strict=True)))
    assert all(record.kind == "pair" for record in records)
    found = [tuple(colour_of(out, f"images/{i.path.name}") for i in record.images) for record in records]
    cat = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert found[:5] == [(COLOURS[i], COLOURS[j]) for i, j in cat]
    assert found[5:] == [(CLEAR[1], CLEAR[2]), (CLEAR[1], CLEAR[0]), (CLEAR[2], CLEAR[0])]
    assert [r.strength for r in records] == pytest.approx([2 / 3] * 5 + [1] * 3)
    assert [r.margin for r in records] == pytest.approx([1 / 9, 3 / 9, 3 / 9, 2 / 9, 2 / 9, 0.5, 1, 0.5])
    assert report_of(out)["dropped"] == {"tie": 1}


def test_one_scorer_or_the_mean_may_decide_and_then_no_strength_is_claimed(drawn, tmp_path):
    cat, _ = label(drawn, tmp_path / "c", "--by", "c")
    assert cat["by_scorer"]["c"] == [30, 10]
    assert (cat["margin"], cat["agreement"]) == (20, pytest.approx(1 / 3))
    assert "strength" not in cat
    cat, dog = label(drawn, tmp_path / "mean", "--by", "mean", "--form", "lists")
    assert (dog["relevance"][0], dog["relevance"][1]) == (0, 1)
    assert 0 < dog["relevance"][2] < 1
    assert cat["relevance"].index(1) == 0


def test_what_is_dropped_is_counted_said_and_drawn(drawn, tmp_path, capsys, figures):
    out = tmp_path / "out"
    label(drawn, out, "--pairs", "all", "--min_margin", "0.5", "--min_agreement", "0.9")
    report = report_of(out)
    assert (report["num_kept"], report["dropped"]) == (3, {"margin too small": 5, "tie": 1})
    assert (report["num_lists"], report["num_pictures"], report["left_out"]) == (2, 7, {})
    said = capsys.readouterr().out
    assert f"{out}: 3 pairs of 2 lists; dropped: 5 margin too small, 1 tie" in said
    assert "Kendall's tau of a and b: " in said
    assert report["agreement"]["a / b"]["mean"] == pytest.approx((1 / 3 + 1) / 2)
    for name in ("label_report.png", "lists.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200


def test_each_picture_is_scored_once_whatever_is_asked_afterwards(drawn, tmp_path, channel):
    out = tmp_path / "out"
    label(drawn, out)
    assert [(index, len(prompts)) for index, prompts in channel.batches] == [
        (index, size) for index in range(3) for size in (3, 3, 1)
    ]
    # Prompts come with their pictures.
    assert channel.batches[1][1] == ["a cat", "a dog", "a dog"]
    assert channel.most_alive == 1
    before = len(channel.batches)
    for more in (
        ["--min_margin", "0.4"],
        ["--form", "lists"],
        ["--pairs", "random"],
        ["--by", "a"],
        ["--seed", "3"],
    ):
        label(drawn, out, *more)
    assert len(channel.batches) == before
    # Another option of b alone makes b score again.
    label(drawn, out, scorers=SCORERS_GIVEN.replace("index: 1", "index: 1, note: new"))
    assert {index for index, _ in channel.batches[before:]} == {1}


def test_new_pictures_alone_are_scored(drawn, tmp_path, channel):
    out = tmp_path / "out"
    label(drawn, out)
    before = len(channel.batches)
    write_drawn(drawn, {"a cat": COLOURS, "a dog": CLEAR, "a cow": [CLEAR[0], (77, 0, 0)]})
    rows = label(drawn, out)
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "a cow"]
    # A picture that is there for another prompt is another thing to score.
    assert channel.batches[before:] == [(index, ["a cow", "a cow"]) for index in range(3)]


def test_an_interrupted_labelling_goes_on_and_gives_the_same_files(
    drawn, tmp_path, channel, monkeypatch, capsys
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    label(drawn, whole)
    real, calls = label_images.scores_of_images, []

    def interrupted(*args):
        calls.append(args[-1])
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(label_images, "scores_of_images", interrupted)
    assert label_images.main(command(drawn, out)) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "metadata.jsonl").exists()
    # A kill while a line is written leaves half of it.
    [path] = (out / "scores").glob("b-*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    assert label_images.main(command(drawn, out)) == 0
    assert calls[5:] == ["b", "b", "c", "c", "c"]
    assert "score b 7/7 (100 %)" in capsys.readouterr().err
    assert tree(out) == tree(whole)


def test_gathering_that_was_interrupted_is_done_again(drawn, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    label(drawn, whole)
    real, seen = label_images._store, []

    def store(record, **options):
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(record, **options)

    with monkeypatch.context() as patch:
        patch.setattr(label_images, "_store", store)
        with pytest.raises(KeyboardInterrupt):
            label_images.main(command(drawn, out))
    assert list((out / "images").iterdir())
    assert not (out / "gathered.json").exists()
    label(drawn, out)
    assert tree(out) == tree(whole)


def test_two_runs_give_the_same_files_and_link_the_pictures(drawn, tmp_path, figures):
    for name in ("one", "two"):
        label(drawn, tmp_path / name, "--form", "lists")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    name = rows_of(tmp_path / "one")[0]["images"][0]
    assert (tmp_path / "one" / name).samefile(drawn / "images" / "m" / "0-0.png")


def test_pictures_that_cannot_be_used_are_left_out_with_their_reasons(tmp_path):
    lists = {
        "three left": [*COLOURS[:3], b"no picture"],
        "twice the same": [COLOURS[0], COLOURS[1], COLOURS[0]],
        "one left": [COLOURS[0], b"\x89PNG\r\n\x1a\n"],
    }
    source, out = write_drawn(tmp_path / "drawn", lists), tmp_path / "out"
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    out_of_place = {"prompt": "away", "images": ["../secret.png", rows[0]["images"][0]]}
    write_lines(
        source / "metadata.jsonl", [*rows, out_of_place, b"{", rows[0] | {"images": "x.png"}, rows[0]]
    )
    found = label(source, out, "--form", "lists")
    assert [len(row["images"]) for row in found] == [3, 2]
    left_out = {
        "has fewer than two images left": 1,
        "has the wrong type": 1,
        "is a broken image": 1,
        "is not a JPEG, PNG or WebP image": 2,
        "is not valid JSON": 1,
        "is the same as another image of its record": 1,
        "leaves the data's folder": 1,
        "repeats an earlier record": 1,
    }
    assert report_of(out)["left_out"] == left_out
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["line"] for line in lines} == {1, 2, 3, 4, 5, 6, 7}
    # What was gathered before still knows it.
    label(source, out, "--form", "lists", "--min_margin", "0.1")
    assert report_of(out)["left_out"] == left_out


def pick_a_pic(folder):
    """Pairs of flat pictures; persons preferred the redder one in three of four, and could not say once."""
    colours = [
        ((200, 0, 0), (0, 0, 90)),
        ((150, 0, 0), (0, 0, 91)),
        ((100, 0, 0), (0, 0, 92)),
        ((50, 0, 0), (0, 0, 93)),
    ]
    made = [
        encode_cases.row(flat(red), flat(blue), label=label, caption=f"thing {i}", user=i)
        for i, ((red, blue), label) in enumerate(zip(colours, (1.0, 1.0, 0.0, 1.0), strict=True))
    ]
    # Somebody else saw the first pair differently.
    made.append(encode_cases.row(flat((200, 0, 0)), flat((0, 0, 90)), label=0.0, caption="thing 0"))
    made.append(encode_cases.row(flat((7, 0, 0)), flat((0, 0, 8)), label=0.5, caption="a tie"))
    made.append(encode_cases.row(flat((7, 0, 0)), b"broken", caption="broken"))
    encode_cases.write_parquet(folder / "train-0.parquet", made)
    return folder


def test_pairs_of_persons_are_labelled_anew_and_compared_with_them(tmp_path, capsys):
    source, out = pick_a_pic(tmp_path / "pickapic"), tmp_path / "out"
    two = "{red: {name: channel}, blue: {name: channel, options: {index: 2}}}"
    rows = label(source, out, "--by", "red", scorers=two)
    assert [colour_of(out, row["chosen"]) for row in rows] == [
        (200, 0, 0),
        (150, 0, 0),
        (100, 0, 0),
        (50, 0, 0),
    ]
    report = report_of(out)
    given = {name: found["mean"] for name, found in report["agreement_with_given_labels"].items()}
    assert given == {"red": 0.75, "blue": 0.25, "votes": 0.5}
    assert report["left_out"]["is a tie"] == 1
    assert report["left_out"]["lost an image of its pair"] == 1
    assert report["left_out"]["repeats an earlier record"] == 1
    assert "red agrees with the labels that were given: 0.75" in capsys.readouterr().out
    # No person's name is kept: the labels are not theirs.
    assert all(record.group is None for record in read_records(out, quarantine=Quarantine(strict=True)))
    # Scorers can judge what persons could not; 4 pairs have a label to compare with.
    rows = label(source, out, "--data.ties", "half", "--by", "red", scorers="{red: {name: channel}}")
    assert len(rows) == 5
    assert report_of(out)["agreement_with_given_labels"]["red"]["num_lists"] == 4


def test_lists_with_grades_lose_them(tmp_path):
    source = write_drawn(tmp_path / "graded", {"a dog": CLEAR})
    [row] = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    write_lines(source / "metadata.jsonl", [row | {"ranking": [1, 2, 3]}])
    [found] = label(source, tmp_path / "out", "--form", "lists")
    assert found["relevance"] == [0, 1, 0.5]


def test_where_nothing_is_left_the_report_remains_and_old_labels_do_not(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    label(drawn, out)
    with pytest.raises(SystemExit) as ended:
        label_images.main(command(drawn, out, "--by", "a", "--min_margin", "1000"))
    assert ended.value.code == 2
    assert "no pairs left, dropped were 2 margin too small" in capsys.readouterr().err
    assert report_of(out)["dropped"] == {"margin too small": 2}
    assert not (out / "metadata.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorers", "{}"], "names nobody to judge"),
        (["--scorers", "{a: {name: chanel}}"], "Did you mean 'channel'?"),
        (["--scorers", "{a/b: {name: channel}}"], "'a/b' is no name of letters"),
        (["--scorers", "{a: {name: channel, options: {size: 3}}}"], "has no option 'size'"),
        (["--by", "d"], "by=d is not one of votes, mean, a, b, c"),
        (["--min_margin", "2"], "grades by votes are in [0, 1]"),
        (["--min_agreement", "60"], "min_agreement=60.0 is a share"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all: does not exist"),
        (["--data.source", "https://example.org/a.parquet"], "is a URL"),
        (["--batchsize", "8"], "did you mean batch_size?"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(drawn, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        label_images.main(command(drawn, tmp_path / "out", *more))
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_scorer_that_gives_no_number_is_named(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        SCORERS._factories, "broken", lambda: lambda images, prompts: torch.tensor([torch.nan] * len(images))
    )
    with pytest.raises(SystemExit):
        label_images.main(command(drawn, tmp_path / "out", scorers="{bad: {name: broken}}"))
    assert "error: bad gave scores [nan" in capsys.readouterr().err
