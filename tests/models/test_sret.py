"""The network as a whole: its numbers, its randomness, its initial values, its depth, its errors."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.sret import init_variables, variable_shapes
from tests.models import draws, numpy_sret
from tests.models.jaxprs import operations

# 16 tokens, two blocks, three applications of each: the least that has every scan and every permutation.
SMALL = {
    "image_size": 32,
    "widths": (8,),
    "heads": (2,),
    "blocks": (2,),
    "recursions": (3,),
    "slices": ((1, 2),),
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "drop_path_rate": 0.0,
    "scan_unroll": False,
}
DROPPING = {"drop_path_rate": 0.4, "drop_rate": 0.2, "attn_drop_rate": 0.2}
TWO_STAGES = {"widths": (8, 16), "heads": (2, 2), "blocks": (2, 1), "recursions": (2, 2), "slices": ((4, 2), (1, 1))}
WAYS_TO_RUN = [{"scan_unroll": unroll, "remat": remat} for unroll in (False, True) for remat in (False, True)]
WAYS_TO_RUN += [
    {"attention": "xla", "platform": "gpu"},
    {"attention": "pieces", "mlp": "xla", "platform": "tpu", "remat": True},
]

# Quicker to compile than the default generator, and as random.
_key = functools.partial(jax.random.key, impl="unsafe_rbg")


def _small(**fields: Any) -> sret_jax.SReT:
    return sret_jax.SReT(**{**SMALL, **fields})


def _shapes(model: sret_jax.SReT) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Variables and two images, without their values."""
    images = jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images), images


def _random_permutations(model: sret_jax.SReT, seed: int = 2) -> list[np.ndarray | None]:
    random = np.random.RandomState(seed)
    stages = zip(model.blocks, model.recursions, model.grid_sizes, model.slices, strict=True)
    return [
        np.stack([[random.permutation(size**2) for _ in range(recursions - 1)] for _ in range(blocks)]).astype(np.int32)
        if recursions > 1 and later > 1
        else None
        for blocks, recursions, size, (_, later) in stages
    ]


# --- Numbers ---


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="three recursions, sliced and permuted"),
        pytest.param({"recursions": (1,), "slices": ((4, 2),)}, id="one recursion"),
        pytest.param(
            {
                "image_size": 40,
                "widths": (6, 12, 36),
                "heads": (1, 2, 3),
                "blocks": (1, 2, 1),
                "recursions": (2, 3, 1),
                "slices": ((1, 5), (9, 3), (2, 4)),
                "nll_ratio": 1.5,
            },
            id="grids of 5, 3 and 2 a side, pools of multiplier 2 and 3",
        ),
        pytest.param(
            {
                "image_size": 24,
                "widths": (4, 8, 8),
                "heads": (1, 2, 4),
                "blocks": (1, 1, 1),
                "recursions": (1, 2, 3),
                "slices": ((3, 9), (2, 1), (1, 1)),
            },
            id="grids of 3, 2 and 1 a side, a pool that keeps the width",
        ),
    ],
)
def test_logits_equal_a_numpy_network(fields: dict[str, Any]) -> None:
    model = _small(**fields)
    variables, images = draws.random_variables(model), draws.random_images(model, batch=2)
    permutations = _random_permutations(model)

    logits = jax.jit(model.apply)(variables, images, permutations=permutations)

    weights = sret_jax.to_torch_state_dict(variables, model)
    expected = numpy_sret.logits(weights, model, images, permutations)
    # Rounding of float32 in the ten to fifty layers, at logits near 1; wrong structure is wrong by 1.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rates", [pytest.param({}, id="no dropout", marks=pytest.mark.by_hand), pytest.param(DROPPING, id="dropout")]
)
def test_rolled_unrolled_and_rematerialised_have_the_same_logits_and_gradients(rates: dict[str, float]) -> None:
    images = draws.random_images(_small(), batch=4)
    variables = draws.random_variables(_small())
    cotangent = np.random.RandomState(3).standard_normal((4, 5)).astype(np.float32)
    rngs = {"dropout": _key(0), "permutation": _key(1)}

    def run(model):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"], rngs=rngs
            )
            return (logits * cotangent).sum(), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        gradients = sret_jax.to_torch_state_dict({"params": gradients}, model)
        # A coefficient's is one number, a sum whose terms cancel and which rounds as they do: all are one vector.
        coefficients = [gradients.pop(name) for name in list(gradients) if ".coefficient" in name]
        return logits, gradients | {"coefficients": np.concatenate(coefficients)}

    logits, gradients = run(_small(**rates))
    assert all(np.linalg.norm(gradient) > 1e-3 for name, gradient in gradients.items() if ".conv" not in name)
    for way in WAYS_TO_RUN[1:]:
        other_logits, other_gradients = run(_small(**rates, **way))
        # XLA fuses each differently: rounding of float32, twice as many layers backwards.
        np.testing.assert_allclose(other_logits, logits, rtol=0, atol=1e-5, err_msg=str(way))
        for name, gradient in gradients.items():
            # BatchNorm removes what the stem's biases do: their gradients are rounding noise.
            if not re.fullmatch(r"patch_embed\.conv\d\.bias", name):
                difference = np.linalg.norm(other_gradients[name] - gradient)
                assert difference <= 1e-4 * np.linalg.norm(gradient), (way, name)


