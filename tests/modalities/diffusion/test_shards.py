import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triptych.modalities.diffusion.shards import (
    EncodedContext,
    EncodedDataset,
    EncodedPrompt,
    ShardWriter,
    prompt_hash,
)
from triptych.training import atomic
from triptych.training.quarantine import DataError

EMPTY = EncodedPrompt(torch.zeros(3, 4), torch.zeros(5))
IDENTITY = {"model": "a", "resolution": 32}


def prompt(seed):
    draw = torch.Generator().manual_seed(seed)
    return EncodedPrompt(torch.randn(3, 4, generator=draw).half(), torch.randn(5, generator=draw).half())


def context(name, *, text="a dog", shape=(4, 2, 2), num=2, logvar=False, seed=0, **changes):
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(num, *shape, generator=draw).half()
    given = {
        "id": name,
        "source": f"{name}.png",
        "kind": "pair",
        "prompt": text,
        "group": None,
        "latents": latents,
        "logvar": latents - 1 if logvar else None,
        "time_ids": tuple((32, 32, k, 0, 32, 32) for k in range(num)),
        "contents": tuple(f"{name}-{k}" for k in range(num)),
        "relevance": tuple(float(num - k) for k in range(num)),
        "strength": 0.75,
    }
    return EncodedContext(**(given | changes))


def write(folder, *parts, identity=IDENTITY, facts=None):
    """A finished data set of these lists of contexts; every prompt is embedded as its own length says."""
    writer = ShardWriter(folder, identity, empty=EMPTY)
    for contexts in parts:
        texts = dict.fromkeys(c.prompt for c in contexts)
        new = {prompt_hash(t): prompt(len(t)) for t in texts if prompt_hash(t) not in writer.known}
        writer.write(contexts, new)
    writer.finish(facts or {})
    return EncodedDataset(folder)


