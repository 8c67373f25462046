"""Several hosts become one run."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import sret_jax
from sret_jax.errors import UserError
from sret_jax.training.config import OF_EACH_HOST, flatten

# Packages that decide on what is computed, on the order of the data, or on how a checkpoint is written together.
_SAME_VERSIONS = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")

# Differences in an error; another checkout's config may differ in all keys.
_MOST_SHOWN = 12


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


def check_hosts(config: ConfigDict) -> None:
    """Refuse a run whose hosts have other configs, versions or code. All hosts call it first, and all raise the error.

    Where a host finds its files, and how it reads them, is its own affair; every other key decides on the result or on
    which programs run, and a host that runs another one waits for the rest without end.

    Args:
      config: as for `train`.

    Raises:
      UserError: with every key and version that differs, and its values on two hosts.
    """
    if jax.process_count() == 1:
        return
    shared = {
        f"config.{key}": value
        for key, value in flatten(config).items()
        if not any(key == own or key.startswith(own + ".") for own in OF_EACH_HOST)
    }
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in _SAME_VERSIONS}
    facts = {**shared, **versions, "the digest of the code of sret_jax": _code_digest()}
    hosts = [json.loads(text) for text in gather(json.dumps(facts, default=str))]
    differences = [
        f"  {name} is {hosts[0].get(name, 'absent')} on process 0, {host.get(name, 'absent')} on process {number}"
        for name in sorted(set().union(*hosts))
        for number, host in enumerate(hosts)
        if host.get(name) != hosts[0].get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
        raise UserError(
            "the hosts of this run do not agree:\n"
            + "\n".join(differences[:_MOST_SHOWN])
            + more
            + "\nstart the same command with the same packages and the same code on all of them"
        )


def check_agreement(what: str, digest: str) -> None:
    """Refuse a run whose hosts do not mean the same. All hosts call it, and all raise the error.

    Args:
      what: all hosts must have the same of, for the message.
      digest: of it, on this host.

    Raises:
      UserError: the hosts' digests differ.
    """
    if jax.process_count() == 1:
        return
    digests = gather(digest)
    if others := [host for host, other in enumerate(digests) if other != digests[0]]:
        raise UserError(
            f"{what} of process {others[0]} are not those of process 0"
            + (f", nor are those of {len(others) - 1} others" if others[1:] else "")
            + ". Expected the same on all hosts: copy them again, or give a folder that all hosts see"
        )


def gather(text: str) -> list[str]:
    """What each host gives, in their order. All hosts call it."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def tree_digest(tree: Any) -> str:
    """64 letters that tell apart trees of other arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _code_digest() -> str:
    """16 letters that tell apart two checkouts of this package."""
    package = Path(sret_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


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
