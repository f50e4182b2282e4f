"""Encoded data as examples: forms, splits, ties, and what is refused."""

import numpy as np
import pytest
import torch

from triptych.modalities.diffusion.data import DataConfig, load_data
from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash

ALL = ["pair", "list", "labelled", "single"]


def context(number, *, kind="pair", relevance=(1.0, 0.0), prompt=None, height=8, **fields):
    num = len(relevance)
    return EncodedContext(
        id=f"c{number}",
        source=f"data.parquet[{number}]",
        kind=kind,
        prompt=prompt or f"prompt {number}",
        group=fields.pop("group", f"user {number % 3}"),
        latents=torch.full((num, 4, height, 8), float(number)) + torch.arange(num).reshape(-1, 1, 1, 1) / 10,
        time_ids=tuple((32, 32, 0, k, 32, 32) for k in range(num)),
        contents=tuple(f"{number}-{k}" for k in range(num)),
        relevance=relevance,
        **fields,
    )


def encoded(folder, contexts, *, parts=2):
    """A data set of these contexts, cut into parts, whose prompt embeddings hold the prompt's number."""
    writer = ShardWriter(folder, {"what": "test"}, empty=EncodedPrompt(torch.zeros(3, 5), torch.zeros(2)))
    for cut in np.array_split(np.arange(len(contexts)), parts):
        those = [contexts[i] for i in cut]
        fresh = {prompt_hash(c.prompt): c.prompt for c in those if prompt_hash(c.prompt) not in writer.known}
        values = {h: float(p.split()[-1]) for h, p in fresh.items()}
        prompts = {h: EncodedPrompt(torch.full((3, 5), v), torch.full((2,), v)) for h, v in values.items()}
        writer.write(those, prompts)
    writer.finish({"family": "sdxl"})
    return str(folder)


def load(source, kinds=ALL, *, lines=None, **options):
    options = {"eval_share": 0.0} | options
    report = (lambda line: None) if lines is None else lines.append
    return load_data(DataConfig(source=source, **options), kinds, seed=0, report=report)


def test_a_pair_comes_back_as_it_was_written_whatever_part_it_is_in(tmp_path):
    source = encoded(tmp_path / "d", [context(i) for i in range(7)], parts=3)
    data = load(source)
    assert (data.kind, len(data.train), data.held_out) == ("pair", 7, None)
    for i in (0, 3, 6):
        found = data.train[i]
        assert (found.id, found.source, found.relevance) == (f"c{i}", f"data.parquet[{i}]", (1.0, 0.0))
        assert found.latents[0].unique().tolist() == [float(i)]
        assert found.latents[1].unique().tolist() == [pytest.approx(i + 0.1)]
        assert found.embeds.unique().tolist() == [float(i)]
        assert found.pooled.tolist() == [float(i)] * 2
        assert found.time_ids.tolist() == [[32, 32, 0, 0, 32, 32], [32, 32, 0, 1, 32, 32]]
        assert found.strength is None


def test_a_prompt_is_stored_once_however_many_contexts_it_has(tmp_path):
    source = encoded(tmp_path / "d", [context(i, prompt="prompt 4") for i in range(6)], parts=3)
    stored = sorted((tmp_path / "d").glob("part-*/prompts.safetensors"))
    assert [p.parent.name for p in stored] == ["part-00000"]
    assert load(source).train[5].embeds.unique().tolist() == [4.0]


@pytest.mark.parametrize(
    ("which", "picks"),
    [("all", [(1, 0), (1, 2), (0, 2)]), ("best_worst", [(1, 2)]), ("adjacent", [(1, 0), (0, 2)])],
)
def test_a_list_gives_the_pairs_asked_for_best_first(tmp_path, which, picks):
    source = encoded(tmp_path / "d", [context(0, kind="list", relevance=(0.5, 0.9, 0.1))], parts=1)
    data = load(source, ["pair"], pairs_of_list=which, keep=["margin"])
    assert data.train.picks.tolist() == [list(p) for p in picks]
    grades = (0.5, 0.9, 0.1)
    for example, (i, j) in zip(data.train, picks, strict=True):
        assert example.relevance == (pytest.approx(grades[i]), pytest.approx(grades[j]))
        assert example.margin == pytest.approx(grades[i] - grades[j], abs=1e-6)
        assert example.latents[:, 0, 0, 0].tolist() == [pytest.approx(i / 10), pytest.approx(j / 10)]


def test_tied_images_of_a_list_make_no_pair_and_are_counted(tmp_path):
    lines = []
    source = encoded(tmp_path / "d", [context(0, kind="list", relevance=(0.5, 0.5, 0.1))], parts=1)
    data = load(source, ["pair"], lines=lines)
    assert data.train.picks.tolist() == [[0, 2], [1, 2]]
    assert "data: 1 ties left out" in lines


def test_ties_are_dropped_with_a_count_or_learnt_with_both_labels(tmp_path):
    lines = []
    contexts = [context(0, strength=0.5), context(1, strength=1.0), context(2)]
    source = encoded(tmp_path / "d", contexts, parts=1)
    dropped = load(source, ["pair"], lines=lines)
    assert [e.id for e in dropped.train] == ["c1", "c2"]
    assert "data: 1 ties left out" in lines
    halved = load(source, ["pair"], ties="half")
    assert [(e.id, e.strength) for e in halved.train] == [("c0", 0.5), ("c1", 1.0), ("c2", 1.0)]