def test_what_is_written_is_read_back(tmp_path):
    first = context("a", group="ann", margin=0.5)
    second = context("b", text="a red cat", shape=(4, 2, 3), num=3, kind="list", strength=None, seed=1)
    data = write(tmp_path / "data", [first], [second], facts={"family": "sdxl"})
    assert data.num_records == 2
    assert data.facts["family"] == "sdxl"
    assert data.facts["num_prompts"] == 2
    for index, (part, given) in enumerate([(0, first), (1, second)]):
        record = data.record(index)
        for name in ("id", "source", "kind", "prompt", "group", "strength", "margin"):
            assert record[name] == getattr(given, name)
        assert record["part"] == part
        assert record["shape"] == "x".join(map(str, given.latents.shape[1:]))
        assert tuple(map(tuple, record["time_ids"])) == given.time_ids
        assert tuple(record["contents"]) == given.contents
        assert tuple(record["relevance"]) == given.relevance
        mean, logvar = data.latents(record, range(len(given.latents)))
        assert torch.equal(mean, given.latents)
        assert mean.dtype == torch.float16
        assert logvar is None
        found, expected = data.prompt(record), prompt(len(given.prompt))
        assert torch.equal(found.embeds, expected.embeds)
        assert found.pooled is not None
        assert torch.equal(found.pooled, expected.pooled)
    assert torch.equal(data.empty_prompt().embeds, EMPTY.embeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_come_back_as_they_went(tmp_path, dtype):
    given = context("a").latents.to(dtype)
    data = write(tmp_path / "data", [context("a", latents=given, logvar=None)])
    mean, _ = data.latents(data.record(0), [0, 1])
    assert mean.dtype == dtype
    assert torch.equal(mean, given)


def test_candidates_are_read_in_the_order_asked_for(tmp_path):
    given = context("a", num=3, kind="list", logvar=True)
    data = write(tmp_path / "data", [context("z", seed=9, logvar=True), given])
    mean, logvar = data.latents(data.record(1), [2, 0])
    assert torch.equal(mean, given.latents[[2, 0]])
    assert given.logvar is not None
    assert logvar is not None
    assert torch.equal(logvar, given.logvar[[2, 0]])


def test_shapes_of_one_part_have_files_of_their_own(tmp_path):
    shapes = [(4, 2, 2), (4, 1, 4), (4, 2, 2), (4, 4, 1)]
    given = [context(str(i), shape=s, seed=i) for i, s in enumerate(shapes)]
    data = write(tmp_path / "data", given)
    assert sorted(p.name for p in (tmp_path / "data" / "part-00000").glob("latents*")) == [
        "latents-4x1x4.safetensors",
        "latents-4x2x2.safetensors",
        "latents-4x4x1.safetensors",
    ]
    assert data.record(2)["rows"] == [2, 3]
    for i, c in enumerate(given):
        assert torch.equal(data.latents(data.record(i), [0, 1])[0], c.latents)


def test_a_prompt_is_kept_once_whatever_part_it_comes_in(tmp_path):
    data = write(tmp_path / "data", [context("a"), context("b")], [context("c", seed=2)])
    places = [(data.record(i)["prompt_part"], data.record(i)["prompt_row"]) for i in range(3)]
    assert places == [(0, 0)] * 3
    assert not (tmp_path / "data" / "part-00001" / "prompts.safetensors").exists()
    assert torch.equal(data.prompt(data.record(2)).embeds, prompt(len("a dog")).embeds)


def test_equal_latents_of_a_part_are_kept_once(tmp_path):
    shared = context("a")
    other = context("b", seed=3)
    second = context("b", latents=torch.stack([other.latents[0], shared.latents[1]]))
    data = write(tmp_path / "data", [shared, second])
    assert [data.record(i)["rows"] for i in range(2)] == [[0, 1], [2, 1]]
    assert torch.equal(data.latents(data.record(1), [0, 1])[0], second.latents)
    # The same mean with another variance is another latent.
    wider = context("c", logvar=True, seed=4)
    assert wider.logvar is not None
    narrow = replace(wider, id="d", logvar=wider.logvar - 1)
    data = write(tmp_path / "other", [wider, narrow])
    assert data.record(1)["rows"] == [2, 3]


def test_columns_span_the_parts(tmp_path):
    data = write(tmp_path / "data", [context("a"), context("b")], [context("c", group="x")])
    assert data.column("id").to_pylist() == ["a", "b", "c"]
    assert data.column("group").to_pylist() == [None, None, "x"]


def test_a_part_may_be_empty(tmp_path):
    data = write(tmp_path / "data", [context("a")], [], [context("b")])
    assert data.num_records == 2
    assert data.record(1)["id"] == "b"
    assert data.record(1)["part"] == 2


def test_facts_of_a_part_are_kept_with_it(tmp_path):
    writer = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    writer.write([], {}, {"num_read": 7})
    assert ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY).part_facts(0) == {"num_read": 7}


def test_a_writer_goes_on_where_the_last_one_stopped(tmp_path):
    writer = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    writer.write([context("a")], {prompt_hash("a dog"): prompt(5)})
    again = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    assert again.num_parts == 1
    assert again.known == {prompt_hash("a dog"): (0, 0)}
    second = context("b", text="x", seed=1)
    again.write([second], {prompt_hash("x"): prompt(1)})
    third = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    assert third.known == {prompt_hash("a dog"): (0, 0), prompt_hash("x"): (1, 0)}
    third.finish({})
    whole = write(tmp_path / "whole", [context("a")], [second])
    assert EncodedDataset(tmp_path / "data").fingerprint == whole.fingerprint


