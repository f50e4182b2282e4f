"""Where a training script works: its processes, its run folder, its reports."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from triptych.scripts.common import as_dict, progress, save_config
from triptych.training.config import OptimConfig, RunConfig, flat
from triptych.training.logs import Progress
from triptych.training.quarantine import Quarantine


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """A run's accelerator, folder and quarantine; the first process alone speaks and writes."""

    accelerator: Accelerator
    folder: Path
    quarantine: Quarantine
    trackers: tuple[str, ...]

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.accelerator.is_main_process

    def report(self, line: str) -> None:
        """One line for the user."""
        if self.main:
            print(line, file=sys.stderr)

    def bar(self, label: str, total: int) -> Progress:
        """A progress bar from nothing."""
        return progress(label, enabled=self.main)(total, 0)

    def keep_first_config(self, config: Any) -> None:
        """Write the configuration of a run that begins.

        Beside checkpoints stands the one they were made with, until the loop has accepted another.
        """
        if self.main and not any((self.folder / "checkpoints").glob("step-*")):
            save_config(config, self.folder)

    def start_trackers(self, config: Any) -> None:
        """Tell the trackers, where there are any, what is run."""
        if self.trackers:
            settings = {name: str(value) for name, value in flat(as_dict(config)).items()}
            self.accelerator.init_trackers("triptych", config=settings)


def open_workplace(optim: OptimConfig, run: RunConfig) -> Workplace:
    """The workplace of a run, with the run's seed set."""
    accelerator = Accelerator(
        mixed_precision="bf16" if optim.precision == "bf16" else "no",
        log_with=list[Any](run.trackers) or None,
    )
    set_seed(run.seed)
    folder = Path(run.output_dir)
    return Workplace(
        accelerator=accelerator,
        folder=folder,
        quarantine=Quarantine(folder / "quarantine.jsonl" if accelerator.is_main_process else None),
        trackers=tuple(run.trackers),
    )
