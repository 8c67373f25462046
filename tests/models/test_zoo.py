"""Models by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.zoo import PUBLISHED
from tests.golden import golden
from tests.golden.cases import model_of

# Name here; in the original's table; in its code; published FLOPs and parameters in units of 1e9 and 1e6; top-1 in %.
TABLE = [
    ("sret_t_wo_slice", "SReT_⋇T", "SReT_T_wo_slice", 1.4, 4.8, 76.1),
    ("sret_t", "SReT_T", "SReT_T", 1.1, 4.8, 76.0),
    ("sret_lt_wo_slice", "SReT_⋇LT", "SReT_LT_wo_slice", 1.4, 5.0, 76.8),
    ("sret_lt", "SReT_LT [8-4-1,2-1-1]", "SReT_LT", 1.2, 5.0, 76.7),
    ("sret_lt_16_14_1", "SReT_LT [16-14-1,1-1-1]", None, 1.2, 5.0, 76.6),
    ("sret_s_wo_slice", "SReT_⋇S", "SReT_S_wo_slice", 4.7, 20.9, 82.0),
    ("sret_s", "SReT_S", "SReT_S", 4.2, 20.9, 81.9),
    ("sret_t_wo_slice_distill", "SReT_⋇T_Distill", None, 1.4, 4.8, 77.7),
    ("sret_t_distill", "SReT_T_Distill", None, 1.1, 4.8, 77.6),
    ("sret_lt_wo_slice_distill", "SReT_⋇LT_Distill", None, 1.4, 5.0, 77.9),
    ("sret_lt_distill", "SReT_LT_Distill", None, 1.2, 5.0, 77.7),
    ("sret_t_wo_slice_distill_384", "SReT_⋇T_Distill_Finetune384", None, 6.4, 4.9, 79.7),
    ("sret_s_wo_slice_distill_384", "SReT_⋇S_Distill_Finetune384", None, 18.5, 21.0, 83.8),
    ("sret_s_wo_slice_distill_512", "SReT_⋇S_Distill_Finetune512", None, 42.8, 21.3, 84.3),
]
NAMES = [row[0] for row in TABLE]

# Networks whose results by the original are kept, and which of the published ones they are.
GOLDEN = {
    "sret_t_wo_slice": ["sret_t_wo_slice", "sret_t_wo_slice_distill"],
    "sret_t": ["sret_t", "sret_t_distill"],
    "sret_lt_wo_slice": ["sret_lt_wo_slice", "sret_lt_wo_slice_distill"],
    "sret_lt": ["sret_lt", "sret_lt_distill"],
    "sret_lt_16_14_1": ["sret_lt_16_14_1"],
    "sret_s_wo_slice": ["sret_s_wo_slice"],
    "sret_s": ["sret_s"],
    "sret_t_wo_slice_384": ["sret_t_wo_slice_distill_384"],
    "sret_s_wo_slice_384": ["sret_s_wo_slice_distill_384"],
    "sret_s_wo_slice_512": ["sret_s_wo_slice_distill_512"],
}


def test_fourteen_models_in_the_order_of_the_published_table() -> None:
    assert sret_jax.list_models() == NAMES


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("sret_s", ["sret_s"]),
        ("sret_t*", [name for name in NAMES if name.startswith("sret_t")]),
        ("*384", ["sret_t_wo_slice_distill_384", "sret_s_wo_slice_distill_384"]),
        ("*_?t_*", ["sret_lt_wo_slice", "sret_lt_16_14_1", "sret_lt_wo_slice_distill", "sret_lt_distill"]),
        ("resnet*", []),
    ],
)
def test_list_models_takes_patterns(pattern: str, expected: list[str]) -> None:
    assert sret_jax.list_models(pattern) == expected


@pytest.mark.parametrize(("name", "in_the_table", "in_the_code", "flops", "params", "top1"), TABLE)
def test_published_figures_are_kept(name, in_the_table, in_the_code, flops, params, top1) -> None:
    row = PUBLISHED[name]
    assert (row.flops, row.params, row.top1) == (flops, params, top1)


@pytest.mark.parametrize(("name", "in_the_table", "in_the_code"), [row[:3] for row in TABLE])
def test_official_names_give_the_same_model_in_any_case(name, in_the_table, in_the_code) -> None:
    model = sret_jax.create_model(name)
    for official in filter(None, (in_the_table, in_the_code)):
        assert sret_jax.create_model(official) == model
        assert sret_jax.create_model(official.upper()) == model


def test_no_two_models_share_an_official_name() -> None:
    official = [name.lower() for row in PUBLISHED.values() for name in row.official_names]
    assert len(set(official)) == len(official)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in GOLDEN.items() for name in names])
def test_published_models_are_the_originals(case: str, name: str) -> None:
    # Stochastic depth is not part of what the original's results show; its default there is 0.1 too.
    assert sret_jax.create_model(name) == model_of(golden.load(case).config, drop_path_rate=0.1)


def test_fields_override_the_published_ones() -> None:
    model = sret_jax.create_model("sret_s", num_classes=10, image_size=64, slices=((8, 2), (1, 1), (1, 1)))
    assert (model.num_classes, model.image_size, model.slices) == (10, 64, ((8, 2), (1, 1), (1, 1)))
    published = sret_jax.create_model("sret_s")
    assert dataclasses.replace(model, num_classes=1000, image_size=224, slices=published.slices) == published


def test_lists_serve_as_tuples() -> None:
    fields = {"widths": [8, 16, 32], "blocks": [1, 1, 1], "slices": [[1, 1], [1, 1], [1, 1]], "image_size": 32}
    model = sret_jax.create_model("sret_t", **fields)
    assert model == sret_jax.create_model(
        "sret_t", widths=(8, 16, 32), blocks=(1, 1, 1), slices=((1, 1), (1, 1), (1, 1)), image_size=32
    )
    hash(model)  # jax.jit needs it where the model is a static argument
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, 1000)


def test_dtypes_by_name_trace_the_same_program() -> None:
    fields = {"widths": (8,), "heads": (2,), "blocks": (1,), "recursions": (2,), "slices": ((2, 1),), "image_size": 16}
    images = np.zeros((1, 16, 16, 3), np.float32)
    programs = []
    for dtype in ("bfloat16", jnp.bfloat16, "float32"):
        model = sret_jax.create_model("sret_t", dtype=dtype, **fields)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        programs.append(jax.jit(model.apply).lower(variables, images).as_text())
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sret_tt", "sret_t"),
        ("SReT_S_without_slice", "sret_s_wo_slice"),
        ("sret_lt_distil", "sret_lt_distill"),
        ("sret_s_384", "sret_s_wo_slice_distill_384"),
    ],
)
def test_an_unknown_model_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.create_model(name)
    assert repr(name) in str(error.value)
    assert f"did you mean {nearest}" in str(error.value)


def test_a_model_unlike_any_other_names_all() -> None:
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.create_model("0")
    for name in NAMES:
        assert name in str(error.value)


@pytest.mark.parametrize(("field", "nearest"), [("num_clases", "num_classes"), ("drop_path", "drop_path_rate")])
def test_an_unknown_field_names_the_nearest(field: str, nearest: str) -> None:
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.create_model("sret_t", **{field: 1})
    assert f"no field {field!r}" in str(error.value)
    assert f"did you mean {nearest}" in str(error.value)


def test_linens_own_fields_are_not_the_models() -> None:
    with pytest.raises(sret_jax.UserError, match="no field 'parent'"):
        sret_jax.create_model("sret_t", parent=None)