@pytest.mark.parametrize("step", ["fsync-folder", "rename", "fsync-parent"])
def test_a_part_that_was_being_written_is_whole_or_absent(tmp_path, monkeypatch, step):
    def stop(name):
        if name == step:
            raise KeyboardInterrupt

    writer = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    writer.write([context("a")], {prompt_hash("a dog"): prompt(5)})
    monkeypatch.setattr(atomic, "fault_point", stop)
    with pytest.raises(KeyboardInterrupt):
        writer.write([context("b", text="x", seed=1)], {prompt_hash("x"): prompt(1)})
    monkeypatch.undo()
    again = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    assert again.num_parts == (2 if step == "fsync-parent" else 1)
    if again.num_parts == 1:
        again.write([context("b", text="x", seed=1)], {prompt_hash("x"): prompt(1)})
    again.finish({})
    data = EncodedDataset(tmp_path / "data")
    assert data.column("id").to_pylist() == ["a", "b"]
    assert torch.equal(data.prompt(data.record(1)).embeds, prompt(1).embeds)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "dataset.json",
        "empty.safetensors",
        "encoding.json",
        "part-00000",
        "part-00001",
    ]


def test_every_file_of_a_part_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, before = [], []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (synced.append(os.readlink(f"/proc/self/fd/{d}")), real(d)))

    def note(name):
        if name == "rename":
            before.extend(Path(p).name for p in synced)

    monkeypatch.setattr(atomic, "fault_point", note)
    writer = ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    final = writer.write([context("a")], {prompt_hash("a dog"): prompt(5)})
    assert {p.name for p in final.iterdir()} <= set(before)


def test_a_folder_of_another_encoding_is_refused_by_what_differs(tmp_path):
    ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    with pytest.raises(ValueError, match="encoded with another resolution, seed; give another"):
        ShardWriter(tmp_path / "data", {"model": "a", "resolution": 64, "seed": 1}, empty=EMPTY)


def test_the_empty_prompt_stays_what_it_was(tmp_path):
    ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    before = (tmp_path / "data" / "empty.safetensors").read_bytes()
    ShardWriter(tmp_path / "data", IDENTITY, empty=prompt(3))
    assert (tmp_path / "data" / "empty.safetensors").read_bytes() == before


def test_an_unfinished_folder_and_a_foreign_one_are_told_apart(tmp_path):
    ShardWriter(tmp_path / "data", IDENTITY, empty=EMPTY)
    with pytest.raises(ValueError, match="an encoding that was interrupted"):
        EncodedDataset(tmp_path / "data")
    with pytest.raises(ValueError, match="no encoded data set"):
        EncodedDataset(tmp_path)


def test_another_format_is_refused_by_name(tmp_path):
    write(tmp_path / "data", [context("a")])
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(facts | {"format": "triptych-latents-9"}))
    with pytest.raises(ValueError, match=r"'triptych-latents-9'; this version reads 'triptych-latents-1'"):
        EncodedDataset(tmp_path / "data")


@pytest.mark.parametrize("name", ["records.arrow", "latents-4x2x2.safetensors", "prompts.safetensors"])
def test_a_damaged_or_missing_file_is_named(tmp_path, name):
    write(tmp_path / "data", [context("a")])
    path = tmp_path / "data" / "part-00000" / name
    path.write_bytes(path.read_bytes()[:20])

    def read():
        data = EncodedDataset(tmp_path / "data")
        data.latents(data.record(0), [0])
        data.prompt(data.record(0))

    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        read()
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        read()


def test_the_fingerprint_follows_records_and_facts(tmp_path):
    base = write(tmp_path / "a", [context("a")])
    assert write(tmp_path / "b", [context("a")]).fingerprint == base.fingerprint
    assert write(tmp_path / "c", [context("a", strength=0.5)]).fingerprint != base.fingerprint
    assert write(tmp_path / "d", [context("a")], facts={"x": 1}).fingerprint != base.fingerprint


def test_prompts_without_a_pooled_embedding_have_none(tmp_path):
    writer = ShardWriter(tmp_path / "data", IDENTITY, empty=EncodedPrompt(torch.ones(3, 4)))
    writer.write([context("a")], {prompt_hash("a dog"): EncodedPrompt(torch.ones(3, 4))})
    writer.finish({})
    data = EncodedDataset(tmp_path / "data")
    assert data.prompt(data.record(0)).pooled is None
    assert data.empty_prompt().pooled is None