# Three residual connections and the second halves of two MLPs; on CPUs their first halves, their GELUs once more, and
# both halves of attention; with remat all that is in it.
@pytest.mark.parametrize(("platform", "remat", "times"), [("gpu", False, 5), ("gpu", True, 6), ("cpu", False, 11)])
def test_what_each_application_of_a_block_computes_again(platform: str, remat: bool, times: int) -> None:
    variables, images = _shapes(_small())
    model = _small(remat=remat, platform=platform, attention="xla")
    found = operations(model.apply, variables, images)
    recomputed = sum(times for equation, times in found if equation.primitive.name in ("checkpoint", "remat2"))
    applications = 2 * 3
    assert recomputed == times * applications


@pytest.mark.parametrize(
    ("scan_unroll", "backend", "recursions", "train", "unrolled"),
    [
        pytest.param(False, "tpu", 2, True, False, id="rolled"),
        pytest.param(True, "cpu", 40, False, True, id="unrolled"),
        pytest.param(None, "tpu", 32, False, True, id="64 applications on TPUs"),
        pytest.param(None, "gpu", 32, False, True, id="64 applications on GPUs"),
        pytest.param(None, "tpu", 33, True, False, id="66 applications on TPUs"),
        pytest.param(None, "cpu", 32, True, True, id="training 64 applications on CPUs"),
        pytest.param(None, "cpu", 32, False, False, id="evaluating 64 applications on CPUs"),
        pytest.param(None, "cpu", 33, True, False, id="training 66 applications on CPUs"),
    ],
)
def test_scans_are_unrolled_as_told_and_by_default_up_to_64_applications(
    scan_unroll, backend, recursions, train, unrolled, monkeypatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = _small(
        scan_unroll=scan_unroll, recursions=(recursions,), attention="xla", mlp="xla"
    )  # kernels have loops of their own
    rngs = {"permutation": jax.random.key(0)}
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"], rngs=rngs)
    scans = [equation.params for equation, _ in operations(apply, *_shapes(model)) if equation.primitive.name == "scan"]
    assert sorted(scan["length"] for scan in scans) == sorted([2, recursions - 1])
    for scan in scans:
        assert scan["unroll"] == (scan["length"] if unrolled else 1)


@pytest.mark.parametrize("way", WAYS_TO_RUN, ids=str)
def test_bfloat16_is_close_to_float32_with_float32_parameters_logits_and_gradients(way: dict[str, bool]) -> None:
    exact, model = _small(), _small(dtype=jnp.bfloat16, **way)
    variables, images = draws.random_variables(exact), draws.random_images(exact, batch=8)
    permutations = _random_permutations(model)
    for leaf in jax.tree.leaves(_shapes(model)[0]["params"]):
        assert leaf.dtype == jnp.float32

    logits = jax.jit(model.apply)(variables, images, permutations=permutations)

    assert logits.dtype == jnp.float32
    expected = numpy_sret.logits(sret_jax.to_torch_state_dict(variables, exact), exact, images, permutations)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    # bfloat16 rounds by up to 2⁻⁹; some 100 roundings one after another add up like a random walk to 10 · 2⁻⁹ = 2 %.
    # And no rounding at all would mean that nothing was computed in bfloat16.
    assert 1e-4 < error < 0.02

    def loss(params):
        return model.apply({**variables, "params": params}, images, permutations=permutations).sum()

    for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), variables["params"])):
        assert leaf.dtype == jnp.float32


