import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.training import distributed
from sret_jax.training.config import base_config, flatten
from sret_jax.training.distributed import check_agreement, check_hosts, connect


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


@pytest.fixture
def hosts(monkeypatch):
    """Three hosts, of which this process is one; `hosts` takes what each of them says where this one says a text."""

    def say(heard):
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr(distributed, "gather", heard)

    return say


def test_hosts_that_mean_different_data_are_refused(hosts):
    hosts(lambda digest: {"a": ["12", "12", "12"], "b": ["12", "13", "123"]}[digest])
    check_agreement("the images", "a")
    message = r"the images of process 1 are not those of process 0, nor are those of 1 others\. Expected the same"
    with pytest.raises(UserError, match=message):
        check_agreement("the images", "b")


def test_texts_of_any_length_are_gathered(monkeypatch):
    lengths, rows = [], []

    def allgather(array):  # of two hosts, the other of which says "äöü"
        other = "äöü".encode()
        if np.ndim(array) == 0:
            lengths.append(int(array))
            return np.array([array, len(other)])
        rows.append(len(array))
        return np.array([array, np.frombuffer(other.ljust(len(array), b"\0"), np.uint8)])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", allgather)
    assert [distributed.gather(text) for text in ("", "longer than that")] == [["", "äöü"], ["longer than that", "äöü"]]
    assert (lengths, rows) == ([0, 16], [6, 16])


def differing(hosts, change):
    """The error, or None, where process 2 differs by what `change` does to the facts that it tells."""

    def heard(text):
        other = json.loads(text)
        change(other)
        return [text, text, json.dumps(other)]

    hosts(heard)
    try:
        return check_hosts(base_config())
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("config.seed", 1, "config.seed is 0 on process 0, 1 on process 2"),
        ("config.optimizer.learning_rate", 0.5, "config.optimizer.learning_rate is 0.0 on process 0, 0.5 on process 2"),
        # What decides on which programs run, and when: the others would wait.
        ("config.mode", "eval", "config.mode is train on process 0, eval on process 2"),
        ("config.mesh", {"data": 1}, "config.mesh is {'data': -1, 'fsdp': 1} on process 0, {'data': 1} on process 2"),
        ("config.checkpoint.every_steps", 7, "config.checkpoint.every_steps is 0 on process 0, 7 on process 2"),
        ("the version of jax", "0.1", f"the version of jax is {jax.__version__} on process 0, 0.1 on process 2"),
        ("the version of jaxlib", "0.1", "the version of jaxlib is"),
        ("the digest of the code of sret_jax", "f00", "on process 0, f00 on process 2"),
    ],
)
def test_hosts_with_another_config_version_or_code_are_refused_with_both_values(hosts, fact, value, words):
    error = differing(hosts, lambda facts: facts.__setitem__(fact, value))
    assert words in error and error.count(" on process 2") == 1


def test_a_key_that_one_host_alone_knows_is_named(hosts):
    assert "config.new is absent on process 0, 1 on process 2" in differing(
        hosts, lambda facts: facts.update({"config.new": 1})
    )


def test_hosts_may_find_and_read_their_files_in_their_own_way(hosts):
    told = []
    assert differing(hosts, told.append) is None
    silent = {f"config.{key}" for key in flatten(base_config())} - told[0].keys()
    assert silent == {
        "config.compilation_cache",
        "config.data.max_broken",
        "config.data.path",
        "config.data.threads",
        "config.data.workers",
        "config.distill.soft_labels",
        "config.distill.teacher",
        "config.distributed.coordinator",
        "config.distributed.process",
        "config.distributed.processes",
    }


def test_weights_that_differ_in_a_bit_a_name_or_a_shape_have_other_digests():
    weights = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
    others = [
        {**weights, "a": np.array([0, 0, 0, -0.0], np.float32)},
        {**weights, "a": np.zeros((2, 2), np.float32)},
        {"b": weights["b"], "c": weights["a"]},
        None,
    ]
    assert distributed.tree_digest(weights) == distributed.tree_digest(jax.tree.map(np.copy, weights))
    assert len({distributed.tree_digest(tree) for tree in [weights, *others]}) == 5
