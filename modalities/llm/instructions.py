"""A set of short requests that the project wrote itself: prompts for rewards that can be checked exactly.

Every topic meets every request. Topics are held out whole, so that a held-out prompt is about something
that training never mentioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.modalities.llm.records import Record
from triptych.modalities.llm.turns import Message

_TOPICS = """
bread, rain, trains, bicycles, winter, gardens, tea, coffee, libraries, rivers, cats, dogs, the
sea, mountains, music, chess, painting, football, cooking, bees, apples, the moon, stars,
clouds, schools, markets, bridges, maps, clocks, letters, shoes, hats, chairs, windows, candles,
forests, deserts, islands, snow, summer, autumn, spring, birds, horses, fish, whales, ants,
roses, trees, grass, soup, cheese, rice, honey, salt, sugar, milk, books, newspapers, films,
theatre, dancing, singing, swimming, running, walking, sleeping, dreams, friends, neighbours,
families, cities, villages, farms, harbours, airports, museums, castles, kitchens, attics
"""
TOPICS = tuple(" ".join(_TOPICS.split()).split(", "))
REQUESTS = (
    "Tell me something about {topic}.",
    "What do you think of {topic}?",
    "Why do people like {topic}?",
    "Give me one fact about {topic}.",
    "Describe {topic} to a friend.",
)


@dataclass(frozen=True, kw_only=True)
class InstructionSettings:
    """suffix: what is added to every request, such as a rule of form. eval_topics: topics held out."""

    suffix: str = ""
    eval_topics: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.eval_topics < len(TOPICS):
            valid = f"[1, {len(TOPICS) - 1}]"
            raise ValueError(f"data.instructions.eval_topics={self.eval_topics} must be in {valid}")


def instruction_records(settings: InstructionSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and held-out records, prompts alone; every fourth topic is held out as far as needed."""
    order = [*TOPICS[::4], *TOPICS[1::4], *TOPICS[2::4], *TOPICS[3::4]]
    held = set(order[: settings.eval_topics])
    train = [r for t in TOPICS if t not in held for r in _records(t, settings)]
    return train, [r for t in TOPICS if t in held for r in _records(t, settings)]


def _records(topic: str, settings: InstructionSettings) -> list[Record]:
    texts = [f"{request.format(topic=topic)} {settings.suffix}".strip() for request in REQUESTS]
    return [
        Record(
            prompt=(Message("user", text),),
            candidates=(),
            relevance=(),
            source=f"instructions: {topic}, request {i + 1}",
            tags={"category": topic},
        )
        for i, text in enumerate(texts)
    ]