def test_float32_products_ask_for_float32_on_every_device_forwards_and_backwards() -> None:
    model = _small(widths=(8, 16), heads=(2, 2), blocks=(1, 1), recursions=(2, 2), slices=((1, 2), (1, 1)))
    variables, images = _shapes(model)
    found = operations(jax.grad(lambda *arguments: model.apply(*arguments).sum(), allow_int=True), variables, images)
    products = [e for e, _ in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) > 40
    for equation in products:
        highest = jax.lax.Precision.HIGHEST
        assert equation.params["precision"] in (highest, (highest, highest))
        assert {variable.aval.dtype for variable in equation.invars} == {np.dtype(np.float32)}


def test_bfloat16_computes_products_in_bfloat16_but_softmax_norms_and_head_in_float32() -> None:
    model = _small(dtype=jnp.bfloat16)
    assert jax.eval_shape(functools.partial(model.apply, method="features"), *_shapes(model)).dtype == jnp.float32
    found = [equation for equation, _ in operations(model.apply, *_shapes(model))]

    def of(*names):
        return [equation for equation in found if equation.primitive.name in names]

    products = of("dot_general", "conv_general_dilated")
    *others, head = products
    assert {variable.aval.dtype for e in others for variable in e.invars} == {np.dtype(jnp.bfloat16)}
    assert {variable.aval.dtype for variable in head.invars} == {np.dtype(np.float32)}
    assert of("exp")
    assert of("rsqrt")
    for equation in of("exp", "rsqrt", "reduce_max"):
        assert equation.invars[0].aval.dtype == np.float32


@pytest.mark.parametrize(
    ("rates", "drawn"),
    [
        ({}, 0),
        ({"drop_path_rate": 0.1}, 1),  # for all branches of a stage at once
        ({"attn_drop_rate": 0.1}, 6),
        ({"drop_rate": 0.1}, 1 + 6 * (1 + 2 + 2)),  # the embedding; attention, MLP and projection layer of each
    ],
)
def test_every_rate_draws_where_it_should_and_in_training_only(rates: dict[str, float], drawn: int) -> None:
    model = _small(**rates)
    permutations = _random_permutations(model)
    rngs = {"dropout": jax.random.key(0)}
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"], permutations=permutations, rngs=rngs)
    evaluate = functools.partial(model.apply, permutations=permutations, rngs=rngs)
    for run, expected in ((train, drawn), (evaluate, 0)):
        found = operations(run, *_shapes(model))
        assert sum(times for equation, times in found if equation.primitive.name == "random_bits") == expected


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_keeps_activations_between_the_parts_in_bfloat16(train: bool) -> None:
    two_stages = {
        "widths": (8, 16),
        "heads": (2, 2),
        "blocks": (2, 1),
        "recursions": (3, 2),
        "slices": ((1, 2), (1, 1)),
    }
    model = _small(dtype=jnp.bfloat16, **two_stages, **DROPPING)
    run = functools.partial(
        model.apply,
        train=train,
        rngs={"dropout": jax.random.key(0), "permutation": jax.random.key(1)},
        capture_intermediates=lambda module, method: method == "__call__",
        mutable=["batch_stats", "intermediates"],
    )
    _, captured = jax.eval_shape(run, *_shapes(model))
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree.leaves_with_path(captured["intermediates"])
    }
    for part in ("stem/bn3", "pos_drop", "stages_0", "pools_0", "stages_1"):
        assert any(name.startswith(part) for name in dtypes), part
    assert {name for name, dtype in dtypes.items() if dtype != jnp.bfloat16} == {
        "__call__/0",
        "head/__call__/0",
        "norm/__call__/0",
    }


def test_num_classes_zero_gives_features() -> None:
    model = _small(blocks=(1,), recursions=(1,))
    headless = dataclasses.replace(model, num_classes=0)
    variables, images = draws.random_variables(model), draws.random_images(model, batch=2)
    features = jax.jit(functools.partial(model.apply, method="features"))(variables, images)
    logits = jax.jit(model.apply)(variables, images)
    assert features.shape == (2, 8)
    assert features.dtype == jnp.float32
    head = variables["params"]["head"]
    # The head is one product in float32.
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5)

    assert "head" not in _shapes(headless)[0]["params"]
    without_head = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head"}}
    # The same program but for the head that XLA does not see.
    np.testing.assert_allclose(jax.jit(headless.apply)(without_head, images), features, rtol=0, atol=1e-6)


