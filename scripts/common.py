"""What every entry point shares: configuration, run folder, signals, and errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser

from triptych.training.logs import Progress
from triptych.training.loop import NonFiniteError

C = TypeVar("C")
LIBRARIES = ("triptych", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors")


class _Parser(ArgumentParser):
    """Errors in one line, with the nearest valid name, instead of the whole list of options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and leave with exit code 2."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        text = _reason(message)
        known = [name.lstrip("-") for name in self._option_string_actions]
        unknown = re.search(r"(?:arguments: --|Group '(\w+)'.*option '|[Oo]ption ')([\w.]+)", text)
        name = ".".join(filter(None, unknown.groups())) if unknown else ""
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: {text}{hint}; {self.prog} --help lists every setting", file=sys.stderr)
        raise SystemExit(2)


def _reason(message: str) -> str:
    """A message in one line; of a setting that may be null or a group, why the group was refused."""
    group = re.search(r"Subtypes: .*?Errors:\s*- (.*?)\s+- Expected a <class 'NoneType'>", message, re.DOTALL)
    where = re.match(r"Parser key \"([\w.]+)\"", message)
    text = message if group is None else f"{where[1]}: {group[1]}" if where else group[1]
    return " ".join(text.split())


def parse(config_type: type[C], args: Sequence[str] | None, *, prog: str, doc: str) -> C:
    """A configuration from `--config FILE` and dotted overrides; what is wrong ends in one line, code 2."""
    summary = doc.splitlines()[0]
    parser = _Parser(prog=prog, description=summary, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe (YAML); what follows it overrides it")
    parser.add_class_arguments(config_type, None)
    found = parser.parse_args(None if args is None else list(args))
    made = parser.instantiate(found)
    fields = {f.name for f in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{k: v for k, v in vars(made).items() if k in fields})


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can mend ends as 'error: ...' with exit code 2; a defect of ours keeps its traceback."""
    try:
        yield
    except (ValueError, NonFiniteError, FileNotFoundError) as error:
        if os.environ.get("TRIPTYCH_TRACEBACK"):
            raise
        print(f"error: {_reason(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop saves and leaves; the second one ends the process."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number != 0


def cache_dir() -> Path:
    """Where converted models and reference values are kept: $TRIPTYCH_CACHE or ~/.cache/triptych."""
    return Path(os.environ.get("TRIPTYCH_CACHE") or Path.home() / ".cache" / "triptych")


def command_line() -> str:
    """The command as it was typed, for reports."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of the libraries in use, of Python, and the git commit where there is one."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dictionaries."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: Any, folder: Path) -> None:
    """Write config.yaml, which the script reads back as its --config, and versions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False), "utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n", "utf-8")


def progress(label: str, *, enabled: bool) -> Callable[[int, int], Progress]:
    """A maker of progress bars on standard error, from (total, start)."""
    return lambda total, start: Progress(
        total, label=label, stream=sys.stderr, enabled=enabled, clock=time.monotonic, start=start
    )


def quiet_libraries() -> None:
    """Our own messages at INFO; other libraries' only from WARNING on, without their progress bars."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("triptych").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_loading_bar

    disable_progress_bar()
    disable_loading_bar()


def quiet_diffusers() -> None:
    """As `quiet_libraries`, for the scripts that use diffusers, whose import takes seconds."""
    quiet_libraries()
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
