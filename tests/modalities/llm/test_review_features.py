import math

import pytest

from triptych.modalities.llm.review_features import FEATURES, review_features, review_rows
from triptych.training.quarantine import DataError

MOOD = {"soft": 0.6, "great": 0.8, "tight": -0.5, "torn": -0.7}


def mood(texts):
    """Sentiment from four words, so that every number can be worked out by hand."""
    return [sum(v for w, v in MOOD.items() if w in t.lower()) for t in texts]


REVIEWS = ["The fabric is soft. The sleeves are tight.", "Soft fabric!", "Sleeves tight. Great price."]


def test_the_features_of_a_summary_are_those_worked_out_by_hand():
    # Aspects: of two reviews each, fabric, sleeves, soft, tight. 'price' and 'great' are in one alone.
    # The reviews find fabric and soft good, sleeves and tight bad.
    summary = "Soft fabric. The zipper is torn again."
    found = dict(zip(FEATURES, review_features(REVIEWS, summary, sentiment=mood), strict=True))
    assert found["aspect coverage"] == 2 / 4
    assert found["opinion faithfulness"] == 1.0
    assert found["opinion coverage"] == 2 / 4
    assert found["conciseness"] == 5 / 7
    assert found["hallucination"] == 3 / 5
    assert found["language correctness"] == 1.0
    # fabric 2, soft 2, sleeves 2, tight 2, great 1, price 1 in the reviews; five words once in the summary.
    theirs = math.sqrt(4 * math.log(3) ** 2 + 2 * math.log(2) ** 2)
    assert found["relevance"] == pytest.approx(2 * math.log(3) / (math.sqrt(5) * theirs))


def test_an_opinion_turned_round_is_not_faithful_and_covers_nothing():
    found = review_features(REVIEWS, "The sleeves are great.", sentiment=mood)
    assert found[1:3] == (0.0, 0.0)


def test_a_summary_that_repeats_itself_is_less_concise_and_less_correct():
    found = review_features(REVIEWS, "soft soft fabric soft fabric", sentiment=mood)
    assert found[3] == 2 / 5
    assert found[6] == 0.0
    halves = ("Soft fabric. Soft soft fabric.", "Soft fabric. soft fabric.", "Soft fabric. Soft fabric")
    assert [review_features(REVIEWS, text, sentiment=mood)[6] for text in halves] == [0.5] * 3


def test_aspects_of_a_single_review_are_its_own_words_and_no_words_are_refused():
    assert review_features(["Soft fabric."], "Soft.", sentiment=mood)[0] == 1 / 2
    with pytest.raises(ValueError, match="at least one word"):
        review_features(REVIEWS, "...", sentiment=mood)


def test_rows_of_texts_become_pairs_of_vectors_and_bad_ones_errors_in_their_place():
    good = {"reviews": REVIEWS, "chosen": "Soft fabric.", "rejected": "Torn zipper.", "margin": 2.0}
    rows = [("a:1", good), ("a:2", good | {"reviews": "x"}), ("a:3", good | {"chosen": "!"}), ("a:4", 5)]
    found = dict(review_rows(iter(rows), mood))
    assert found["a:1"]["chosen"] == list(review_features(REVIEWS, "Soft fabric.", sentiment=mood))
    assert found["a:1"]["margin"] == 2.0
    # Summaries of the same reviews are never on two sides of the split.
    assert found["a:1"]["context"] == "\n".join(REVIEWS)
    assert isinstance(found["a:2"], DataError)
    assert found["a:2"].reason == "is no summary preference"
    assert found["a:3"].reason == "has no words"
    assert found["a:4"] == 5