def test_training_leaves_batch_statistics_of_this_batch_behind() -> None:
    model = _small()
    variables, images = draws.random_variables(model), draws.random_images(model, batch=4)
    run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = run(variables, images, rngs={"permutation": _key(0)})

    conv = variables["params"]["stem"]["conv1"]
    weight = np.transpose(conv["kernel"], (3, 2, 0, 1))
    x = numpy_sret.convolution(images.astype(np.float64), weight, conv["bias"])
    before, after = variables["batch_stats"]["stem"]["bn1"], updates["batch_stats"]["stem"]["bn1"]
    # rounding of float32
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    for bn in ("bn1", "bn2", "bn3"):
        assert updates["batch_stats"]["stem"][bn]["batches"] == 4  # random variables have seen 3


# --- Randomness ---


@pytest.fixture(scope="module")
def evaluation():
    """A small sliced network, and its evaluation compiled once: (model, variables, images, run)."""
    model = _small()
    variables, images = draws.random_variables(model), draws.random_images(model, batch=2)
    return model, variables, images, jax.jit(model.apply)


def _stage_permutations(model: sret_jax.SReT, **rngs: jax.Array) -> list[jax.Array | None]:
    size = model.grid_sizes[0]
    variables = {"params": {"pos_embed": np.zeros((size, size, model.widths[0]), np.float32)}}
    return model.apply(variables, None, False, method="_stage_permutations", rngs=rngs)


def test_evaluation_without_rngs_is_bit_equal_from_call_to_call_and_when_compiled_again(evaluation) -> None:
    model, variables, images, run = evaluation
    logits = run(variables, images)
    np.testing.assert_array_equal(run(variables, images), logits)
    again = dataclasses.replace(model)
    np.testing.assert_array_equal(jax.jit(again.apply)(variables, images), logits)


def test_evaluation_without_rngs_permutes_the_tokens(evaluation) -> None:
    model, variables, images, run = evaluation
    raster = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 2, 16))
    fixed = _stage_permutations(model)[0]
    assert np.array_equal(np.sort(fixed), raster)
    logits, in_raster_order = run(variables, images), run(variables, images, permutations=[raster])
    assert np.abs(logits - in_raster_order).max() > 1e-4  # rounding of float32 does 1e-6


def test_permutation_rngs_change_the_logits_and_the_same_rng_does_not(evaluation) -> None:
    _, variables, images, run = evaluation
    first, again, other = (run(variables, images, rngs={"permutation": _key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    for different in (other, run(variables, images)):
        assert np.abs(first - different).max() > 1e-4  # rounding of float32 does 1e-6


def test_permutations_given_as_they_are_drawn_give_the_same_logits(evaluation) -> None:
    model, variables, images, run = evaluation
    for seed in range(3):
        drawn = _stage_permutations(model, permutation=_key(seed))
        logits = run(variables, images, rngs={"permutation": _key(seed)})
        # Two programs, so rounding of float32 may differ.
        np.testing.assert_allclose(run(variables, images, permutations=drawn), logits, rtol=0, atol=1e-6)


def test_given_permutations_go_before_the_rng(evaluation) -> None:
    model, variables, images, run = evaluation
    given = _random_permutations(model)
    logits = run(variables, images, permutations=given, rngs={"permutation": _key(0)})
    # Two programs, so rounding of float32 may differ.
    np.testing.assert_allclose(logits, run(variables, images, permutations=given), rtol=0, atol=1e-6)


def test_drawn_permutations_are_permutations_that_differ_between_stages_blocks_and_applications() -> None:
    model = _small(
        image_size=64,
        widths=(8, 8, 8),
        heads=(1, 1, 1),
        blocks=(2, 3, 2),
        recursions=(3, 4, 1),
        slices=((1, 2), (4, 4), (4, 2)),
    )
    first, second, third = _stage_permutations(model, permutation=jax.random.key(0))
    assert (first.shape, second.shape, third) == ((2, 2, 64), (3, 3, 16), None)
    assert first.dtype == second.dtype == jnp.int32
    for stage in (first, second):
        orders = stage.reshape(-1, stage.shape[-1])
        np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(orders.shape[-1]), orders.shape))
        assert len(np.unique(orders, axis=0)) == len(orders)
    other, _, _ = _stage_permutations(model, permutation=jax.random.key(1))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fields", [{"slices": ((2, 1),)}, {"slices": ((2, 2),), "recursions": (1,)}])
def test_stages_without_later_slices_ignore_the_permutation_rng(fields: dict[str, Any]) -> None:
    model = _small(**fields)
    assert _stage_permutations(model, permutation=_key(0)) == [None]
    variables, images = _shapes(model)
    with_rng, without = (
        jax.jit(functools.partial(model.apply, rngs=rngs)).lower(variables, images).as_text()
        for rngs in ({"permutation": _key(0)}, {})
    )
    assert with_rng == without


def test_training_without_later_slices_needs_no_permutation_rng() -> None:
    model = _small(slices=((2, 1),))
    variables, images = _shapes(model)
    logits, _ = jax.eval_shape(functools.partial(model.apply, train=True, mutable=["batch_stats"]), variables, images)
    assert logits.shape == (2, 5)


def test_training_with_slices_needs_permutations_or_their_rng() -> None:
    model = _small()
    variables, images = _shapes(model)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(sret_jax.UserError, match=r'pass rngs=\{"permutation": key\}'):
        jax.eval_shape(train, variables, images)
    jax.eval_shape(functools.partial(train, rngs={"permutation": _key(0)}), variables, images)
    jax.eval_shape(functools.partial(train, permutations=_random_permutations(model)), variables, images)


def test_dropout_stands_behind_the_position_embedding() -> None:
    model = _small(drop_rate=0.25, image_size=64, blocks=(1,), recursions=(1,))
    variables, images = draws.random_variables(model), draws.random_images(model, batch=4)

    @jax.jit
    def run(variables, images):
        _, captured = model.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": _key(0)},
            capture_intermediates=lambda module, _: module.name in ("stem", "pos_drop"),
            mutable=["batch_stats", "intermediates"],
        )
        return {name: calls["__call__"][0] for name, calls in captured["intermediates"].items()}

    parts = jax.tree.map(np.asarray, run(variables, images))
    embedded, kept = parts["stem"] + variables["params"]["pos_embed"], parts["pos_drop"] != 0
    # Four standard deviations of the mean of 2048 draws: 4 · sqrt(0.25 · 0.75 / 2048).
    assert abs(kept.mean() - 0.75) < 0.039
    np.testing.assert_allclose(parts["pos_drop"][kept], embedded[kept] / 0.75, rtol=1e-5)  # rounding of float32


