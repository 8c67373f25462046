import jax
import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.training.mesh import make_mesh, put_batch


def test_minus_one_takes_all_devices():
    assert make_mesh({"data": -1}, 16).shape == {"data": jax.device_count()}


def test_a_batch_is_split_over_the_devices_in_order():
    mesh = make_mesh({"data": -1}, 16)
    labels = np.arange(16, dtype=np.int32)
    placed = put_batch({"label": labels}, mesh)["label"]
    for i, shard in enumerate(placed.addressable_shards):
        np.testing.assert_array_equal(shard.data, labels[2 * i : 2 * i + 2])


def test_a_batch_that_the_devices_cannot_share_is_refused_with_ones_that_they_can():
    with pytest.raises(UserError, match=r"batch size is 20.*choose 16 or 24"):
        make_mesh({"data": -1}, 20)


def test_a_batch_smaller_than_the_devices_is_refused_with_the_least_that_works():
    with pytest.raises(UserError, match=r"choose 8$"):
        make_mesh({"data": -1}, 3)


@pytest.mark.parametrize("axes", [{"model": 1}, {"data": 2, "model": 4}, {}])
def test_unknown_axes_are_refused(axes):
    with pytest.raises(UserError, match="expected 'data'"):
        make_mesh(axes, 16)


def test_a_size_that_is_not_the_number_of_devices_is_refused():
    with pytest.raises(UserError, match="there are 8 devices"):
        make_mesh({"data": 3}, 24)
