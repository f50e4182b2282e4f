"""Recommend from an exported model alone, for a history of items.

    python scripts/recommend.py --model runs/x/model --history 50,172,181
    python scripts/recommend.py --model runs/x/model --histories users.jsonl --output recommended.jsonl

users.jsonl holds one {"user": name, "history": [item, ...]} a line, oldest first. A session model recommends
sessions of `session_items` items; unknown items are left out, and said. A model that looks users up knows
those it was trained on by name; with --history, --user names one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.modalities.recsys.exported import Recommender, load
from triptych.modalities.recsys.ranked import RankingConfig, ranked_items, sessions_of
from triptych.modalities.recsys.trie import Trie
from triptych.scripts.common import errors_in_one_line, parse, progress, quiet_libraries
from triptych.training.quarantine import DataError, Quarantine


@dataclass(frozen=True, kw_only=True)
class Config:
    """model: an exported folder. num: recommendations a user. width: beams; what is below is not found."""

    model: str
    history: str | None = None
    histories: str | None = None
    user: str = ""
    output: str | None = None
    num: int = 10
    session_items: int = 1
    width: int = 50
    mask_seen: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        if (self.history is None) == (self.histories is None):
            raise ValueError(
                "give either --history (item names, separated by commas) or --histories (a file)"
            )
        if not 1 <= self.num <= self.width:
            raise ValueError(f"num={self.num} must be from 1 to width={self.width}")
        if self.session_items < 1:
            raise ValueError(f"session_items={self.session_items} must be at least 1")


def run(config: Config) -> int:
    """Recommend; returns the exit code."""
    made, quarantine = load(Path(config.model)), Quarantine()
    asked = _asked(config, quarantine)
    rows, unknown = [], 0
    for _, names in asked:
        numbers, odd = made.numbers(names)
        rows.append(torch.tensor(numbers, dtype=torch.int64))
        unknown += len(odd)
        if odd and config.history is not None:
            print(f"left out, not in the catalogue: {', '.join(odd[:5])}", file=sys.stderr)
    if unknown:
        print(f"{unknown} items of histories are not in the catalogue and were left out", file=sys.stderr)
    found = _recommended(made, rows, [user for user, _ in asked], config)
    lines = [
        {
            "user": user,
            "recommended": [
                {
                    "items": [made.items[i] for i in session],
                    "titles": [made.titles[i] for i in session],
                }
                | ({} if logp is None else {"logp": round(logp, 4)})
                for session, logp in one
            ],
        }
        for (user, _), one in zip(asked, found, strict=True)
    ]
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        print(f"{len(lines)} users; written to {config.output}", file=sys.stderr)
    else:
        for line in lines:
            _show(line, titled=len(lines) > 1)
    if quarantine.total:
        print(quarantine.summary(), file=sys.stderr)
    return 0


def _recommended(
    made: Recommender, rows: Sequence[torch.Tensor], users: Sequence[str], config: Config
) -> list[list[tuple[list[int], float | None]]]:
    """Sessions of item numbers and their log-probs, best first, for every history."""
    if made.ids is None:
        if config.session_items != 1:
            raise ValueError(f"this model recommends single items: session_items={config.session_items}")
        ranking = RankingConfig(ks=[config.num], width=config.width, mask_seen=config.mask_seen)
        items = ranked_items(made.policy, None, rows, ranking, window=made.window)
        return [[([i], None) for i in row if i >= 0] for row in items.tolist()]
    with progress("users", enabled=len(rows) > config.batch_size)(len(rows), 0) as bar:
        beams = sessions_of(
            made.policy,  # type: ignore[arg-type]
            Trie.of(made.ids.codes_IL, made.ids.sizes),
            rows,
            width=config.width,
            num_items=config.session_items,
            forbidden=list(rows) if config.mask_seen else None,
            window=made.window,
            batch_size=config.batch_size,
            owners=made.owners(users),
            progress=bar.update,
        )
    pairs = zip(
        beams.items_UWm[:, : config.num].tolist(), beams.logp_UW[:, : config.num].tolist(), strict=True
    )
    return [[(s, p) for s, p in zip(*pair, strict=True) if min(s) >= 0] for pair in pairs]


def _asked(config: Config, quarantine: Quarantine) -> list[tuple[str, list[str]]]:
    if config.history is not None:
        return [(config.user, [name.strip() for name in config.history.split(",") if name.strip()])]
    path = Path(config.histories or "")
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row: Any = json.loads(line)
            found.append((str(row["user"]), [str(name) for name in row["history"]]))
        except (ValueError, KeyError, TypeError):
            remedy = 'write {"user": "a", "history": ["item", ...]}'
            quarantine.add(
                DataError("is not a history", source=f"{path}:{number}", remedy=remedy, preview=line)
            )
    if not found:
        raise DataError("holds no history", source=str(path), remedy=quarantine.summary())
    return found


def _show(line: dict[str, Any], *, titled: bool) -> None:
    if titled:
        print(line["user"])
    for place, one in enumerate(line["recommended"], start=1):
        score = f"  {one['logp']:.2f}" if "logp" in one else ""
        print(f"{place:>3}. {' | '.join(one['titles'])}{score}")


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="recommend", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