def test_stochastic_depth_rates_of_sret_t_grow_by_stage_and_distinct_block() -> None:
    model = sret_jax.create_model("sret_t")
    variables = {"params": {"pos_embed": np.zeros((28, 28, 64), np.float32)}}
    rates = model.apply(variables, method=lambda model: [stage.drop_path_rates for stage in model.stages])
    # Of 20 applications, 4 lie before the second stage and 14 before the third; within a stage, distinct blocks count.
    expected = [
        (0.0, 0.005),
        (0.02, 0.025, 0.03, 0.035, 0.04),
        (0.07, 0.075, 0.08),
    ]
    for stage, wanted in zip(rates, expected, strict=True):
        np.testing.assert_allclose(stage, wanted, rtol=1e-12)  # rounding of float64


def test_stochastic_depth_drops_each_branch_of_each_application_by_itself_at_its_blocks_rate() -> None:
    # Images are all the same, so what differs between examples is what was dropped. The first block's rate is 0; the
    # second's is 0.9 · 1/6, in two branches of each of its three applications: 64 outcomes.
    model = _small(image_size=8, slices=((1, 1),), drop_path_rate=0.9)
    variables = draws.random_variables(model)
    images = np.broadcast_to(draws.random_images(model, batch=1), (4096, 8, 8, 3))
    run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, _ = run(variables, images, rngs={"dropout": _key(0)})

    _, counts = np.unique(np.round(np.asarray(logits), 4), axis=0, return_counts=True)
    frequencies = np.sort(counts / 4096)[::-1]

    def within(frequency: float, branches: int) -> bool:
        """Whether it is the chance that just these branches of the six are dropped, give or take four deviations."""
        chance = 0.15**branches * 0.85 ** (6 - branches)
        return abs(frequency - chance) < 4 * np.sqrt(chance * (1 - chance) / 4096)

    # The most frequent outcome is that nothing is dropped, the next six that one branch is, then fifteen for two.
    assert within(frequencies[0], branches=0)
    assert all(within(frequency, branches=1) for frequency in frequencies[1:7])
    assert all(within(frequency, branches=2) for frequency in frequencies[7:22])
    assert 22 < len(frequencies) <= 64


# --- Initial values ---


@pytest.fixture(scope="module")
def initial():
    """Initial variables under official names: SReT-T's first two stages, its blocks applied three times."""
    model = sret_jax.SReT(
        image_size=64,
        widths=(64, 128),
        heads=(2, 4),
        blocks=(2, 3),
        recursions=(3, 3),
        slices=((1, 1), (1, 1)),
        scan_unroll=False,
    )
    images = np.zeros((1, 64, 64, 3), np.float32)
    return sret_jax.to_torch_state_dict(jax.jit(model.init)(jax.random.key(0), images), model)


