"""Several hosts become one run."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sret_jax.errors import UserError


def connect(config: ConfigDict) -> None:
    """Join the other hosts of this run, if there are any; to be called before anything else of JAX.

    TPU pods and SLURM tell each process its place, and JAX asks them; so do Open MPI up to version 4 and, where the
    package `kubernetes` is installed, indexed jobs of Kubernetes. Elsewhere the config says it. Without either, this
    process is the whole run.

    Args:
      config: `coordinator`, "host:port" of the first process, or empty; `processes`, how many there are; `process`, the
        number of this one.

    Raises:
      UserError: the config says only a part of it, the others do not answer, or there are others but neither JAX nor
        the config knows where.
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
            jax.distributed.initialize(
                config.coordinator, config.processes, config.process, local_device_ids=_local_device_ids(os.environ)
            )
        else:
            jax.distributed.initialize(local_device_ids=_local_device_ids(os.environ))
    except ValueError as error:
        if any(given) or "coordinator_address should be defined" not in str(error):
            raise UserError(f"the processes of this run cannot connect: {error}") from error
        if sign := _sign_of_others(os.environ):
            raise UserError(
                f"this process is one of several ({sign}), but JAX does not find the others. Expected a TPU pod, "
                "SLURM's srun, Open MPI 4, or Kubernetes and `pip install 'jax[k8s]'`: give config.distributed."
                'coordinator ("host:port" of process 0), .processes (how many) and .process (the number of this one)'
            ) from error
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


def check_agreement(what: str, digest: str) -> None:
    """Refuse a run whose hosts do not mean the same. All hosts call it, and all raise the error.

    Args:
      what: all hosts must have the same of, for the message.
      digest: of it, on this host; as long on every host.

    Raises:
      UserError: the hosts' digests differ.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(digest.encode(), np.uint8))
    if others := [host for host, other in enumerate(digests) if (other != digests[0]).any()]:
        raise UserError(
            f"{what} of process {others[0]} are not those of process 0"
            + (f", nor are those of {len(others) - 1} others" if others[1:] else "")
            + ". Expected the same on all hosts: copy them again, or give a folder that all hosts see"
        )


def _local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """The devices that this process takes; an empty list is all that it sees, None leaves it to JAX.

    JAX gives each process of SLURM and Open MPI one device. The only one on its host is to take all.
    """
    tasks, nodes = (environment.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
    alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (tasks is not None and tasks == nodes)
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in environment else None


def _sign_of_others(environment: Mapping[str, str]) -> str:
    """The variable that tells that this process is not the whole run; empty if there is none."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "1") != "1":
            return f"{name}={environment[name]}"
    index = environment.get("JOB_COMPLETION_INDEX")
    return f"JOB_COMPLETION_INDEX={index}" if index else ""
