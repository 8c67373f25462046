"""Official names and layouts: both ways, bit for bit, and what is refused."""

import re
import zlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from tests.golden import golden
from tests.golden.cases import model_of

SMALL = {
    "image_size": 16,
    "widths": (4, 8),
    "heads": (1, 2),
    "blocks": (2, 1),
    "recursions": (2, 3),
    "slices": ((1, 1), (1, 1)),
    "num_classes": 3,
}


def _official(model: sret_jax.SReT) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every official name, its shape, and the first name of the same tensor, as the original's modules give them."""

    def layer(name: str, *shape: int, first: str | None = None) -> Iterator[tuple[str, tuple[int, ...], str]]:
        for part, its_shape in (("weight", shape), ("bias", shape[:1])):
            yield f"{name}.{part}", its_shape, f"{first or name}.{part}"

    size, width = model.image_size // 8, model.widths[0]
    yield "pos_embed", (1, width, size, size), "pos_embed"
    channels = (3, width // 2, width, width)
    for i in (1, 2, 3):
        yield from layer(f"patch_embed.conv{i}", channels[i], channels[i - 1], 3, 3)
        yield from layer(f"patch_embed.bn{i}", channels[i])
        for statistic in ("running_mean", "running_var"):
            yield f"patch_embed.bn{i}.{statistic}", (channels[i],), f"patch_embed.bn{i}.{statistic}"
        yield f"patch_embed.bn{i}.num_batches_tracked", (), f"patch_embed.bn{i}.num_batches_tracked"

    for s, (width, blocks, recursions) in enumerate(zip(model.widths, model.blocks, model.recursions, strict=True)):
        hidden, projected = int(width * model.mlp_ratio), int(width * model.nll_ratio)
        at = 0
        for _ in range(blocks):
            first = f"transformers.{s}.blocks.{at}"
            for _ in range(recursions):
                block, nll = f"transformers.{s}.blocks.{at}", f"transformers.{s}.blocks.{at + 1}"
                yield from layer(f"{block}.norm1", width, first=f"{first}.norm1")
                yield from layer(f"{block}.attn.qkv", 3 * width, width, first=f"{first}.attn.qkv")
                yield from layer(f"{block}.attn.proj", width, width, first=f"{first}.attn.proj")
                yield from layer(f"{block}.norm2", width, first=f"{first}.norm2")
                yield from layer(f"{block}.mlp.fc1", hidden, width, first=f"{first}.mlp.fc1")
                yield from layer(f"{block}.mlp.fc2", width, hidden, first=f"{first}.mlp.fc2")
                for i in (1, 2, 3, 4):
                    yield f"{block}.coefficient{i}.bias", (1,), f"{first}.coefficient{i}.bias"
                yield from layer(f"{nll}.norm1", width)
                yield from layer(f"{nll}.mlp.fc1", projected, width)
                yield from layer(f"{nll}.mlp.fc2", width, projected)
                for i in (1, 2):
                    yield f"{nll}.coefficient{i}.bias", (1,), f"{nll}.coefficient{i}.bias"
                at += 2

    for i, after in enumerate(model.widths[1:]):
        yield from layer(f"pools.{i}.conv", after, 1, 3, 3)
    yield from layer("norm", model.widths[-1])
    if model.num_classes:
        yield from layer("head", model.num_classes, model.widths[-1])


def _random_state_dict(model: sret_jax.SReT, seed: int = 0) -> dict[str, np.ndarray]:
    """Any 32 bits in every place, so infinities, denormals and NaNs of every kind too."""
    random = np.random.RandomState(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape, first in _official(model):
        if first in tensors:
            tensors[name] = tensors[first].copy()
        elif name.endswith("num_batches_tracked"):
            tensors[name] = np.array(random.randint(2**31), np.int64)
        else:
            tensors[name] = random.randint(2**32, size=shape, dtype=np.uint32).view(np.float32)
    return tensors


def _assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].flags.c_contiguous, name


@pytest.fixture
def small() -> tuple[sret_jax.SReT, dict[str, np.ndarray]]:
    """A small network and a state dict of ordinary numbers."""
    model = sret_jax.SReT(**SMALL)
    state_dict = {}
    for name, shape, first in _official(model):
        random = np.random.RandomState(zlib.crc32(first.encode()))
        state_dict[name] = random.standard_normal(shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            state_dict[name] = np.array(100, np.int64)
    return model, state_dict


TINY = [name for name in golden.names() if name.startswith("tiny")]
FULL_SIZE = [name for name in golden.names() if not name.startswith("tiny")]


@pytest.mark.parametrize("name", [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL_SIZE)])
def test_the_originals_state_dict_comes_back_bit_for_bit(name: str) -> None:
    case = golden.load(name)
    model = model_of(case.config)
    variables = sret_jax.from_torch_state_dict(case.state_dict, model)

    images = jax.ShapeDtypeStruct(case.images.shape, np.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)

    back = sret_jax.to_torch_state_dict(variables, model)
    _assert_same_bits(back, case.state_dict)
    batches = back["patch_embed.bn1.num_batches_tracked"]
    assert (batches.shape, batches.dtype, batches) == ((), np.int64, 100)


@st.composite
def _fields(draw: Any) -> dict[str, Any]:
    stages = draw(st.integers(1, 3))
    heads = [draw(st.integers(1, 3))]
    width = 2 * heads[0] * draw(st.integers(1, 2))
    widths = [width]
    for _ in range(stages - 1):
        widths.append(widths[-1] * draw(st.integers(1, 3)))
        heads.append(draw(st.sampled_from([h for h in (1, 2, 3, 4) if widths[-1] % h == 0])))
    per_stage = st.lists(st.integers(1, 3), min_size=stages, max_size=stages)
    return {
        "image_size": 8 * draw(st.integers(1, 5)),
        "widths": tuple(widths),
        "heads": tuple(heads),
        "blocks": tuple(draw(per_stage)),
        "recursions": tuple(draw(per_stage)),
        "slices": ((1, 1),) * stages,
        "mlp_ratio": draw(st.sampled_from([1.0, 1.7, 2.0])),
        "nll_ratio": draw(st.sampled_from([1.0, 1.5, 2.0])),
        "num_classes": draw(st.integers(0, 3)),
    }


# Every example traces a network: seconds, not milliseconds.
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(fields=_fields(), seed=st.integers(0, 1000))
def test_any_networks_state_dict_has_the_official_names_and_comes_back_bit_for_bit(fields, seed) -> None:
    model = sret_jax.SReT(**fields)
    state_dict = _random_state_dict(model, seed)
    back = sret_jax.to_torch_state_dict(sret_jax.from_torch_state_dict(state_dict, model), model)
    _assert_same_bits(back, state_dict)


def test_parameters_are_counted_once_and_named_once_for_every_application() -> None:
    model = sret_jax.SReT(**SMALL)
    own = {first: np.prod(shape, dtype=int) for _, shape, first in _official(model) if not re.search("bn.*_", first)}
    assert sret_jax.count_params(model) == sum(own.values())


def test_layouts_are_transposed_to_flax_order() -> None:
    model = sret_jax.SReT(**SMALL)
    official = _random_state_dict(model)
    params = jax.tree.map(np.asarray, sret_jax.from_torch_state_dict(official, model)["params"])

    def same(ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_array_equal(ours, theirs)

    same(params["pos_embed"][1, 0, 3], official["pos_embed"][0, 3, 1, 0])
    same(params["stem"]["conv2"]["kernel"][0, 2, 1, 3], official["patch_embed.conv2.weight"][3, 1, 0, 2])
    same(params["pools_0"]["kernel"][2, 1, 0, 5], official["pools.0.conv.weight"][5, 0, 2, 1])
    same(params["head"]["kernel"][7, 2], official["head.weight"][2, 7])
    first, second = params["stages_0"]["blocks"], params["stages_1"]["blocks"]
    # Stage 1: block b's applications stand at 4b and 4b + 2, their NLLs behind them. Stage 2: three applications.
    same(first["block"]["attn"]["qkv"]["kernel"][1, 2, 9], official["transformers.0.blocks.4.attn.qkv.weight"][9, 2])
    same(first["nlls"]["mlp"]["fc1"]["bias"][1, 0], official["transformers.0.blocks.5.mlp.fc1.bias"])
    same(first["nlls"]["norm"]["scale"][0, 1], official["transformers.0.blocks.3.norm1.weight"])
    same(second["nlls"]["mlp"]["fc2"]["kernel"][0, 2], official["transformers.1.blocks.5.mlp.fc2.weight"].T)
    same(second["block"]["coefficients"][0, 2], official["transformers.1.blocks.0.coefficient3.bias"][0])


def test_no_head_without_classes() -> None:
    model = sret_jax.SReT(**{**SMALL, "num_classes": 0})
    state_dict = _random_state_dict(model)
    assert not any("head" in name for name in state_dict)
    variables = sret_jax.from_torch_state_dict(state_dict, model)
    assert "head" not in variables["params"]
    _assert_same_bits(sret_jax.to_torch_state_dict(variables, model), state_dict)

    with_head = _random_state_dict(sret_jax.SReT(**SMALL))
    with pytest.raises(sret_jax.UserError, match=r"unexpected: head.weight\n +unexpected: head.bias"):
        sret_jax.from_torch_state_dict(with_head, model)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floating_dtypes_become_float32(dtype, small) -> None:
    model, state_dict = small
    # A third needs every bit of any dtype, so that shared copies are equal after rounding only if both are rounded.
    given = {
        name: array if array.dtype == np.int64 else (np.float64(1) / 3 * array).astype(dtype)
        for name, array in state_dict.items()
    }
    variables = sret_jax.from_torch_state_dict(given, model)
    back = sret_jax.to_torch_state_dict(variables, model)
    for name, array in given.items():
        expected = np.int64 if array.dtype == np.int64 else np.float32
        assert back[name].dtype == expected
        np.testing.assert_array_equal(back[name], array.astype(expected), err_msg=name)


def test_gradients_take_the_parameters_official_names(small) -> None:
    model, state_dict = small
    params = sret_jax.from_torch_state_dict(state_dict, model)["params"]
    counter = iter(range(10**6))
    gradients = jax.tree.map(
        lambda p: np.array([next(counter) for _ in range(p.size)], np.float32).reshape(p.shape), params
    )

    named = sret_jax.to_torch_state_dict({"params": gradients}, model)

    shapes = {name: shape for name, shape, _ in _official(model) if "running" not in name and "num_batches" not in name}
    assert {name: array.shape for name, array in named.items()} == shapes
    for name, _, first in _official(model):
        if name in named:
            np.testing.assert_array_equal(named[name], named[first])
    kernel = gradients["stages_1"]["blocks"]["nlls"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(named["transformers.1.blocks.3.mlp.fc1.weight"], kernel[0, 1].T)


def test_copies_of_a_shared_tensor_that_differ_are_refused_by_both_names(small) -> None:
    model, state_dict = small
    first, later = (f"transformers.1.blocks.{i}.mlp.fc1.weight" for i in (0, 4))
    state_dict[later] = state_dict[later].copy()
    state_dict[later][0, 0] += 1e-3
    with pytest.raises(sret_jax.UserError, match="in 1 tensors") as error:
        sret_jax.from_torch_state_dict(state_dict, model)
    assert f"{first} and {later} are one shared tensor" in str(error.value)


def test_nlls_are_not_shared(small) -> None:
    model, state_dict = small
    for i in (1, 3, 5):
        state_dict[f"transformers.1.blocks.{i}.mlp.fc1.weight"] = np.full((8, 8), i, np.float32)
    kernels = sret_jax.from_torch_state_dict(state_dict, model)["params"]["stages_1"]["blocks"]["nlls"]["mlp"]["fc1"]
    np.testing.assert_array_equal(kernels["kernel"][0, :, 0, 0], [1, 3, 5])


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(small) -> None:
    model, state_dict = small
    del state_dict["norm.bias"], state_dict["transformers.0.blocks.2.norm1.weight"]
    state_dict["head_dist.weight"] = np.zeros((3, 8), np.float32)
    state_dict["head.weight"] = np.zeros((1000, 8), np.float32)
    state_dict["pos_embed"] = np.zeros((1, 4, 28, 28), np.float32)
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.from_torch_state_dict(state_dict, model)
    title, *lines = str(error.value).split("\n")
    assert "in 5 tensors; check the model's name and fields" in title
    assert {line.strip() for line in lines} == {
        "missing: norm.bias",
        "missing: transformers.0.blocks.2.norm1.weight",
        "misshapen: head.weight is (1000, 8), expected (3, 8)",
        "misshapen: pos_embed is (1, 4, 28, 28), expected (1, 4, 2, 2)",
        "unexpected: head_dist.weight",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 5}, r"params/head/bias is \(3,\), expected \(5,\)"),
        ({"num_classes": 0}, r"params/head/bias is \(3,\), expected nothing"),
        ({"blocks": (2, 2)}, r"params/stages_1/blocks/block/coefficients is \(1, 4\), expected \(2, 4\)"),
    ],
)
def test_variables_of_another_model_get_no_names(fields, message: str, small) -> None:
    model, state_dict = small
    variables = sret_jax.from_torch_state_dict(state_dict, model)
    with pytest.raises(sret_jax.UserError, match=message):
        sret_jax.to_torch_state_dict(variables, sret_jax.SReT(**{**SMALL, **fields}))


def test_variables_without_a_part_get_no_names(small) -> None:
    model, state_dict = small
    variables = sret_jax.from_torch_state_dict(state_dict, model)
    del variables["params"]["norm"]
    with pytest.raises(sret_jax.UserError, match=r"params/norm/bias is missing, expected \(8,\)"):
        sret_jax.to_torch_state_dict(variables, model)
