"""A ground truth as a folder: its numbers, its settings, and the fingerprint that logs name it by."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from triptych.modalities.recsys.oracle import Oracle, OracleConfig, Scalarisation
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.quarantine import DataError

WEIGHTS, SETTINGS = "oracle.safetensors", "oracle.json"


def write_oracle(oracle: Oracle, folder: Path) -> None:
    """Write the folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    names = [f.name for f in fields(oracle) if f.name not in ("genres", "config")]
    save_file({name: getattr(oracle, name).contiguous() for name in names}, temporary / WEIGHTS)
    said = {
        "fingerprint": oracle.fingerprint,
        "genres": list(oracle.genres),
        "config": asdict(oracle.config),
    }
    (temporary / SETTINGS).write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    publish(temporary, folder)


def read_oracle(folder: Path) -> Oracle:
    """What `write_oracle` wrote. DataError for a folder that is absent, damaged, or not what it says."""
    try:
        said = json.loads((folder / SETTINGS).read_text("utf-8"))
        settings = dict(said["config"])
        config = OracleConfig(
            **settings
            | {
                "levels": tuple(settings["levels"]),
                "scalarisation": Scalarisation(**settings["scalarisation"]),
            }
        )
        oracle = Oracle(**load_file(folder / WEIGHTS), genres=tuple(said["genres"]), config=config)
        fingerprint = said["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError("holds no oracle", source=str(folder), remedy=reason) from None
    if oracle.fingerprint != fingerprint:
        remedy = f"its .json says {fingerprint}, its content is {oracle.fingerprint}; write the logs again"
        raise DataError("is not what was written", source=str(folder), remedy=remedy)
    return oracle