def _linear_and_convolution(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights and biases, divided by PyTorch's bound 1/sqrt(fan_in): in ±1. Shared ones once."""
    layers = {name.removesuffix(".weight") for name, array in state_dict.items() if array.ndim > 1} - {"pos_embed"}
    scaled = {}
    for layer in layers:
        application = re.fullmatch(r"transformers\.\d\.blocks\.(\d+)\..*", layer)
        if application and int(application[1]) % 6 in (2, 4):  # a block's later applications: the same tensors
            continue
        bound = np.prod(state_dict[f"{layer}.weight"].shape[1:]) ** -0.5
        for part in ("weight", "bias"):
            scaled[f"{layer}.{part}"] = state_dict[f"{layer}.{part}"] / bound
    return scaled


def test_initial_weights_and_biases_are_uniform_up_to_one_over_the_root_of_fan_in(initial) -> None:
    scaled = _linear_and_convolution(initial)
    # 5 blocks of four linear layers, 15 NLLs of two, three convolutions, a pool, the head: weight and bias each.
    assert len(scaled) == 2 * (5 * 4 + 15 * 2 + 3 + 1 + 1)
    for name, array in scaled.items():
        assert np.abs(array).max() <= 1 + 1e-6, name  # a product of float32
        # The smallest has 32 values: all of them stay below 0.7 in one of 10⁵ draws.
        assert np.abs(array).max() > 0.7, name
        if array.size > 1000:
            # A uniform distribution's standard deviation and mean; 1000 values give both to 0.018 (one standard
            # deviation of the mean), and some 50 tensors are compared.
            assert array.std() == pytest.approx(3**-0.5, abs=0.05), name
            assert abs(array.mean()) < 0.08, name
    everything = np.concatenate([array.ravel() for array in scaled.values()])
    # A million values: the count in each of ten bins has a standard deviation of 0.3 %.
    histogram = np.histogram(everything, bins=10, range=(-1, 1))[0] / everything.size
    np.testing.assert_allclose(histogram, 0.1, rtol=0.015)


def test_initial_values_of_distinct_layers_differ(initial) -> None:
    scaled = _linear_and_convolution(initial)
    # Divided by their bounds, layers drawn from the same key would begin alike; three values of float32 do by chance
    # in one of 10²⁰ pairs.
    beginnings = {tuple(np.round(array.ravel()[:3], 5).tolist()) for array in scaled.values()}
    beginnings |= {tuple(np.round(array.T.ravel()[:3], 5).tolist()) for array in scaled.values()}
    matrices = sum(array.ndim > 1 for array in scaled.values())
    assert len(beginnings) == len(scaled) + matrices


def test_initial_position_embedding_is_normal_of_0_02(initial) -> None:
    values = initial["pos_embed"] / 0.02
    # 4096 values: the standard deviation is known to 1/sqrt(8192) = 1.1 %, the mean to 1/64.
    assert values.std() == pytest.approx(1, abs=0.05)
    assert abs(values.mean()) < 0.07
    # Not cut off at two standard deviations, as a truncated normal's default is: 4.6 % lie beyond.
    assert (np.abs(values) > 2).mean() == pytest.approx(0.0455, abs=0.015)


def test_initial_norms_are_one_and_zero_and_coefficients_one(initial) -> None:
    compared = set()
    for name, array in initial.items():
        expected = None
        if "coefficient" in name or re.search(r"(norm\d?|bn\d)\.weight|running_var", name):
            expected = 1
        elif re.search(r"(norm\d?|bn\d)\.bias|running_mean|num_batches_tracked", name):
            expected = 0
        if expected is not None:
            np.testing.assert_array_equal(array, expected, err_msg=name)
            compared.add(name)
    # By application: two norms and four coefficients a block, one and two an NLL; the last norm; BatchNorm's five.
    assert len(compared) == 15 * (2 * 2 + 4) + 15 * (2 + 2) + 2 + 3 * 5


# --- Depth ---


def test_a_thousand_shared_layers_initialise_and_run() -> None:
    model = sret_jax.create_model("sret_t", recursions=(50, 50, 50), num_classes=10, image_size=64)
    images = draws.random_images(model, batch=1)
    assert sum(model.applications) == 500

    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits = jax.jit(model.apply)(variables, images)

    assert logits.shape == (1, 10)
    assert np.isfinite(logits).all()
    found = operations(model.apply, variables, images)
    times_run = {name: sum(t for e, t in found if e.primitive.name == name) for name in ("erf", "erfc", "exp")}
    # Every block and every NLL has one MLP with one GELU, every block one softmax.
    assert times_run["erf"] + times_run["erfc"] == 1000
    assert times_run["exp"] == 500


def test_program_size_does_not_grow_with_depth() -> None:
    sizes = []
    for recursions in (3, 50):
        model = sret_jax.create_model(
            "sret_t", recursions=(recursions,) * 3, num_classes=10, image_size=64, scan_unroll=False
        )
        sizes.append(len(jax.jit(model.apply).lower(*_shapes(model)).as_text()))
    # The same operations; only lengths have more digits.
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


# --- Errors ---


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 24, 24, 3), (2, 32, 32, 1), (2, 3, 32, 32), (32, 32, 3)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    variables, _ = _shapes(_small())
    with pytest.raises(sret_jax.UserError) as error:
        jax.eval_shape(_small().apply, variables, jax.ShapeDtypeStruct(shape, np.float32))
    assert str(shape) in str(error.value)
    assert "(batch, 32, 32, 3)" in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_images_of_whole_numbers_are_refused(dtype) -> None:
    variables, _ = _shapes(_small())
    with pytest.raises(sret_jax.UserError, match=f"images are {np.dtype(dtype)}, expected float32.*normalise"):
        jax.eval_shape(_small().apply, variables, jax.ShapeDtypeStruct((2, 32, 32, 3), dtype))


