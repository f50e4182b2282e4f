import io
import math

import numpy as np
import pytest
from PIL import Image

from triptych.modalities.diffusion.labelling import (
    NEAR,
    NO_MAJORITY,
    OTHERS,
    SPLIT,
    TIE,
    Labelling,
    Preference,
    Shown,
    agreement,
    agreements,
    figure,
    graded,
    grades,
    mean_z,
    preferences,
    sheet,
    spreads,
)

# Three scorers on four pictures. Wins against the three others, by scorer:
#   a: 3 2 1 0     b: 2 3 0 1     c: 1 0 2 2 (pictures 2 and 3 tie, which nobody wins)
# phi = (6, 5, 3, 3) / 9.
SCORES = {"a": (9.0, 7.0, 5.0, 1.0), "b": (0.3, 0.4, 0.1, 0.2), "c": (20.0, 10.0, 30.0, 30.0)}


def places(found):
    return [(one.better, one.worse) for one in found]


def test_grades_by_votes_are_the_shares_of_wins():
    assert grades(SCORES, "votes") == pytest.approx((6 / 9, 5 / 9, 3 / 9, 3 / 9))


def test_agreement_is_the_share_of_scorers_and_a_tie_counts_half():
    assert agreement(SCORES, 0, 1) == pytest.approx(2 / 3)
    assert agreement(SCORES, 1, 0) == pytest.approx(1 / 3)
    # a says 2, b says 3, c ties.
    assert agreement(SCORES, 2, 3) == agreement(SCORES, 3, 2) == 0.5


def test_spread_is_that_within_lists():
    # Deviations of a: +-1 and +-2, of b: +-0.5 and 0; one degree of freedom a list.
    lists = [{"a": (1.0, 3.0), "b": (0.0, 1.0)}, {"a": (104.0, 100.0), "b": (7.0, 7.0)}]
    assert spreads(lists) == pytest.approx({"a": math.sqrt((2 + 8) / 2), "b": math.sqrt(0.5 / 2)})


def test_mean_z_weighs_scorers_equally_whatever_their_units():
    scores = {"a": (1.0, 3.0), "b": (500.0, 100.0)}
    # a: -1/2 and +1/2, b: +200/400 and -200/400: they cancel.
    assert mean_z(scores, {"a": 2.0, "b": 400.0}) == pytest.approx((0, 0))
    assert mean_z(scores, {"a": 1.0, "b": 400.0}) == pytest.approx((-0.25, 0.25))
    assert mean_z(scores, {"a": 1.0, "b": 0.0}) == pytest.approx((-0.5, 0.5))
    with pytest.raises(ValueError, match="by=mean needs each scorer's spread"):
        grades(scores, "mean")


def test_best_and_worst_by_votes_with_their_margin_and_agreement():
    kept, dropped = preferences(SCORES, Labelling())
    assert dropped == []
    # Of the equal worst ones the last; 0 beats 3 with a and b.
    assert kept == [Preference(0, 3, pytest.approx(1 / 3), pytest.approx(2 / 3))]


def test_all_pairs_leave_out_ties_and_what_no_majority_prefers():
    kept, dropped = preferences(SCORES, Labelling(pairs="all"))
    assert places(kept) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert [one.margin for one in kept] == pytest.approx([1 / 9, 3 / 9, 3 / 9, 2 / 9, 2 / 9])
    assert [(places([one])[0], reason) for one, reason in dropped] == [((2, 3), TIE)]


def test_a_pair_that_votes_and_majority_see_differently_is_dropped():
    # Four of seven put 0 before 1, but it is last for the other three: 8 wins against 10.
    scores = {str(m): (3, 2, 1) for m in range(4)} | {str(m): (1, 3, 2) for m in range(4, 7)}
    assert grades(scores, "votes") == pytest.approx((8 / 14, 10 / 14, 3 / 14))
    kept, dropped = preferences(scores, Labelling(pairs="all"))
    assert places(kept) == [(1, 2), (0, 2)]
    assert dropped == [(Preference(1, 0, pytest.approx(2 / 14), pytest.approx(3 / 7)), NO_MAJORITY)]


