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


@pytest.fixture
def plain(monkeypatch):
    """No variable of a cluster is set."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "JAX_LOCAL_", "KUBERNETES_", "JOB_COMPLETION_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_only_process_of_a_host_takes_all_its_devices(plain):
    script = (
        "import jax; from sret_jax.training.config import base_config; from sret_jax.training import distributed\n"
        "distributed.connect(base_config().distributed)\n"
        "print(jax.config.values['jax_cuda_visible_devices'], jax.process_count())"
    )
    environment = {**os.environ, **SLURM}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "all 1"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (SLURM, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        # Several processes on one host take a device each, as JAX has it, and so does who says so.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2,3"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("given", [{}, {"coordinator": "localhost:1234", "processes": 2, "process": 0}])
def test_a_process_takes_the_devices_that_no_other_one_takes(plain, variables, devices, given):
    called = []
    plain.setattr("jax.distributed.initialize", lambda *place, local_device_ids: called.append(local_device_ids))
    for name, value in variables.items():
        plain.setenv(name, value)
    connect(settings(**given))
    assert called == [devices]


@pytest.mark.parametrize("sign", ["OMPI_COMM_WORLD_SIZE=4", "PMI_SIZE=2", "JOB_COMPLETION_INDEX=3"])
def test_one_of_several_processes_does_not_take_itself_for_all(plain, sign):
    def found_no_cluster(**arguments):
        raise ValueError("coordinator_address should be defined.")

    plain.setattr("jax.distributed.initialize", found_no_cluster)
    connect(settings())
    plain.setenv(*sign.split("="))
    with pytest.raises(UserError, match=rf"one of several \({sign}\).* give config\.distributed\.coordinator"):
        connect(settings())


def test_hosts_that_mean_different_data_are_refused(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    gathered = {"a": np.array([[1, 2], [1, 2], [1, 2]]), "b": np.array([[1, 2], [1, 3], [1, 2]])}
    monkeypatch.setattr(
        "sret_jax.training.distributed.multihost_utils.process_allgather", lambda digest: gathered[chr(digest[0])]
    )
    check_agreement("the images", "a")
    with pytest.raises(UserError, match=r"the images of process 1 are not those of process 0\. Expected the same"):
        check_agreement("the images", "b")
