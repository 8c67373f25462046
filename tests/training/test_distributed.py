import os
import subprocess
import sys

import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.training.config import base_config
from sret_jax.training.distributed import check_agreement, connect


def settings(**given):
    config = base_config().distributed
    config.update(given)
    return config


@pytest.mark.parametrize(
    "given",
    [
        {"coordinator": "localhost:1234"},
        {"processes": 2},
        {"process": 0},
        {"coordinator": "localhost:1234", "processes": 2},
    ],
)
def test_a_part_of_the_settings_is_refused(given):
    with pytest.raises(UserError, match="Expected all of coordinator"):
        connect(settings(**given))


@pytest.mark.parametrize(("coordinator", "process"), [("localhost", 0), ("localhost:1234", 2)])
def test_settings_that_cannot_be_are_refused(coordinator, process):
    with pytest.raises(UserError, match="Expected a coordinator such as"):
        connect(settings(coordinator=coordinator, processes=2, process=process))


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
}


def connected(**variables):
    """What a process of its own says of its devices after `connect`, and its errors."""
    script = (
        "import jax; from sret_jax.training.config import base_config; from sret_jax.training import distributed\n"
        "try: distributed.connect(base_config().distributed)\n"
        "except distributed.UserError as error: print('error:', error)\n"
        "print(jax.config.values['jax_cuda_visible_devices'], jax.process_count())"
    )
    cluster = ("SLURM_", "OMPI_", "PMI_", "JAX_", "KUBERNETES_", "JOB_COMPLETION_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(cluster)}
    result = subprocess.run(
        [sys.executable, "-c", script], env={**plain, **variables}, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        (SLURM, "all"),
        # Several processes on one host take a device each, unless something else is said.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, "0"),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2,3"}, "2,3"),
    ],
)
def test_the_only_process_of_a_host_takes_all_its_devices(variables, visible):
    assert connected(JAX_PLATFORMS="cpu", **variables) == f"{visible} 1"


@pytest.mark.parametrize("sign", [{"OMPI_COMM_WORLD_SIZE": "4"}, {"JOB_COMPLETION_INDEX": "3"}])
def test_one_of_several_processes_does_not_take_itself_for_all(sign):
    said = connected(JAX_PLATFORMS="cpu", **sign)
    assert said.startswith("error: this process is one of several")
    assert "give config.distributed.coordinator" in said


def test_hosts_that_mean_different_data_are_refused(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    gathered = {"a": np.array([[1, 2], [1, 2], [1, 2]]), "b": np.array([[1, 2], [1, 3], [1, 2]])}
    monkeypatch.setattr(
        "sret_jax.training.distributed.multihost_utils.process_allgather", lambda digest: gathered[chr(digest[0])]
    )
    check_agreement("the images", "a")
    with pytest.raises(UserError, match=r"the images of process 1 are not those of process 0\. Expected the same"):
        check_agreement("the images", "b")
