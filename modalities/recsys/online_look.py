"""What an alignment run looks at and writes down: answers to requests that it never learns from.

Answers to the judge users' requests are kept as files, so that who judges them later has had no part in the
training, and the training none in the judging.

Shapes: N requests, W beams, S draws of one, m items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.modalities.recsys.beams import Beams, beam_search, joined
from triptych.modalities.recsys.online import OnlineConfig, OnlineRun
from triptych.modalities.recsys.requests import Request, Shown, logged_requests, seeds_of
from triptych.modalities.recsys.session_judges import JUDGES
from triptych.modalities.recsys.session_sources import search
from triptych.modalities.recsys.stochastic import sampled
from triptych.training.atomic import write_json, write_synced
from triptych.training.groups import Group, scores_of
from triptych.training.judging import build_judge, judged
from triptych.training.order import key
from triptych.training.references import unchanged
from triptych.training.stages import Judge, Live
from triptych.training.stats import Estimate, paired_difference

ANSWERS, ALARM = "answers", "alarm.json"


class HackingAlarm(RuntimeError):
    """The reward that trains goes up while a judge that does not train goes down."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """A policy's sessions for some requests.

    row_N: rows of the logs' judge part. served_NWm: by beam search, likeliest first, -1 where there is none;
    logp_NW. drawn_NSm: samples; kl_NS: log policy - log base of each, whose mean estimates KL(policy || base)
    in nats a session. reward_NW, reward_NS: by the recipe's judge, NaN without one.
    """

    row_N: Tensor
    served_NWm: Tensor
    logp_NW: Tensor
    drawn_NSm: Tensor
    kl_NS: Tensor
    reward_NW: Tensor
    reward_NS: Tensor

    def write(self, path: Path) -> None:
        """One file of tensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        tensors = {name: getattr(self, name).contiguous() for name in self.__slots__}
        write_synced(temporary, lambda to: save_file(tensors, to))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Answers:
        """What `write` wrote; ValueError naming the file otherwise."""
        try:
            return cls(**load_file(path))
        except (OSError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: holds no answers: {' '.join(str(error).split())}") from None


class Looker:
    """Answers requests of the logs' judge users, and watches a reward on those of its validation users."""

    def __init__(self, run: OnlineRun, config: OnlineConfig, *, device: torch.device):
        self.run, self.config, self.device = run, config, device
        settings = config.evaluation
        owners_U = run.base.owners(run.events.users)
        names = run.events.users
        self.rows, self.requests = logged_requests(
            run.logs.of("judge"), names, owners_U, most=settings.requests
        )
        self.judge = next((p.judge for p in run.rounds.stages[-1].parts if p.judge is not None), None)
        if self.judge is None and config.judge is not None:
            # The control without a preference loss is measured like the others.
            self.judge = build_judge(config.judge, JUDGES)
        self.alarm: Judge | None = None
        self.watched: list[Request] = []
        if settings.alarm is not None:
            if self.judge is None:
                raise ValueError("evaluation.alarm watches the recipe's own reward, and there is no judge")
            self.alarm = build_judge(settings.alarm, JUDGES)
        if self.judge is not None:
            _, self.watched = logged_requests(
                run.logs.of("validation"), names, owners_U, most=settings.alarm_requests
            )

    def answers(self, policy: nn.Module) -> Answers:
        """The policy's sessions for the judge users' requests."""
        beams, drawn = self._beams(policy, self.requests), self._drawn(policy, self.requests)
        return Answers(
            row_N=torch.tensor(self.rows),
            served_NWm=beams.items_UWm,
            logp_NW=beams.logp_UW,
            drawn_NSm=drawn.items_UWm,
            kl_NS=self._log_ratio(policy, drawn.items_UWm),
            reward_NW=self._reward(self.judge, self.requests, beams.items_UWm),
            reward_NS=self._reward(self.judge, self.requests, drawn.items_UWm),
        )

    def metrics(self, policy: nn.Module, folder: Path, step: int, *, main: bool) -> dict[str, float]:
        """Write the answers down; the reward on validation users and the KL. HackingAlarm, see `_watch`."""
        found = self.answers(policy)
        if main:
            found.write(answers_path(folder, step))
        values = {"kl": float(found.kl_NS.mean())}
        if self.judge is None or not self.watched:
            return values
        beams = self._beams(policy, self.watched)
        reward_N = self._reward(self.judge, self.watched, beams.items_UWm)[:, 0]
        values["reward"] = float(reward_N.nanmean())
        if self.alarm is not None:
            alarm_N = self._reward(self.alarm, self.watched, beams.items_UWm)[:, 0]
            values["held_out/alarm"] = float(alarm_N.nanmean())
            self._watch(reward_N, alarm_N, folder, step, main=main)
        return values

    def _watch(self, reward_N: Tensor, alarm_N: Tensor, folder: Path, step: int, *, main: bool) -> None:
        """HackingAlarm when, since the start, the reward is up and the other judge down, both beyond 95 %."""
        path = folder / ANSWERS / ALARM
        now = {"reward": reward_N.tolist(), "alarm": alarm_N.tolist()}
        if not path.is_file():
            if main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, now)
            return
        start = json.loads(path.read_text("utf-8"))
        clusters = [r.user for r in self.watched]
        change: dict[str, Estimate] = {
            name: paired_difference(
                torch.tensor(start[name]), torch.tensor(now[name]), seed=0, clusters=clusters
            )
            for name in now
        }
        if change["reward"].low > 0 and change["alarm"].high < 0:
            raise HackingAlarm(
                f"at step {step} the reward is {change['reward']:.3f} above the start and the held-out "
                f"judge {change['alarm']:.3f}: what is learnt is the reward model's error; stopped here"
            )

    def _beams(self, policy: nn.Module, requests: Sequence[Request]) -> Beams:
        def how(decoding: Any, trie: Any, *, requests: Sequence[Request], **where: Any) -> Beams:
            return beam_search(decoding, trie, width=self.config.evaluation.width, **where)

        size = self.config.evaluation.batch_size
        return joined(search(policy, self.run.port, requests, how, batch_size=size))

    def _drawn(self, policy: nn.Module, requests: Sequence[Request]) -> Beams:
        settings = self.config.evaluation

        def how(decoding: Any, trie: Any, *, requests: Sequence[Request], **where: Any) -> Beams:
            # The same noise for every policy: what differs between their draws is the weights.
            seeds = seeds_of(requests, "look", self.config.run.seed).to(trie.paths.device)
            return sampled(decoding, trie, num=settings.draws, seeds=seeds, **where).beams

        return joined(search(policy, self.run.port, requests, how, batch_size=settings.batch_size))

    @torch.no_grad()
    def _log_ratio(self, policy: nn.Module, items_NSm: Tensor) -> Tensor:
        """log policy - log base of every session, [N, S]."""
        port, frozen, found = self.run.port, self.run.rounds.frozen, []
        size = self.config.evaluation.batch_size
        with unchanged(policy):
            for start in range(0, len(items_NSm), size):
                block = zip(self.requests[start : start + size], items_NSm[start : start + size], strict=True)
                items = [(r, [Shown(items=s) for s in sessions]) for r, sessions in block]
                batch = port.collate(items).to(self.device)
                terms = port.terms(policy, batch) - frozen(port, policy, batch)
                found.append(terms.sum(-1).view(-1, items_NSm.shape[1]).float().cpu())
        return torch.cat(found)

    def _reward(self, judge: Judge | None, requests: Sequence[Request], items_NWm: Tensor) -> Tensor:
        """The judge's score of every session, [N, W]; NaN where there is no session or no judge."""
        found = torch.full(items_NWm.shape[:2], torch.nan)
        if judge is None:
            return found
        there_NW = items_NWm[..., 0] >= 0
        groups = [
            Group(
                key=r.key,
                context=r,
                candidates=tuple(Shown(items=s) for s in sessions[there]),
                mask=torch.ones(int(there.sum()), 1, dtype=torch.bool),
                origin=("policy",) * int(there.sum()),
            )
            for r, sessions, there in zip(requests, items_NWm, there_NW, strict=True)
        ]
        for row, there, group in zip(found, there_NW, judged(judge, groups, self._live()), strict=True):
            row[there] = scores_of(group)
        return found

    def _live(self) -> Live:
        """A round of its own for judges, which leaves no memory behind."""
        return Live(
            policy=self.run.policy,
            port=self.run.port,
            references={"frozen": self.run.rounds.frozen},
            device=self.device,
            seed=key("look", self.config.run.seed),
        )


def answers_path(folder: Path, step: int) -> Path:
    """Where the answers of a step are."""
    return folder / ANSWERS / f"step-{step:08d}.safetensors"


def all_answers(folder: Path) -> Mapping[int, Path]:
    """Files of answers by step, rising; ValueError when a run left none."""
    found = {
        int(p.stem.removeprefix("step-")): p for p in sorted((folder / ANSWERS).glob("step-*.safetensors"))
    }
    if not found:
        raise ValueError(f"{folder / ANSWERS}: no answers; give the folder of an alignment run")
    return found
