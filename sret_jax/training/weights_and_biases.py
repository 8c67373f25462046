"""Metrics to Weights & Biases, for those who use it."""

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sret_jax.errors import UserError
from sret_jax.files import naming, replace


def open_wandb_run(project: str, workdir: str, facts: Mapping[str, Any]) -> Any:
    """A `wandb.Run`, the same one when a run of ours goes on: its id is kept in `WORKDIR/wandb_id`.

    Args:
      project: its name at Weights & Biases.
      workdir: the run's folder, whose name the run gets.
      facts: what the run began with.

    Raises:
      UserError: wandb is not installed or refuses.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.wandb_project is set, but wandb is not installed: `pip install wandb`, or set it to an empty string"
        ) from error
    id_file = Path(workdir) / "wandb_id"
    with naming(id_file):
        if not id_file.exists():
            replace(id_file, uuid.uuid4().hex)
        run_id = id_file.read_bytes().decode("ascii", "replace").strip()
    if not re.fullmatch("[0-9a-f]{32}", run_id):
        raise UserError(
            f"{id_file} is not what was written. Expected the id of a run: delete it, for another run there"
        )
    try:
        return wandb.init(
            project=project,
            id=run_id,
            name=Path(workdir).absolute().name,
            dir=workdir,
            config=dict(facts),
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise UserError(f"Weights & Biases refuses the run: {error}. Log in, or set WANDB_MODE=offline") from error
