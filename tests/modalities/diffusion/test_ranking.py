"""Grades from rankings, votes and scores; pairs from lists and lists from pairs."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import jpeg, source

from triptych.modalities.diffusion.ranking import (
    adjacent_pairs,
    all_pairs,
    best_worst_pairs,
    lists_from_pairs,
    relevance_from_ranking,
    relevance_from_scores,
    relevance_from_votes,
)
from triptych.modalities.diffusion.records import ImageSource, make_record

IMAGES = [source(jpeg(k, width=16, height=16), f"image {k}") for k in range(6)]
CHECKED = settings(max_examples=200, derandomize=True, deadline=None)
NUMBERS = st.floats(-1e6, 1e6)


def listed(relevance, order=None, group=None):
    images = [IMAGES[k] for k in (order or range(len(relevance)))]
    return make_record(source="l:1", prompt="p", images=images, relevance=relevance, group=group)


def paired(chosen, rejected, prompt="p", **extras):
    images = (IMAGES[chosen], IMAGES[rejected])
    return make_record(source="p:1", prompt=prompt, images=images, relevance=(1, 0), **extras)


def names(pairs):
    return sorted(tuple(int(image.name[-1]) for image in pair.images) for pair in pairs)


def test_votes_are_shares_of_wins_over_scorers_and_rivals():
    """Two scorers, three images: wins are 2 + 1, 1 + 2, 0 + 0 of 2 (3 - 1) = 4 possible each."""
    assert relevance_from_votes([[3, 2, 1], [10, 200, -5]]) == (0.75, 0.75, 0.0)
    assert relevance_from_votes([[1, 1, 0]]) == (0.5, 0.5, 0.0)


def test_a_ranking_is_the_share_of_images_ranked_later():
    assert relevance_from_ranking([1, 2, 3]) == (1.0, 0.5, 0.0)
    assert relevance_from_ranking([3, 1, 2, 4, 5]) == (0.5, 1.0, 0.75, 0.25, 0.0)
    assert relevance_from_ranking([1, 1, 3]) == (0.5, 0.5, 0.0)
    assert relevance_from_ranking([2, 2]) == (0.0, 0.0)


def test_scores_are_scaled_to_zero_and_one_within_the_list():
    assert relevance_from_scores([20.0, 22.0, 21.0]) == (0.0, 1.0, 0.5)
    assert relevance_from_scores([7, 7]) == (0.5, 0.5)
    assert relevance_from_scores([-1.7e308, 1.7e308, 0]) == (0.0, 1.0, 0.5)


def test_votes_of_ragged_or_single_images_are_refused():
    for scores in ([], [[]], [[1]], [[1, 2], [1, 2, 3]]):
        with pytest.raises(ValueError, match="give n rows of K >= 2"):
            relevance_from_votes(scores)


SCORES = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1, max_size=5)
)
NO_TIES = st.integers(2, 6).flatmap(lambda k: st.lists(st.permutations(range(k)), min_size=1, max_size=5))


@CHECKED
@given(NO_TIES)
def test_vote_shares_sum_to_half_the_images_without_ties(scores):
    assert sum(relevance_from_votes(scores)) == pytest.approx(len(scores[0]) / 2)


@CHECKED
@given(SCORES, st.randoms(use_true_random=False))
def test_vote_shares_move_with_the_images_and_ignore_the_order_of_scorers(scores, random):
    order = list(range(len(scores[0])))
    random.shuffle(order)
    moved = [[row[k] for k in order] for row in scores]
    random.shuffle(moved)
    before = relevance_from_votes(scores)
    assert relevance_from_votes(moved) == tuple(before[k] for k in order)
    assert all(0 <= phi <= 1 for phi in before)
    assert sum(before) <= len(order) / 2 + 1e-9


@CHECKED
@given(SCORES, st.floats(0.1, 100), NUMBERS)
def test_only_the_order_within_a_scorer_counts(scores, scale, shift):
    assert relevance_from_votes([[s * scale + shift for s in row] for row in scores]) == (
        relevance_from_votes(scores)
    )


@CHECKED
@given(st.lists(NUMBERS, min_size=2, max_size=6))
def test_scaled_scores_keep_the_order_within_zero_and_one(scores):
    scaled = relevance_from_scores(scores)
    assert all(0 <= s <= 1 for s in scaled)
    for a, b in permutations(range(len(scores)), 2):
        assert scaled[a] >= scaled[b] or scores[a] < scores[b]


def test_all_pairs_come_with_the_gap_as_margin():
    pairs = all_pairs(listed((0.5, 1.0, 0.25), group="anna"))
    found = {names([p])[0]: (p.margin, p.kind, p.relevance, p.group, p.prompt, p.source) for p in pairs}
    rest = ("pair", (1.0, 0.0), "anna", "p", "l:1")
    assert found == {(1, 0): (0.5, *rest), (1, 2): (0.75, *rest), (0, 2): (0.25, *rest)}


def test_best_worst_and_adjacent_pairs_of_a_list_with_ties():
    grades = (1.0, 0.0, 0.5, 1.0, 0.5)
    assert names(best_worst_pairs(listed(grades))) == [(0, 1), (3, 1)]
    assert names(adjacent_pairs(listed(grades))) == [(0, 2), (0, 4), (2, 1), (3, 2), (3, 4), (4, 1)]
    assert len(all_pairs(listed(grades))) == 10 - 2


def test_adjacent_pairs_of_a_strict_ranking_are_its_neighbours():
    assert names(adjacent_pairs(listed(relevance_from_ranking([2, 4, 1, 3])))) == [(0, 3), (2, 0), (3, 1)]


WAYS = [all_pairs, best_worst_pairs, adjacent_pairs]


@pytest.mark.parametrize("way", WAYS)
def test_ties_give_no_pair_and_single_images_are_refused(way):
    assert way(listed((0.4, 0.4, 0.4))) == ()
    with pytest.raises(ValueError, match="l:1: one image makes no pair"):
        way(listed((1.0,)))


@pytest.mark.parametrize("way", WAYS)
def test_two_images_reduce_to_the_pair(way):
    pair = paired(1, 0, strength=0.7, margin=3.0)
    assert way(pair) == (pair,)
    graded = way(listed((0.25, 0.75)))
    assert names(graded) == [(1, 0)]
    assert graded[0].margin == 0.5
    voted = listed(relevance_from_votes([[1, 2], [5, 9]]))
    assert voted.kind == "pair"
    assert names([voted]) == [(1, 0)]
    assert way(voted) == (voted,)


@CHECKED
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=6),
    st.randoms(use_true_random=False),
    st.sampled_from(WAYS),
)
def test_pairs_do_not_depend_on_the_order_of_the_list(grades, random, way):
    order = list(range(len(grades)))
    random.shuffle(order)
    moved = way(listed([grades[k] for k in order], order))
    assert {p.id for p in moved} == {p.id for p in way(listed(grades))}
    for pair in moved:
        better, worse = (grades[int(image.name[-1])] for image in pair.images)
        assert pair.margin == better - worse > 0


@CHECKED
@given(st.permutations(range(5)))
def test_a_list_made_of_all_pairs_of_a_ranking_has_its_grades(ranking):
    record = listed(relevance_from_ranking(ranking))
    (back,) = lists_from_pairs(all_pairs(record))
    assert {i.name: r for i, r in zip(back.images, back.relevance, strict=True)} == {
        i.name: r for i, r in zip(record.images, record.relevance, strict=True)
    }


def test_lists_from_pairs_count_wins_by_comparisons_and_keep_prompts_apart():
    """Wins: image 0 has 1 + 0.75 of 2, image 1 has 0 + 1 + 0.25 of 3, image 2 has 0 of 1."""
    pairs = [
        paired(0, 1, group="anna"),
        paired(3, 4, prompt="q", group="ben"),
        paired(1, 2, group="anna"),
        paired(0, 1, strength=0.75, group="anna"),
    ]
    first, second = lists_from_pairs(pairs)
    assert [image.name for image in first.images] == ["image 0", "image 1", "image 2"]
    assert first.relevance == pytest.approx((1.75 / 2, 1.25 / 3, 0.0))
    assert (first.group, first.prompt, first.source, first.kind) == ("anna", "p", "p:1", "list")
    assert second == pairs[1]


def test_lists_from_pairs_know_an_image_by_its_bytes():
    again = source(IMAGES[0].read(), "under another name")
    other = make_record(source="p:2", prompt="p", images=(again, IMAGES[2]), relevance=(1, 0), group="ben")
    (record,) = lists_from_pairs([paired(0, 1, group="anna"), other])
    assert [image.name for image in record.images] == ["image 0", "image 1", "image 2"]
    assert record.relevance == (1.0, 0.0, 0.0)
    assert record.group is None


def test_a_pair_of_one_picture_under_two_names_compares_nothing(tmp_path):
    for name in "xy":
        (tmp_path / name).write_bytes(IMAGES[0].read())
    twins = tuple(ImageSource(name, path=tmp_path / name) for name in "xy")
    same = make_record(source="p:2", prompt="p", images=twins, relevance=(1, 0))
    (record,) = lists_from_pairs([same, paired(0, 1), paired(0, 2)])
    assert record.relevance == (1.0, 0.0, 0.0)
    assert list(lists_from_pairs([same, same])) == []


def test_opposite_pairs_make_a_tie():
    (record,) = lists_from_pairs([paired(0, 1), paired(1, 0)])
    assert record.relevance == (0.5, 0.5)
    assert record.is_tie


def test_lists_are_made_from_pairs_only_and_hold_a_limited_number(monkeypatch):
    with pytest.raises(ValueError, match="l:1 is a list; lists are made from pairs"):
        list(lists_from_pairs([listed((0.1, 0.2, 0.3))]))
    monkeypatch.setattr("triptych.modalities.diffusion.ranking.MAX_CANDIDATES", 2)
    with pytest.raises(ValueError, match="has 3 images; a list holds 2"):
        list(lists_from_pairs([paired(0, 1), paired(1, 2)]))