@pytest.mark.parametrize(
    "permutations",
    [
        pytest.param((), id="no stage"),
        pytest.param((None,), id="none for a sliced stage"),
        pytest.param((np.zeros((2, 2, 16), np.int32), None), id="a stage too many"),
        pytest.param((np.zeros((2, 3, 16), np.int32),), id="first application included"),
        pytest.param((np.zeros((2, 2, 4), np.int32),), id="other tokens"),
        pytest.param((np.zeros((2, 2, 16), np.float32),), id="floating"),
    ],
)
def test_permutations_of_another_shape_are_refused(permutations) -> None:
    with pytest.raises(sret_jax.UserError, match=r"expected \[\(2, 2, 16\)\]"):
        jax.eval_shape(functools.partial(_small().apply, permutations=permutations), *_shapes(_small()))


def test_a_permutation_for_a_stage_without_later_slices_is_refused() -> None:
    model = _small(slices=((2, 1),))
    permutations = [np.zeros((2, 2, 16), np.int32)]
    with pytest.raises(sret_jax.UserError, match=r"expected \[None\]"):
        jax.eval_shape(functools.partial(model.apply, permutations=permutations), *_shapes(model))


@pytest.mark.parametrize("image_size", [100, 220, 7, 1, 0, -8, 72, 8, 232, 500])
@pytest.mark.parametrize("name", ["sret_t", "sret_lt_16_14_1"])
def test_an_image_size_that_does_not_divide_names_the_nearest_that_do(name: str, image_size: int) -> None:
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.create_model(name, image_size=image_size)
    named = [int(size) for size in re.search(r"image sizes near it .*: ([\d, ]+)$", str(error.value))[1].split(", ")]

    assert str(image_size) in str(error.value)
    assert len(named) == 4
    farthest = max(abs(size - image_size) for size in named)
    for size in range(8, 1000, 8):
        nearer = abs(size - image_size) < farthest
        if size in named:
            assert sret_jax.create_model(name, image_size=size).image_size == size
        elif nearer:
            with pytest.raises(sret_jax.UserError):
                sret_jax.create_model(name, image_size=size)


def test_slices_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(sret_jax.UserError) as error:
        sret_jax.create_model("sret_t", slices=((8, 2), (5, 1), (1, 1)))
    message = str(error.value)
    assert "stage 2 has 14 × 14 tokens" in message
    assert "(5, 1)" in message
    named = [int(groups) for groups in re.search(r"slices that do: ([\d, ]+);", message)[1].split(", ")]
    assert named == [groups for groups in range(1, 197) if 196 % groups == 0]
    for groups in named:
        sret_jax.create_model("sret_t", slices=((8, 2), (groups, groups), (1, 1)))