def test_margin_and_agreement_are_lower_bounds_that_rounding_does_not_move():
    # 6/9 - 3/9 is a hair away from 1/3.
    assert len(preferences(SCORES, Labelling(pairs="all", min_margin=1 / 3))[0]) == 2
    kept, dropped = preferences(SCORES, Labelling(pairs="all", min_margin=0.34))
    assert (kept, {reason for _, reason in dropped}) == ([], {NEAR, TIE})
    # 0.6 - 0.4 is less than 0.2 in floating point.
    assert len(preferences({"a": (0.6, 0.4)}, Labelling(by="a", min_margin=0.2))[0]) == 1
    five = {str(m): (1.0, 0.0) if m < 3 else (0.0, 1.0) for m in range(5)}
    assert len(preferences(five, Labelling(min_agreement=0.6))[0]) == 1
    kept, dropped = preferences(five, Labelling(min_agreement=0.61))
    assert (kept, [reason for _, reason in dropped]) == ([], [SPLIT])


def test_one_scorer_or_the_mean_may_decide_against_the_majority():
    scores = {"a": (5.0, 1.0), "b": (0.0, 0.1), "c": (0.0, 0.1)}
    for by in ("a", "mean"):
        kept, _ = preferences(scores, Labelling(by=by), scales={"a": 1.0, "b": 1.0, "c": 1.0})
        assert places(kept) == [(0, 1)]
        assert kept[0].agreement == pytest.approx(1 / 3)
    assert preferences(scores, Labelling(by="a"))[0][0].margin == 4.0
    assert places(preferences(scores, Labelling(by="votes"))[0]) == [(1, 0)]
    assert [r for _, r in preferences(scores, Labelling(by="a", min_agreement=0.5))[1]] == [SPLIT]


def test_a_random_pair_depends_on_the_lists_name_alone_and_reaches_every_pair():
    rule = Labelling(by="a", pairs="random")
    scores, turned = {"a": (4.0, 3.0, 2.0, 1.0)}, {"a": (1.0, 2.0, 3.0, 4.0)}
    found = [places(preferences(scores, rule, name=str(i))[0])[0] for i in range(200)]
    assert {tuple(sorted(pair)) for pair in found} == {(i, j) for j in range(4) for i in range(j)}
    assert all(better < worse for better, worse in found)
    # Other scores turn the same pairs around.
    other = [places(preferences(turned, rule, name=str(i))[0])[0] for i in range(200)]
    assert other == [(worse, better) for better, worse in found]
    assert found != [
        places(preferences(scores, Labelling(by="a", pairs="random", seed=1), name=str(i))[0])[0]
        for i in range(200)
    ]


def test_a_list_keeps_its_grades_and_is_judged_by_its_ends():
    relevance, ends, reason = graded(SCORES, Labelling(form="lists"))
    assert relevance == pytest.approx((6 / 9, 5 / 9, 3 / 9, 3 / 9))
    assert (ends.better, ends.worse, reason) == (0, 3, "")
    # Scores of one scorer are scaled within the list, since gains 2^relevance want them in [0, 1].
    relevance, ends, reason = graded(SCORES, Labelling(form="lists", by="c", min_margin=20))
    assert relevance == (0.5, 0.0, 1.0, 1.0)
    assert (ends, reason) == (Preference(2, 1, 20.0, pytest.approx(1 / 3)), "")
    assert graded(SCORES, Labelling(form="lists", min_margin=0.5))[2] == NEAR
    assert graded(SCORES, Labelling(form="lists", min_agreement=0.7))[2] == SPLIT
    assert graded({"a": (1, 1, 1)}, Labelling(form="lists"))[2] == TIE


