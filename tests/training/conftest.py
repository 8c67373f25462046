"""What the tests share that start `train.py` as a program."""

import os
import pathlib

import pytest

from tests import compilation


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One device, and folders shared by all runs: the digits, and compiled programs, so that a restart is quick."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # several workers of one test session
    return {
        **os.environ,
        **compilation.variables(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TFDS_DATA_DIR": str(shared / "datasets"),
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
