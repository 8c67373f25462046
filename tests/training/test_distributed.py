import pytest

from sret_jax import UserError
from sret_jax.training.config import base_config
from sret_jax.training.distributed import connect


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
