"""Seven expert features of an opinion summary of reviews, without a language model (2402.15473, section 3).

The paper has a language model grade each feature; its prompts and code are not public. Here each is a rule
over words, sentences and a sentiment lexicon that measures the same thing more roughly, so a reward trained
on these does not reproduce the paper's. All are in [0, 1]; the reward learns which direction is good.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from triptych.training.quarantine import DataError

Sentiment = Callable[[Sequence[str]], list[float]]
FEATURES = (
    "aspect coverage",
    "opinion faithfulness",
    "opinion coverage",
    "conciseness",
    "relevance",
    "hallucination",
    "language correctness",
)
# A sentence whose sentiment is nearer to 0 than this holds no opinion (VADER's own threshold).
_NEUTRAL = 0.05
_MAX_ASPECTS = 20
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_STOP_WORDS = """
a about after all also am an and any are as at be because been but by can could did do does for from get
got had has have he her him his i if in into is it it's its i'm i've just like me more most much my no not
of on one only or other our out over really she so some such than that the their them then there these they
this those to too up us very was we were what when which while who will with would you your
"""
_STOP = frozenset(_STOP_WORDS.split())


def review_features(reviews: Sequence[str], summary: str, *, sentiment: Sentiment) -> tuple[float, ...]:
    """The seven numbers, in the order of FEATURES.

    An aspect is a content word of at least two reviews (of one, where there is only one), the 20 most
    frequent. An opinion is an aspect in a sentence that is positive or negative; the reviews' opinion of an
    aspect is the sign of its sentences' mean sentiment. The features are
    - aspect coverage: share of the aspects that the summary names
    - opinion faithfulness: share of the summary's opinions that the reviews share, 1 without any
    - opinion coverage: share of the reviews' opinions that the summary gives
    - conciseness: different content words over all words
    - relevance: cosine of the log1p of both sides' content word counts
    - hallucination: share of the summary's content words that no review has
    - language correctness: share of the sentences that begin with a capital or digit, end with a mark and
      repeat no word at once.
    sentiment: texts to [-1, 1], such as `rewards.vader()`. ValueError for no review or no word.
    """
    words = _WORD.findall(summary.lower())
    if not words or not any(_WORD.search(r.lower()) for r in reviews):
        raise ValueError("a summary and its reviews need at least one word each")
    content = [w for w in words if w not in _STOP]
    in_reviews = [[w for w in _WORD.findall(r.lower()) if w not in _STOP] for r in reviews]
    known = {w for review in in_reviews for w in review}
    aspects = _aspects(in_reviews)
    theirs = _opinions(reviews, aspects, sentiment)
    ours = _opinions([summary], aspects, sentiment)
    agreed = sum(theirs.get(a) == sign for a, sign in ours.items())
    return (
        _share(sum(a in set(content) for a in aspects), len(aspects), empty=0.0),
        _share(agreed, len(ours), empty=1.0),
        _share(agreed, len(theirs), empty=0.0),
        len(set(content)) / len(words),
        _cosine(Counter(content), Counter(w for review in in_reviews for w in review)),
        _share(sum(w not in known for w in content), len(content), empty=0.0),
        _correctness(summary),
    )


def review_rows(rows: Iterable[tuple[str, object]], sentiment: Sentiment) -> Iterator[tuple[str, object]]:
    """Rows {reviews, chosen, rejected} of texts as pairs of feature vectors; others as a `DataError`."""
    for place, row in rows:
        if isinstance(row, DataError) or not isinstance(row, Mapping):
            yield place, row
            continue
        reviews, sides = row.get("reviews"), {name: row.get(name) for name in ("chosen", "rejected")}
        listed = isinstance(reviews, (list, tuple)) and all(isinstance(r, str) for r in reviews)
        if not listed or not all(isinstance(text, str) for text in sides.values()):
            remedy = "give reviews, a list of texts, and the texts chosen and rejected"
            yield place, DataError("is no summary preference", source=place, remedy=remedy, preview=row)
            continue
        assert isinstance(reviews, (list, tuple))
        try:
            vectors = {
                n: list(review_features(reviews, str(t), sentiment=sentiment)) for n, t in sides.items()
            }
        except ValueError as error:
            yield place, DataError("has no words", source=place, remedy=str(error))
            continue
        rest = {name: row[name] for name in ("margin", "user") if name in row}
        yield place, {"context": row.get("context", "\n".join(reviews)), **rest, **vectors}


def _aspects(in_reviews: Sequence[Sequence[str]]) -> list[str]:
    """Content words of several reviews, the most frequent first, ties in alphabetical order."""
    counts = Counter(w for review in in_reviews for w in set(review))
    least = min(2, len(in_reviews))
    kept = [w for w, n in counts.items() if n >= least]
    return sorted(kept, key=lambda w: (-counts[w], w))[:_MAX_ASPECTS]


def _opinions(texts: Sequence[str], aspects: Sequence[str], sentiment: Sentiment) -> dict[str, int]:
    """Aspect -> sign of the mean sentiment of the sentences that name it, where they hold an opinion."""
    sentences = [s for text in texts for s in _SENTENCE.split(text.strip()) if s]
    values = sentiment(sentences) if sentences else []
    found: dict[str, list[float]] = {}
    for sentence, value in zip(sentences, values, strict=True):
        if abs(value) < _NEUTRAL:
            continue
        for word in set(_WORD.findall(sentence.lower())) & set(aspects):
            found.setdefault(word, []).append(value)
    means = {aspect: sum(vs) / len(vs) for aspect, vs in found.items()}
    return {aspect: 1 if mean > 0 else -1 for aspect, mean in means.items() if abs(mean) >= _NEUTRAL}


def _share(part: int, whole: int, *, empty: float) -> float:
    return part / whole if whole else empty


def _cosine(left: Mapping[str, int], right: Mapping[str, int]) -> float:
    a, b = ({w: math.log1p(n) for w, n in counts.items()} for counts in (left, right))
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(v * b.get(w, 0.0) for w, v in a.items()) / norm if norm else 0.0


def _correctness(summary: str) -> float:
    sentences = [s for s in _SENTENCE.split(summary.strip()) if s]

    def right(sentence: str) -> bool:
        words = _WORD.findall(sentence.lower())
        repeats = any(a == b for a, b in pairwise(words))
        return (sentence[0].isupper() or sentence[0].isdigit()) and sentence[-1] in ".!?" and not repeats

    return sum(map(right, sentences)) / len(sentences)