def test_agreement_of_scorers_is_the_mean_kendall_over_lists():
    # a and b: same order in one list, opposite in the other; c follows a.
    lists = [
        {"a": (1.0, 2.0, 3.0), "b": (1.0, 2.0, 3.0), "c": (0.0, 5.0, 6.0)},
        {"a": (1.0, 2.0, 3.0), "b": (3.0, 2.0, 1.0), "c": (0.0, 5.0, 6.0)},
    ] * 3
    found = agreements(lists)
    assert found["a", "b"].mean == pytest.approx(0)
    assert found["a", "c"].mean == pytest.approx(1)
    # The votes of a and c against b; those of b and c tie everything in the second list, which counts 0.
    assert found["b", OTHERS].mean == pytest.approx(0)
    assert found["a", OTHERS].mean == pytest.approx(0.5)
    assert (found["a", "b"].n, found["a", "b"].low < 0 < found["a", "b"].high) == (6, True)
    assert len(found) == 6
    assert agreements(lists, most=3)["a", "c"].n == 3
    assert agreements([{"a": (1.0, 2.0)}]) == {}
    assert agreements([]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "pair"}, "form=pair is not one of pairs, lists"),
        ({"pairs": "adjacent"}, "pairs=adjacent is not one of best_worst, all, random"),
        ({"min_margin": -1.0}, "min_margin=-1.0 must be 0 or positive"),
        ({"min_margin": math.nan}, "min_margin=nan"),
        ({"min_margin": 1.5}, "min_margin=1.5: grades by votes are in"),
        ({"min_agreement": 60.0}, "min_agreement=60.0 is a share"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Labelling(**settings)


def test_who_decides_must_be_a_scorer_that_is_there():
    Labelling(by="clip").check(["clip", "aesthetic"])
    with pytest.raises(ValueError, match="by=hps is not one of votes, mean, clip"):
        Labelling(by="hps").check(["clip"])
    with pytest.raises(ValueError, match="cannot be called 'votes'"):
        Labelling().check(["votes"])


def test_scores_of_different_lengths_are_refused():
    for scores in ({"a": (1.0, 2.0), "b": (1.0,)}, {"a": (1.0,)}, {}):
        with pytest.raises(ValueError, match="one score for each of two or more pictures"):
            preferences(scores, Labelling())


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_sheet_puts_the_winner_of_the_votes_first():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [Image.new("RGB", (8, 8), colour) for colour in colours]
    scores = {"a": (1.0, 3.0, 2.0), "b": (1.0, 2.0, 3.0), "c": (1.0, 3.0, 2.0)}
    lists = [Shown("a cat", images, scores, "1 kept"), Shown("a dog", images[:2], {"a": (1.0, 2.0)}, "")]
    data = sheet(lists)
    assert data == sheet(lists)
    pixels = opened(data)
    # From left to right: green, blue, red in the first row, green and red in the second.
    first, second = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]

    def columns(part, colour):
        return np.flatnonzero((part == colour).all(-1).any(0))

    green, blue, red = (columns(first, colours[i]) for i in (1, 2, 0))
    assert green.max() < blue.min() <= blue.max() < red.min()
    assert columns(second, colours[1]).max() < columns(second, colours[0]).min()
    assert columns(second, colours[2]).size == 0
    # Text stands below the pictures.
    bottom = np.flatnonzero((first == colours[1]).all(-1).any(1)).max()
    assert (first[bottom + 2 : bottom + 40, green.min() : green.max()] < 128).any()


def test_the_figure_is_the_same_each_time_and_needs_no_second_scorer():
    lists = [{"a": (1.0, 2.0, 3.0), "b": (1.0, 3.0, 2.0)}] * 4
    settings = {"kept": [0.2, 0.4], "dropped": [0.1], "unit": "phi", "min_margin": 0.15}
    both = figure(agreements(lists), **settings)
    assert both == figure(agreements(lists), **settings)
    alone = figure({}, **settings)
    assert opened(alone).shape[1] < opened(both).shape[1]
    assert opened(figure({}, kept=[], dropped=[0.0], unit="phi", min_margin=0)).size
