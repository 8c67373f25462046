import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sret_jax import UserError
from sret_jax.training.mesh import local_rows, make_mesh, on_first_host, place, put_batch, sharded


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"data": -1}, (8, 1)),
        ({"data": 8}, (8, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4)),
        ({"data": 4, "fsdp": -1}, (4, 2)),
        ({"data": 1, "fsdp": 8}, (1, 8)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(axes, shape):
    mesh = make_mesh(axes, 16)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape


def test_a_mesh_can_be_of_other_devices():
    assert make_mesh({"data": -1}, 3, jax.devices()[2:5]).devices.flatten().tolist() == jax.devices()[2:5]


@pytest.mark.parametrize("axes", [{"data": -1}, {"data": 2, "fsdp": 4}])
def test_a_single_host_has_every_row_of_a_batch(axes):
    assert local_rows(make_mesh(axes, 24), 24) == list(range(24))


def test_large_arrays_are_split_along_their_longest_axis_that_can_be():
    mesh = make_mesh({"data": 2, "fsdp": 4}, 8)
    shapes = {"kernel": (2, 64, 96), "odd": (33, 97), "longest_odd": (64, 97), "bias": (96,), "step": ()}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert {name: sharding.spec for name, sharding in sharded(mesh, leaves).items()} == {
        "kernel": PartitionSpec(None, None, "fsdp"),
        "odd": PartitionSpec(),
        "longest_odd": PartitionSpec("fsdp"),
        "bias": PartitionSpec(),
        "step": PartitionSpec(),
    }


def test_without_an_fsdp_axis_nothing_is_split():
    leaf = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    assert sharded(make_mesh({"data": -1}, 8), leaf).is_fully_replicated


def test_placed_arrays_have_the_values_and_the_shardings():
    mesh = make_mesh({"data": 2, "fsdp": 4}, 8)
    tree = {"kernel": np.arange(64.0 * 96).reshape(64, 96), "step": np.int32(3)}
    placed = place(tree, sharded(mesh, tree))
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert math.prod(placed["kernel"].addressable_shards[0].data.shape) == 64 * 96 / 4
    assert placed["step"].dtype == np.int32


def test_alone_the_first_host_does_what_is_asked_and_raises_what_goes_wrong():
    assert on_first_host(lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        on_first_host(lambda: 1 / 0)


@pytest.mark.parametrize("axes", [{"data": -1}, {"data": 2, "fsdp": 4}])
def test_a_batch_is_split_over_the_devices_in_order(axes):
    mesh = make_mesh(axes, 16)
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


@pytest.mark.parametrize("axes", [{"model": 1}, {"data": 2, "model": 4}, {"fsdp": 8}, {}])
def test_unknown_axes_are_refused(axes):
    with pytest.raises(UserError, match="Expected 'data', or 'data' and 'fsdp'"):
        make_mesh(axes, 16)


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 4}, {"data": -1, "fsdp": 3}, {"data": -1, "fsdp": 16}])
def test_sizes_that_do_not_make_the_number_of_devices_are_refused(axes):
    with pytest.raises(UserError, match="there are 8 devices"):
        make_mesh(axes, 48)


@pytest.mark.parametrize("axes", [{"data": -1, "fsdp": -1}, {"data": 0}, {"data": -8}])
def test_sizes_that_say_nothing_are_refused(axes):
    with pytest.raises(UserError, match="Expected positive sizes, or -1 for one of them"):
        make_mesh(axes, 16)
