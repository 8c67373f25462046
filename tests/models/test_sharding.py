"""Networks on meshes with explicit axes, as `jax.make_mesh` makes them, of eight CPU devices and of one."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sret_jax

ROWS = 16
MODEL = sret_jax.SReT(
    image_size=32,
    widths=(8,),
    heads=(2,),
    blocks=(1,),
    recursions=(2,),
    slices=((4, 2),),
    mlp_ratio=2.0,
    num_classes=8,
    drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.2,
    scan_unroll=False,
)
DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")


def _split(array: Any) -> P:
    axis = next((i for i, size in enumerate(array.shape) if size % 8 == 0), None)
    return P() if axis is None else P(*[None] * axis, "data")


def _images() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((ROWS, 32, 32, 3)).astype(np.float32)


def _loss(variables: Any, images: jax.Array, model: sret_jax.SReT = MODEL) -> Any:
    rngs = {"dropout": jax.random.key(1), "permutation": jax.random.key(2)}
    logits, updates = model.apply(variables, images, train=True, mutable="batch_stats", rngs=rngs)
    return jnp.square(logits).mean(), (logits, updates)


@functools.cache
def _variables() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))


@functools.cache
def _on(split: Any) -> Any:
    """Loss, logits, updated statistics and gradients in training, with explicit axes, or on one device for None."""
    differentiate = jax.jit(jax.value_and_grad(_loss, has_aux=True, allow_int=True))
    if split is None:
        return differentiate(_variables(), _images())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    variables = jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, split(array))), _variables())
    return differentiate(variables, jax.device_put(_images(), NamedSharding(mesh, P("data"))))


def _whole(array: Any) -> P:
    return P()


@pytest.mark.parametrize("split", [_whole, _split])
def test_explicit_axes_give_what_one_device_does(split):
    (loss, (logits, updates)), gradients = _on(split)
    (one_loss, (one_logits, one_updates)), one_gradients = _on(None)
    found, expected = (
        (loss, logits, updates, gradients["params"]),
        (one_loss, one_logits, one_updates, one_gradients["params"]),
    )
    # Sums over a batch are taken in another order: float32 rounding.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), found, expected)

    assert jax.typeof(logits).sharding.spec == P("data", None)
    for leaf in jax.tree.leaves((gradients["params"], updates)):
        assert tuple(filter(None, jax.typeof(leaf).sharding.spec)) == tuple(filter(None, split(leaf)))


@pytest.mark.parametrize(
    "fields", [{}, {"platform": "gpu"}, {"attention": "xla", "platform": "tpu", "mlp": "xla"}, {"remat": True}]
)
@pytest.mark.parametrize("split", [_whole, _split])
def test_every_formulation_is_traced_with_explicit_axes(fields, split):
    model = MODEL.clone(**fields, attn_drop_rate=0.0, drop_rate=0.0)
    mesh = jax.make_mesh((8,), ("data",))

    def placed(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        images = placed(_images(), P("data"))
        made = jax.eval_shape(model.init, jax.random.key(0), images)
        variables = jax.tree.map(lambda leaf: placed(leaf, split(leaf)), made)
        features = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
        loss = functools.partial(_loss, model=model)
        gradients, (logits, _) = jax.eval_shape(jax.grad(loss, has_aux=True, allow_int=True), variables, images)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, _variables())
    assert (features.sharding.spec, logits.sharding.spec) == (P("data", None), P("data", None))
    for leaf, variable in zip(*map(jax.tree.leaves, (gradients["params"], variables["params"])), strict=True):
        assert tuple(filter(None, leaf.sharding.spec)) == tuple(filter(None, variable.sharding.spec))


def test_calls_outside_of_jit_and_of_a_set_mesh_follow_the_images():
    model = MODEL.clone(recursions=(1,), slices=((1, 1),))
    mesh = jax.make_mesh((8,), ("data",))
    images = jax.device_put(_images(), NamedSharding(mesh, P("data")))
    variables = jax.jit(model.init)(jax.random.key(0), _images())
    found = model.apply(jax.device_put(variables, NamedSharding(mesh, P())), images)
    assert found.sharding.spec == P("data", None)
    np.testing.assert_allclose(found, jax.jit(model.apply)(variables, _images()), atol=1e-5, rtol=1e-5)


def test_the_documents_loop_trains():
    names: dict[str, Any] = {}
    example = DOCUMENT[DOCUMENT.index("```python") + len("```python") :]
    exec(compile(example[: example.index("```")], "library.md", "exec"), names)
    labels = np.arange(ROWS, dtype=np.int32) % 8
    variables, losses = names["train"](
        MODEL.clone(drop_path_rate=0.0, drop_rate=0.0, attn_drop_rate=0.0), [(_images(), labels)] * 4, 1e-2
    )
    assert losses[-1] < losses[0] < 3
    assert variables["params"]["head"]["kernel"].sharding.spec == P("data", None)
