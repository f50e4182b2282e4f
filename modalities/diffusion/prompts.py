"""Prompts that pictures are drawn of, from files of text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from triptych.training.order import key


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompts that pictures are drawn of: a text file with one a line, or JSON lines with a field `prompt`.

    eval_source: those that are never trained on; without it, eval_share of the others is held out, whichever
    they are by their text. max_prompts: of training, the first in the order of the file.
    """

    source: str
    eval_source: str | None = None
    eval_share: float = 0.1
    max_prompts: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"prompts.eval_share={self.eval_share} must be in [0, 1)")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"prompts.max_prompts={self.max_prompts} must be at least 1")


def prompt_key(text: str) -> str:
    """What a prompt is called in randomness and messages: 16 hex digits of its text's hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, or of JSON lines with a field `prompt`, without empty ones and repeats.

    ValueError naming the file and line of one that cannot be read, or the file when there is none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of prompts")
    lines = path.read_text("utf-8").splitlines()
    if path.suffix in (".jsonl", ".json"):
        lines = [_field(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return found


def _field(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number}: no JSON object with a field 'prompt' ({error})") from None
    if not isinstance(text, str):
        raise ValueError(f"{path}:{number}: prompt is {type(text).__name__}, not a string")
    return text


def read_all_prompts(config: PromptConfig, *, num_held_out: int) -> tuple[list[str], list[str]]:
    """(prompts to train on, prompts to draw held-out pictures of: at most num_held_out)."""
    every = read_prompts(Path(config.source))
    if config.eval_source is not None:
        held_out = read_prompts(Path(config.eval_source))
        kept = set(held_out)
        train = [text for text in every if text not in kept]
    else:
        number = round(config.eval_share * len(every))
        kept = set(sorted(every, key=lambda text: key("held out", text))[:number])
        train = [text for text in every if text not in kept]
        held_out = [text for text in every if text in kept]
    if not train:
        raise ValueError(f"{config.source}: every prompt is held out, and none is left to train on")
    drawn = sorted(held_out, key=lambda text: key("drawn", text))[:num_held_out]
    return train[: config.max_prompts], [text for text in held_out if text in set(drawn)]
