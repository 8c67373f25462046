"""What networks cost: against published and original numbers, and against the traced program."""

import jax
import numpy as np
import pytest

import sret_jax
from tests.golden import golden
from tests.golden.cases import model_of
from tests.models.jaxprs import operations

# Counted in the original code. Distilled models are the same networks.
EXACT = {
    "sret_t_wo_slice": (4_755_979, 1_365_682_944),
    "sret_t": (4_755_979, 1_112_444_672),
    "sret_lt_wo_slice": (4_988_024, 1_417_715_456),
    "sret_lt": (4_988_024, 1_164_477_184),
    "sret_lt_16_14_1": (4_988_024, 1_224_537_856),
    "sret_s_wo_slice": (20_899_692, 4_671_381_960),
    "sret_s": (20_899_692, 4_172_819_112),
    "sret_t_wo_slice_distill": (4_755_979, 1_365_682_944),
    "sret_t_distill": (4_755_979, 1_112_444_672),
    "sret_lt_wo_slice_distill": (4_988_024, 1_417_715_456),
    "sret_lt_distill": (4_988_024, 1_164_477_184),
    "sret_t_wo_slice_distill_384": (4_853_259, 6_408_361_984),
    "sret_s_wo_slice_distill_384": (21_091_212, 18_443_154_240),
    "sret_s_wo_slice_distill_512": (21_317_004, 42_671_708_352),
}


def test_every_published_network_has_an_exact_cost_here() -> None:
    assert list(EXACT) == sret_jax.list_models()


@pytest.mark.parametrize("name", EXACT)
def test_parameters_and_macs_of_published_networks_are_exact(name: str) -> None:
    model = sret_jax.create_model(name)
    assert (sret_jax.count_params(model), sret_jax.count_macs(model)) == EXACT[name]


@pytest.mark.parametrize("name", golden.names())
def test_parameters_and_macs_equal_the_originals(name: str) -> None:
    case = golden.load(name)
    model = model_of(case.config)
    assert (sret_jax.count_params(model), sret_jax.count_macs(model)) == (case.params, case.macs)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_macs_are_those_of_the_traced_program(num_classes: int) -> None:
    # An odd grid, (5, 3) tokens a side; the number of applications and of groups differs everywhere.
    model = sret_jax.SReT(
        image_size=40,
        widths=(8, 24),
        heads=(2, 3),
        blocks=(2, 3),
        recursions=(3, 2),
        slices=((5, 25), (1, 3)),
        mlp_ratio=1.7,
        nll_ratio=0.6,
        num_classes=num_classes,
    )
    images = jax.ShapeDtypeStruct((1, 40, 40, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    counted = 0
    for equation, times in operations(model.apply, variables, images):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            counted += times * equation.outvars[0].aval.size * int(np.prod(lengths))
        if equation.primitive.name == "conv_general_dilated":
            out = equation.outvars[0].aval
            kernel = equation.invars[1].aval
            counted += times * out.size * kernel.size // out.shape[-1]
    # The pooling convolution is written without one of these: 3 × 3 places, 24 channels, 9 products each.
    assert sret_jax.count_macs(model) == counted + 3 * 3 * 24 * 9
