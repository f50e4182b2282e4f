"""How benchmarks measure: each case a process of its own with one thread, in CPU seconds and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 4


def run_child(script: str, what: str, **arguments: Any) -> dict[str, Any]:
    """What the case `what` of a benchmark script found, run by `script --child`."""
    payload = json.dumps({"what": what, "with": arguments})
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, script, "--child", payload],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def as_child(payload: str, cases: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Run the case that `run_child` asked for and print what it found."""
    asked = json.loads(payload)
    print(json.dumps(cases[asked["what"]](**asked["with"])))


def measure(make_step: Callable[[], Callable[[], float]], *, num_steps: int = STEPS) -> dict[str, Any]:
    """Losses, least CPU seconds of the steps after the first, and peak memory over what was there before."""
    before = start_of_peak()
    step = make_step()
    losses, seconds = [], []
    for _ in range(num_steps):
        start = time.process_time()
        losses.append(step())
        seconds.append(time.process_time() - start)
    return {"losses": losses, "seconds": min(seconds[1:]), "megabytes": peak() - before}


def start_of_peak() -> float:
    """Memory now in MiB, and from here on `peak` counts: the imports' own peak is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """Highest memory in MiB since `start_of_peak`."""
    return _status("VmHWM")


def say(title: str, **values: str) -> None:
    """One line of results."""
    print(f"{title}: " + "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items()), flush=True)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