def test_lists_become_tuples_so_that_a_model_can_be_hashed() -> None:
    model = sret_jax.SReT(widths=[64, 128, 256], slices=[[8, 2], [4, 1], [1, 1]])
    assert hash(model) == hash(sret_jax.SReT())
    assert model == sret_jax.SReT()


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_rate", "attn_drop_rate"])
def test_training_with_a_rate_above_zero_needs_the_dropout_rng(rate: str) -> None:
    model = _small(slices=((1, 1),), **{rate: 0.1})
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(sret_jax.UserError, match=rf'{rate}=0\.1.*pass rngs=\{{"dropout": key\}}'):
        jax.eval_shape(train, *_shapes(model))
    jax.eval_shape(functools.partial(train, rngs={"dropout": _key(0)}), *_shapes(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": (2, 4)}, "one value for each stage"),
        ({"widths": (), "heads": (), "blocks": (), "recursions": (), "slices": ()}, "one value for each stage"),
        ({"blocks": (2, 0, 3)}, r"blocks is \(2, 0, 3\), expected whole numbers of at least 1"),
        ({"recursions": (0, 2, 2)}, "recursions is"),
        ({"widths": (64, 128, -256)}, "widths is"),
        ({"heads": (2, 0, 8)}, "heads is"),
        ({"slices": ((8,), (4, 1), (1, 1))}, "expected two whole numbers of at least 1 for each stage"),
        ({"slices": ((8, 0), (4, 1), (1, 1))}, "expected two whole numbers of at least 1 for each stage"),
        ({"slices": ((8, 3), (4, 1), (1, 1))}, r"stage 1 has 28 × 28 tokens, which slices \(8, 3\) do not divide"),
        ({"slices": ((8, 2), (4, 1), (1, 2))}, r"stage 3 has 7 × 7 tokens, which slices \(1, 2\) do not divide"),
        ({"heads": (3, 4, 8)}, "3 does not divide 64"),
        ({"widths": (64, 96, 192)}, "96 is not one of 64"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1, expected a probability, at least 0 and below 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"drop_rate": 1.5}, "drop_rate is 1.5"),
        ({"attn_drop_rate": float("nan")}, "attn_drop_rate is nan"),
        ({"dtype": jnp.float16}, "dtype is .*float16.*, expected float32 or bfloat16"),
        ({"dtype": "float64"}, "dtype is 'float64', expected float32 or bfloat16"),
        ({"dtype": "foo"}, "dtype is 'foo', expected float32 or bfloat16"),
        ({"dtype": None}, "dtype is None, expected float32 or bfloat16"),
        ({"num_classes": -1}, "num_classes is -1, expected a whole number"),
        ({"num_classes": 1.5}, "num_classes is 1.5, expected a whole number"),
        ({"image_size": "224"}, "image_size is '224', expected a whole number"),
        ({"recursions": (2.5, 2, 2)}, "expected whole numbers of at least 1"),
        ({"widths": 64}, "widths is 64, expected one value for each stage"),
        ({"slices": (8, 4, 1)}, "expected two whole numbers of at least 1 for each stage"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0, which leaves no hidden channel"),
        ({"nll_ratio": -1.0}, "nll_ratio is -1.0, which leaves no hidden channel"),
        ({"widths": (1, 2, 4), "heads": (1, 1, 1)}, "give at least 2"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(sret_jax.UserError, match=message):
        sret_jax.SReT(**fields)


def test_a_network_is_traced_once_for_its_variables_and_their_shapes(monkeypatch) -> None:
    model, traced = _small(num_classes=6), []
    check = sret_jax.SReT._check_images
    monkeypatch.setattr(sret_jax.SReT, "_check_images", lambda self, images: traced.append(check(self, images)))
    shapes = variable_shapes(model)
    again = jax.eval_shape(lambda: init_variables(model, jax.random.key(1)))
    assert len(traced) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), again) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )


@pytest.mark.parametrize(
    "fields",
    [{}, {"platform": "gpu"}, {"attention": "xla", "dtype": "bfloat16"}, {"attention": "pallas", "mlp": "pallas"}],
)
def test_no_array_gains_axes_by_itself(fields):
    model = _small(**TWO_STAGES, **DROPPING, **fields)
    images, key = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32), jax.random.key(0)

    def loss(params: Any, variables: Any, images: jax.Array) -> jax.Array:
        rngs = {"dropout": key, "permutation": key}
        logits, _ = model.apply({**variables, "params": params}, images, train=True, rngs=rngs, mutable="batch_stats")
        return logits.sum()

    with jax.numpy_rank_promotion("raise"):
        variables = jax.eval_shape(model.init, key, images)
        logits = jax.eval_shape(model.apply, variables, images)
        features = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
        gradients = jax.eval_shape(jax.grad(loss), variables["params"], variables, images)
    assert (logits.shape, features.shape) == ((2, 5), (2, 16))
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, variables["params"])
