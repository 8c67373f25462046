"""Position embeddings of other resolutions, and other heads."""

import warnings

import jax
import numpy as np
import pytest

import sret_jax
from sret_jax.weights.adapt import adapt, resize_position_embedding
from sret_jax.weights.torch_writer import torch_file_content
from tests.golden import golden
from tests.models.draws import random_variables

GOLDEN = np.load(golden.FOLDER / "pos_embed_resize.npz")
SMALL = sret_jax.SReT(
    image_size=32, widths=(4, 8), heads=(1, 2), blocks=(1, 1), recursions=(2, 2), slices=((2, 2), (1, 1)), num_classes=5
)


def test_the_position_embedding_is_resized_as_by_the_original() -> None:
    embedding = GOLDEN["pos_embed"][0].transpose(1, 2, 0)
    for size in (14, 48, 64):
        resized = resize_position_embedding(embedding, size)
        assert resized.dtype == np.float32
        # PyTorch adds up in float32: 2e-6.
        np.testing.assert_allclose(resized.transpose(2, 0, 1), GOLDEN[f"bicubic_{size}"][0], rtol=0, atol=1e-5)


def test_a_position_embedding_of_the_same_size_stays_as_it_is() -> None:
    embedding = GOLDEN["pos_embed"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(resize_position_embedding(embedding, 28), embedding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sret_t_wo_slice_distill_384", 48),
        ("sret_s_wo_slice_distill_384", 48),
        ("sret_s_wo_slice_distill_512", 64),
    ],
)
def test_the_fine_tuning_models_load_a_224_checkpoint(name: str, size: int, tmp_path) -> None:
    fine = sret_jax.create_model(name)
    coarse = fine.copy(image_size=224)
    variables = random_variables(coarse)
    width = fine.widths[0]
    channels = np.arange(width) % 4  # the golden embedding has four
    variables["params"]["pos_embed"] = GOLDEN["pos_embed"][0, channels].transpose(1, 2, 0)
    path = tmp_path / "SReT_224.pth"
    path.write_bytes(torch_file_content(sret_jax.to_torch_state_dict(variables, coarse)))

    with pytest.warns(UserWarning, match=f"resized from 224 to {size * 8} pixels"):
        loaded = sret_jax.load_variables(path, fine)

    embedding = np.asarray(loaded["params"].pop("pos_embed"))
    expected = GOLDEN[f"bicubic_{size}"][0, channels].transpose(1, 2, 0)
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)
    del variables["params"]["pos_embed"]
    _assert_same(loaded, variables)


def test_nothing_is_said_or_changed_where_everything_fits() -> None:
    variables = random_variables(SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _assert_same(adapt(variables, SMALL, fresh_head=True), variables)


def test_another_number_of_classes_is_refused_by_both_numbers() -> None:
    with pytest.raises(sret_jax.UserError, match=r"of 5 classes, the model has 7: create it with num_classes=5"):
        adapt(random_variables(SMALL), SMALL.copy(num_classes=7))


def test_a_fresh_head_is_drawn_as_at_initialisation_and_told() -> None:
    variables = random_variables(SMALL)
    model = SMALL.copy(num_classes=700)
    with pytest.warns(UserWarning, match="head of 700 classes is fresh"):
        adapted = adapt(variables, model, fresh_head=True)
    kernel, bias = np.asarray(adapted["params"]["head"]["kernel"]), np.asarray(adapted["params"]["head"]["bias"])
    assert (kernel.shape, bias.shape) == ((8, 700), (700,))
    for drawn in (kernel, bias):  # uniform in ±1/sqrt(8)
        assert np.abs(drawn).max() <= 8**-0.5
        # Of so many uniform numbers the standard deviation is within 10 % of 1/sqrt(3 · 8), but for one seed in 10^6.
        assert drawn.std() == pytest.approx(24**-0.5, rel=0.1)
    assert variables["params"]["head"]["bias"].shape == (5,)
    _assert_same({**adapted["params"], "head": 0}, {**variables["params"], "head": 0})


def test_a_model_without_a_head_takes_none() -> None:
    variables = random_variables(SMALL)
    with pytest.warns(UserWarning, match="head of 5 classes was left out"):
        adapted = adapt(variables, SMALL.copy(num_classes=0))
    assert set(variables["params"]) - set(adapted["params"]) == {"head"}


def test_weights_without_a_head_need_a_fresh_one() -> None:
    variables = random_variables(SMALL.copy(num_classes=0))
    with pytest.raises(sret_jax.UserError, match="of no classes, the model has 5"):
        adapt(variables, SMALL)
    with pytest.warns(UserWarning, match="fresh"):
        assert "head" in adapt(variables, SMALL, fresh_head=True)["params"]


def test_variables_of_another_model_are_refused_by_every_name() -> None:
    variables = random_variables(SMALL)
    variables["params"]["extra"] = np.zeros(3)
    del variables["params"]["norm"]["bias"]
    with pytest.raises(sret_jax.UserError) as error:
        adapt(variables, SMALL.copy(mlp_ratio=2.0))
    assert "params/extra is (3,), expected nothing" in str(error.value)
    assert "params/norm/bias is missing, expected (8,)" in str(error.value)
    assert "params/stages_1/blocks/block/mlp/fc1/bias is (1, 28), expected (1, 16)" in str(error.value)


def _assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)
