"""The folder of a training run, as those see it who read from it: its steps, and what is kept beside their weights."""

import re
from pathlib import Path
from typing import Any

from sret_jax.errors import UserError
from sret_jax.files import DamagedError, naming, parse_json, read_json, read_sealed

_NOTE = "evaluation/metadata"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_LARGEST_INTEGER = 2**63


def saved_steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, the last one first; none where there is no run.

    Raises:
      UserError: the folder cannot be read.
    """
    folder = workdir / "checkpoints"
    with naming(folder):
        found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((int(name) for name in found if _STEP.fullmatch(name)), reverse=True)


def read_note(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint keeps beside the state, compared with its checksum.

    Returns:
      `metrics`, the last evaluation by name, empty before the first; `is_new`, whether that is of this step; and, but
      for runs of before it was kept, `identity`, what decides on the run's result.

    Raises:
      DamagedError: it is not what was written.
      UserError: it cannot be read.
    """
    note = parse_json(read_sealed(checkpoint, _NOTE), _NOTE)
    metrics, is_new = note.get("metrics"), note.get("is_new")
    is_whole = (
        isinstance(metrics, dict)
        and all(map(_is_number, metrics.values()))
        and isinstance(is_new, bool)
        and ("accuracy" in metrics or not is_new)
        and isinstance(note.get("identity", {}), dict)
    )
    if not is_whole:
        raise DamagedError(f"{_NOTE} is not what was written")
    return note


def run_identity(workdir: Path) -> dict[str, Any]:
    """What decided on the result of a run that has a checkpoint, by name: `config.seed` and so on.

    Where `config.json` and the latest checkpoint differ, the checkpoint counts: damage to it is noticed.

    Raises:
      UserError: one of the two is missing or damaged.
    """
    latest, file = workdir / "checkpoints" / str(saved_steps(workdir)[0]), workdir / "config.json"
    try:
        own = read_note(latest).get("identity", {})
    except DamagedError as error:
        raise UserError(f"{latest} is damaged ({error}): the same command of the run goes on without it") from error
    try:
        return {**read_json(file), **own}
    except (DamagedError, UserError) as error:
        raise UserError(f"{file} cannot be read ({error}): put it back, or give {latest}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_INTEGER
    )
