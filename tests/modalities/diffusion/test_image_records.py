"""Records: what they say of themselves, and ids that follow the content wherever it stands."""

import hashlib
from dataclasses import replace

import pytest
from image_files import jpeg, source

from triptych.modalities.diffusion.records import ImageRecord, ImageSource, make_record
from triptych.training.quarantine import DataError


def record(**changes):
    given = {
        "source": "a.jsonl:1",
        "prompt": "a cat",
        "images": (source(jpeg(0), "a"), source(jpeg(1), "b")),
        "relevance": (1.0, 0.0),
    }
    return make_record(**given | changes)


def test_kinds_follow_from_the_number_of_images_and_their_grades():
    one, two = (source(jpeg(0)),), (source(jpeg(0)), source(jpeg(1)))
    assert record(images=one, relevance=(1,)).kind == "single"
    assert record(images=one, relevance=(0,)).kind == "single"
    assert record().kind == "pair"
    assert record(relevance=(0.9, 0.2)).kind == "list"
    assert record(images=(*two, source(jpeg(2))), relevance=(1, 0, 0)).kind == "list"


def test_two_images_graded_zero_and_one_become_a_pair_with_the_chosen_first():
    turned = record(relevance=(0, 1))
    assert [image.name for image in turned.images] == ["b", "a"]
    assert (turned.relevance, turned.kind) == ((1.0, 0.0), "pair")


def test_ties_are_pairs_of_strength_one_half_and_lists_of_equal_grades():
    assert record(strength=0.5).is_tie
    assert record(relevance=(0.3, 0.3)).is_tie
    assert not record().is_tie
    assert not record(strength=0.8).is_tie
    assert not record(images=(source(jpeg(0)),), relevance=(1,)).is_tie


def test_the_id_follows_the_content_and_not_the_place():
    assert record().id == record(source="other.parquet[3]").id
    assert len(record().id) == 32
    ids = {
        r.id
        for r in (
            record(),
            record(prompt="a dog"),
            record(relevance=(0, 1)),
            record(relevance=(0.5, 0.2)),
            record(images=(source(jpeg(0)), source(jpeg(2)))),
            record(group="anna"),
            record(strength=0.7),
            record(margin=0.7),
        )
    }
    assert len(ids) == 8


def test_the_id_of_a_file_changes_with_its_name_and_its_size(tmp_path):
    def of(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return record(images=(ImageSource(name, path=path),), relevance=(1,)).id

    first = of("a.jpg", b"123")
    assert of("a.jpg", b"456") == first
    assert of("a.jpg", b"4567") != first
    assert of("b.jpg", b"123") != first


def test_ids_are_the_same_in_every_version():
    """sha256("abc") is in every textbook; the id is that of the record's content as this JSON."""
    one = record(images=(ImageSource("x", data=b"abc"),), relevance=(1,))
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = f'["a cat", ["{abc}"], [1.0], null, null, null]'
    assert one.id == hashlib.sha256(content.encode()).hexdigest()[:32]


def test_an_image_given_twice_is_refused():
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'image' is the same as another image"):
        record(images=(source(jpeg(0), "a"), source(jpeg(0), "b")))


def test_wrong_records_are_refused():
    with pytest.raises(ValueError, match="2 images need as many grades, not 1"):
        record(relevance=(1,))
    with pytest.raises(ValueError, match="belong to a pair, not to a list"):
        record(relevance=(0.5, 0.2), strength=0.4)
    with pytest.raises(ValueError, match="0 images need as many grades"):
        ImageRecord(id="x", source="x", prompt="x", images=(), relevance=())
    with pytest.raises(ValueError, match="needs either data or a path"):
        ImageSource("a")


def test_bytes_are_read_when_asked_for_and_not_shown(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    image = ImageSource("a.jpg", path=path)
    path.write_bytes(b"later")
    assert image.read() == b"later"
    assert "secret" not in repr(source(b"secret"))
    assert source(b"abc").content_hash().startswith("ba7816bf8f01cfea")
    path.unlink()
    with pytest.raises(DataError, match=r"a.jpg: cannot be read"):
        image.content_hash()
    with pytest.raises(DataError, match=r"a.jpg: cannot be read"):
        record(images=(image,), relevance=(1,))


def test_records_are_values():
    assert record() == record()
    assert replace(record(), prompt="b") != record()
    assert len({record(), record()}) == 1
