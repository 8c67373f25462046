import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.data.soft_labels import LabelType
from sret_jax.data.targets import Targets, label_targets, mix, soft_targets
from sret_jax.training.losses import target_loss, teacher_loss
from tests.golden.golden import FOLDER

CLASSES = 50  # of the golden labels
TYPES = ["hard", "smoothing", "marginal_smoothing_k5", "marginal_renorm_k5", "marginal_smoothing_k10"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "fkd_labels.npz"))


def quantised(probabilities: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The first classes of each row and their probabilities, as a file of that type holds them."""
    k = LabelType.parse(name).size(CLASSES)
    classes = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(probabilities, classes, axis=1)
    return classes.astype(np.int32), np.ones_like(kept) if name == "hard" else kept


def targets_of(golden: dict[str, np.ndarray], name: str, dtype: type = np.float32) -> Targets:
    classes, kept = quantised(golden["probabilities"], name)
    return soft_targets(jnp.asarray(classes), jnp.asarray(kept.astype(dtype)), LabelType.parse(name).kind, CLASSES)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("dtype", "infix"), [(np.float32, ""), (np.float16, "fp16_")])
def test_soft_labels_are_recovered_as_the_original_does(
    golden: dict[str, np.ndarray], name: str, dtype: type, infix: str
) -> None:
    recovered = targets_of(golden, name, dtype).dense(CLASSES)
    np.testing.assert_allclose(recovered, golden[f"recovered_{infix}{name}"], atol=1e-6, rtol=0)


def test_labels_that_name_every_class_are_as_they_were(golden: dict[str, np.ndarray]) -> None:
    probabilities = golden["probabilities"]
    classes = jnp.broadcast_to(jnp.arange(CLASSES), probabilities.shape)
    for kind in ("ori", "marginal_smoothing"):
        found = soft_targets(classes, jnp.asarray(probabilities), kind, CLASSES).dense(CLASSES)
        np.testing.assert_array_equal(found, probabilities)


def test_the_soft_cross_entropy_is_the_originals(golden: dict[str, np.ndarray]) -> None:
    loss = target_loss(jnp.asarray(golden["student_logits"]), targets_of(golden, "marginal_smoothing_k5"))
    np.testing.assert_allclose(loss, golden["soft_ce_marginal_smoothing_k5"], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_the_teachers_loss_is_the_originals(temperature: int) -> None:
    kd = np.load(FOLDER / "kd_loss.npz")
    probabilities = jax.nn.softmax(kd["teacher"] / temperature)
    loss = teacher_loss(jnp.asarray(kd["student"]), probabilities, temperature)
    np.testing.assert_allclose(loss, kd[f"loss_T{temperature}"], rtol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_sparse_and_dense_losses_and_their_gradients_agree(golden: dict[str, np.ndarray], name: str) -> None:
    logits, weight = jnp.asarray(golden["student_logits"]), jnp.float32(0.3)
    targets = targets_of(golden, name)
    partners = Targets(*(array[::-1] for array in targets))
    recovered = golden[f"recovered_{name}"]
    dense = weight * recovered + (1 - weight) * recovered[::-1]

    def dense_loss(logits: jax.Array) -> jax.Array:
        return -(dense * jax.nn.log_softmax(logits / 2)).sum(axis=1).mean()

    found = jax.value_and_grad(lambda logits: target_loss(logits, mix(targets, partners, weight), 2))(logits)
    expected = jax.value_and_grad(dense_loss)(logits)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert float(jnp.abs(expected[1]).max()) > 1e-3


def test_labels_are_one_hot_and_smoothed_over_all_classes() -> None:
    found = label_targets(jnp.array([2, 0]), 4, 0.2).dense(4)
    np.testing.assert_allclose(found, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)


def test_a_class_that_is_named_twice_has_both_excesses() -> None:
    one = label_targets(jnp.array([1]), 3, 0.0)
    np.testing.assert_allclose(mix(one, one, jnp.float32(0.4)).dense(3), [[0, 1, 0]], rtol=1e-6)
