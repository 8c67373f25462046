"""Several hosts become one run."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from sret_jax.errors import UserError


def connect(config: ConfigDict) -> None:
    """Join the other hosts of this run, if there are any; to be called before anything else of JAX.

    TPU pods, SLURM, Open MPI and Kubernetes tell each process its place, and JAX asks them. Elsewhere the config says
    it. Without either, this process is the whole run.

    Args:
      config: `coordinator`, "host:port" of the first process, or empty; `processes`, how many there are; `process`, the
        number of this one.

    Raises:
      UserError: the config says only a part of it, or the others do not answer.
    """
    given = bool(config.coordinator), config.processes > 0, config.process >= 0
    if any(given) and not all(given):
        raise UserError(
            f'config.distributed is {config.to_dict()}. Expected all of coordinator ("host:port" of process 0), '
            "processes (how many) and process (the number of this one, from 0), or none of them"
        )
    if all(given) and not (":" in config.coordinator and config.process < config.processes):
        raise UserError(
            f'config.distributed is {config.to_dict()}. Expected a coordinator such as "10.0.0.1:8476", and a process '
            "below processes"
        )
    try:
        if all(given):
            jax.distributed.initialize(config.coordinator, config.processes, config.process)
        else:
            jax.distributed.initialize()
    except ValueError as error:
        if any(given) or "coordinator_address should be defined" not in str(error):
            raise UserError(f"the processes of this run cannot connect: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"the processes of this run cannot connect: {error}. Expected {config.processes or 'all'} processes, "
            "started at about the same time, that reach the coordinator"
        ) from error


def compile_everywhere(step: Any, *arguments: Any) -> Any:
    """Compile a jitted function, and wait until all hosts have.

    A host that began to compute would wait for the others' part, and CPUs give that up after half a minute.

    Args:
      step: what `jax.jit` returns.
      arguments: arrays or `jax.ShapeDtypeStruct`s, with their shardings.

    Returns:
      The compiled function, which takes such arguments and no others.
    """
    compiled = step.lower(*arguments).compile()
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes("compiled")
    return compiled