def test_winners_are_the_best_image_of_each_context(tmp_path):
    contexts = [
        context(0),
        context(1, kind="list", relevance=(0.1, 0.2, 0.9)),
        context(2, kind="single", relevance=(1.0,)),
    ]
    data = load(encoded(tmp_path / "d", contexts, parts=1), ["single"])
    assert data.kind == "single"
    assert data.train.picks[:, 0].tolist() == [0, 2, 0]
    assert all(len(e.latents) == 1 for e in data.train)


def test_labelled_images_are_desirable_by_their_side_or_their_lists_mean(tmp_path):
    contexts = [context(0), context(1, kind="list", relevance=(0.1, 0.2, 0.9))]
    data = load(encoded(tmp_path / "d", contexts, parts=1), ["labelled"])
    assert [e.relevance for e in data.train] == [(1.0,), (0.0,), (0.0,), (0.0,), (1.0,)]
    above = load(str(tmp_path / "d"), ["labelled"], desirable=0.15)
    assert [e.relevance for e in above.train][2:] == [(0.0,), (1.0,), (1.0,)]


def test_what_is_stored_decides_where_the_objective_leaves_a_choice(tmp_path):
    """sft takes everything; pairs that are stored stay pairs unless winners are asked for."""
    source = encoded(tmp_path / "d", [context(0), context(1)], parts=1)
    assert load(source, ["single", "pair", "list"]).kind == "pair"
    assert load(source, ["single", "pair", "list"], form="winners").kind == "single"
    assert load(source, ["list"]).kind == "list"


def test_pairs_below_the_margin_are_left_out_with_a_count(tmp_path):
    lines = []
    source = encoded(tmp_path / "d", [context(0, margin=0.05), context(1, margin=0.5), context(2)], parts=1)
    data = load(source, ["pair"], lines=lines, min_margin=0.1)
    assert [e.id for e in data.train] == ["c1", "c2"]
    assert "data: 1 pairs below data.min_margin left out" in lines


@pytest.mark.parametrize("by", ["prompt", "group"])
def test_no_prompt_or_person_is_on_both_sides_of_the_split(tmp_path, by):
    contexts = [context(i, prompt=f"prompt {i % 20}", group=f"user {i % 15}") for i in range(120)]
    data = load(encoded(tmp_path / "d", contexts), ["pair"], eval_share=0.3, split_by=by)
    rows = {
        name: {data.train.dataset.record(int(i))[by] for i in view.records}
        for name, view in (("train", data.train), ("held out", data.held_out))
    }
    assert rows["train"]
    assert rows["held out"]
    assert not rows["train"] & rows["held out"]
    assert len(data.train) + len(data.held_out) == 120
    assert set(data.eval_clusters) == rows["held out"]


def test_the_split_depends_on_the_prompt_alone_not_on_what_else_is_there(tmp_path):
    few = load(encoded(tmp_path / "a", [context(i) for i in range(50)]), ["pair"], eval_share=0.3)
    more = load(encoded(tmp_path / "b", [context(i) for i in range(80)]), ["pair"], eval_share=0.3)
    assert {e.id for e in few.held_out} <= {e.id for e in more.held_out}


def test_a_subset_is_drawn_without_repeats_and_the_same_again(tmp_path):
    source = encoded(tmp_path / "d", [context(i) for i in range(30)])
    first, again = (load(source, ["pair"], max_train=10).train for _ in range(2))
    assert first.records.tolist() == again.records.tolist()
    assert len(set(first.records.tolist())) == 10


def test_costs_are_equal_for_equal_shapes_and_tell_shapes_apart(tmp_path):
    contexts = [
        context(0),
        context(1, height=16),
        context(2),
        context(3, kind="list", relevance=(3.0, 2.0, 1.0)),
    ]
    data = load(encoded(tmp_path / "d", contexts, parts=1), ["list"])
    costs = data.lengths(data.train).tolist()
    assert costs[0] == costs[2]
    assert costs[1] > costs[3] > costs[0]


def test_single_images_cannot_be_pairs(tmp_path):
    source = encoded(tmp_path / "d", [context(0, kind="single", relevance=(1.0,))], parts=1)
    with pytest.raises(ValueError, match="holds single images, but the objective takes pair, list data"):
        load(source, ["pair", "list"])


def test_a_form_that_the_objective_does_not_take_is_refused(tmp_path):
    source = encoded(tmp_path / "d", [context(0)], parts=1)
    with pytest.raises(ValueError, match=r"data\.form=lists makes list data, but the objective takes pair"):
        load(source, ["pair"], form="lists")


def test_a_folder_that_is_no_data_set_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"no encoded data set.*scripts/encode_images\.py"):
        load(str(tmp_path))


def test_persons_are_needed_to_split_by_person(tmp_path):
    source = encoded(tmp_path / "d", [context(0, group=None)], parts=1)
    with pytest.raises(ValueError, match=r"data\.split_by=group, but not every record names"):
        load(source, ["pair"], split_by="group")


def test_the_empty_prompt_is_the_encoded_one_or_zeros(tmp_path):
    source = encoded(tmp_path / "d", [context(0)], parts=1)
    writer_value = load(source).empty
    assert writer_value.embeds.shape == (3, 5)
    zeros = load(source, empty_prompt="zeros").empty
    assert not zeros.embeds.any()


def test_reading_many_pairs_takes_a_few_bytes_each(tmp_path):
    """What grows with the data is one index of each example, not its record or its tensors."""
    contexts = [context(i, prompt=f"prompt {i % 7}") for i in range(3000)]
    data = load(encoded(tmp_path / "d", contexts, parts=6), ["pair"])
    held = data.train.records.nbytes + data.train.picks.nbytes + data.lengths(data.train).nbytes
    assert held / len(data.train) <= 24
