import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from sret_jax import SReT, UserError, save_variables, to_torch_state_dict
from sret_jax.data.augment import MEAN, STD, normalize
from sret_jax.models import zoo
from sret_jax.training.checkpoints import Checkpoints
from sret_jax.training.config import identity
from sret_jax.training.mesh import make_mesh, put_batch, replicated, split_batch
from sret_jax.training.step import TrainState
from sret_jax.training.teacher import Teacher, load_teachers, place_teachers, teacher_probabilities
from sret_jax.weights.torch_writer import torch_file_content
from tests.models.draws import random_images, random_variables
from tests.training import tiny_run

CLASSES = 10
SIZE = 16
FIELDS = {
    "image_size": SIZE,
    "widths": (32,),
    "heads": (1,),
    "blocks": (1,),
    "recursions": (1,),
    "slices": ((2, 1),),
    "mlp_ratio": 2.0,
}
MODEL = SReT(**FIELDS, num_classes=CLASSES)
IMAGES = random_images(MODEL, 8)
COMPILED = {}  # the same program comes from many teachers


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


@pytest.fixture(scope="module")
def expected(variables):
    return logits_of(MODEL.apply, variables)


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """Published networks that are as small as MODEL."""
    row = zoo.Published((), {**FIELDS, "num_classes": 1000}, 0, 0, 0, "")
    wider = zoo.Published((), {**row.fields, "widths": (64,)}, 0, 0, 0, "")
    unsliced = zoo.Published((), {**row.fields, "slices": ((1, 1),)}, 0, 0, 0, "")
    rows = {"tiny": row, "tiny_distill": row, "wider": wider}
    monkeypatch.setattr(zoo, "PUBLISHED", rows)
    return lambda: monkeypatch.setattr(zoo, "PUBLISHED", {**rows, "unsliced": unsliced})


@pytest.fixture
def module(monkeypatch):
    """Puts a function where a user's module would have it, and names it."""

    def put(make, name="teachers"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(make=make))
        return f"{name}:make"

    return put


@pytest.fixture(scope="module")
def safetensors(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_variables(path, variables, MODEL, name="tiny")
    return path


def load(spec, **options):
    return load_teachers(str(spec), **{"num_classes": CLASSES, "default_image_size": SIZE, **options})


def logits_of(apply, variables, images=IMAGES):
    lowered = jax.jit(apply).lower(variables, images)
    program = lowered.as_text()
    if program not in COMPILED:
        COMPILED[program] = lowered.compile()
    return np.asarray(COMPILED[program](variables, images))


def logits(teacher, images=IMAGES):
    return logits_of(teacher.apply, teacher.variables, images)


def write_pth(path, variables):
    path.write_bytes(torch_file_content(to_torch_state_dict(variables, MODEL)))
    return path


def write_workdir(path, variables):
    config = tiny_run.get_config()
    with config.unlocked():
        config.model.update({**FIELDS, "name": "tiny"})
    state = TrainState(
        step=jnp.int32(3),
        skipped=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optax.sgd(0.1).init(variables["params"]),
    )
    state = jax.device_put(state, replicated(make_mesh({"data": -1}, 8)))
    with Checkpoints(str(path), keep=1, identity={**identity(config), "classes": CLASSES}) as checkpoints:
        checkpoints.save(3, state, {"accuracy": 0.5})
    return path


# Functions of other libraries, so to speak: a projection of all pixels, in forms that users write.

RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.standard_normal((SIZE * SIZE * 3, CLASSES)).astype(np.float32)
BIAS = RANDOM.standard_normal((1, CLASSES)).astype(np.float32)
PROJECTED = IMAGES.reshape(8, -1) @ KERNEL + BIAS


def linear():
    return lambda images: images.reshape(images.shape[0], -1) @ KERNEL + BIAS


def linear_jitted():
    return jax.jit(linear())


def linear_of_jitted_parts():
    kernel, bias = jnp.asarray(KERNEL), jnp.asarray(BIAS)
    project = jax.jit(lambda x: x @ kernel)
    inner = jax.jit(lambda x: project(x) + bias)
    return lambda images: inner(images.reshape(images.shape[0], -1))


def linear_in_float64():
    kernel, bias = KERNEL.astype(np.float64), BIAS.astype(np.float64)
    return lambda images: images.reshape(images.shape[0], -1) @ kernel + bias


def linear_in_a_loop():
    kernel = jnp.asarray(KERNEL)

    def apply(images):
        # Of the batch size, and made anew for each: no variable.
        start = np.zeros((images.shape[0], CLASSES), np.float32)
        flat = images.reshape(images.shape[0], -1)
        return jax.lax.scan(lambda x, _: (x + flat @ kernel / 4, None), start, length=4)[0] + BIAS

    return apply


FORMS = [linear, linear_jitted, linear_of_jitted_parts, linear_in_float64, linear_in_a_loop]


def test_a_teacher_is_known_by_what_its_files_say(safetensors, variables, expected, tmp_path) -> None:
    save_variables(tmp_path / "folder", variables, MODEL, name="tiny")
    for path in (safetensors, tmp_path / "folder", write_workdir(tmp_path / "run", variables)):
        (teacher,) = load(path)
        np.testing.assert_allclose(logits(teacher), expected, rtol=1e-5, atol=1e-5)
        # Of these, only a run knows how it was evaluated.
        crop_ratio = tiny_run.get_config().data.eval_crop_ratio if path.name == "run" else 0.0
        assert teacher[3:] == (SIZE, MEAN, STD, CLASSES, crop_ratio)
        assert teacher.name == str(path)


def test_a_file_of_pytorch_is_of_the_published_network_that_alone_fits(variables, expected, tmp_path) -> None:
    # `tiny_distill` is the same one, trained otherwise.
    (teacher,) = load(write_pth(tmp_path / "tiny.pth", variables))
    np.testing.assert_allclose(logits(teacher), expected, rtol=1e-5, atol=1e-5)


def test_what_tensors_do_not_tell_must_be_said(variables, expected, published, tmp_path) -> None:
    published()
    path = write_pth(tmp_path / "a=b.pth", variables)
    with pytest.raises(
        UserError, match=r"fit tiny, tiny_distill, unsliced, which differ in slices: .* tiny=.*a=b\.pth"
    ):
        load(path)
    (sliced,) = load(f"Tiny={path}")
    np.testing.assert_allclose(logits(sliced), expected, rtol=1e-5, atol=1e-5)
    (unsliced,) = load(f"unsliced={path}")
    np.testing.assert_allclose(
        logits(unsliced), logits_of(MODEL.copy(slices=((1, 1),)).apply, variables), rtol=1e-5, atol=1e-5
    )
    assert np.abs(logits(unsliced) - expected).max() > 1e-3


def test_a_model_can_be_said_for_files_that_do_not_know_it(variables, tmp_path) -> None:
    save_variables(tmp_path / "x.safetensors", variables)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be used: nothing says which model .*MODEL=PATH"):
        load(tmp_path / "x.safetensors")
    (teacher,) = load(f"tiny={tmp_path / 'x.safetensors'}")
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, variables)


def test_another_image_size_resizes_the_position_embedding(safetensors) -> None:
    with pytest.warns(UserWarning, match="from 16 to 32 pixels"):
        (teacher,) = load(safetensors, image_size=32)
    assert teacher.image_size == 32
    shape = jax.eval_shape(teacher.apply, teacher.variables, jax.ShapeDtypeStruct((3, 32, 32, 3), np.float32)).shape
    assert shape == (3, CLASSES)


def test_bfloat16_halves_a_models_parameters_and_gives_nearly_its_logits(safetensors, variables, expected) -> None:
    (teacher,) = load(safetensors, dtype="bfloat16")
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree["params"])) for tree in (teacher.variables, variables)]
    assert 2 * sizes[0] == sizes[1]
    jaxpr = jax.make_jaxpr(teacher.apply)(teacher.variables, IMAGES)
    inputs = [e.invars[0].aval.dtype for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert set(inputs) == {jnp.bfloat16.dtype}
    np.testing.assert_allclose(logits(teacher), expected, atol=0.03 * np.abs(expected).max())
    assert not np.array_equal(logits(teacher), expected)


@pytest.mark.parametrize("make", FORMS)
def test_the_arrays_of_a_function_are_arguments_for_any_batch(make, module) -> None:
    (teacher,) = load(module(make))
    assert [array.shape for array in teacher.variables].count(KERNEL.shape) == 1
    assert all(type(array) is np.ndarray for array in teacher.variables)
    np.testing.assert_allclose(logits(teacher), PROJECTED, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(teacher, IMAGES[:3]), PROJECTED[:3], rtol=1e-4, atol=1e-4)
    # What is given counts, not what was closed over.
    doubled = tuple(2 * array for array in teacher.variables)
    np.testing.assert_allclose(logits_of(teacher.apply, doubled), 2 * PROJECTED, rtol=1e-4, atol=1e-4)
    # As a constant, the kernel would take two digits for each of its bytes.
    assert len(jax.jit(teacher.apply).lower(teacher.variables, IMAGES).as_text()) < KERNEL.nbytes / 4


def test_a_function_without_arrays_has_no_variables(module) -> None:
    (teacher,) = load(module(lambda: lambda images: images[:, 0, 0, :1] * jnp.arange(float(CLASSES))))
    assert teacher.variables == ()
    np.testing.assert_allclose(logits(teacher), IMAGES[:, 0, 0, :1] * np.arange(CLASSES), rtol=1e-6)


def test_a_random_key_stays_in_the_program(module) -> None:
    key = jax.random.key(3)
    (teacher,) = load(module(lambda: lambda images: linear()(images) + jax.random.normal(key, (CLASSES,))))
    noise = np.asarray(jax.random.normal(key, (CLASSES,)))
    np.testing.assert_allclose(logits(teacher), PROJECTED + noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [linear, linear_of_jitted_parts])
def test_bfloat16_halves_the_arrays_of_a_function_and_leaves_integers(make, module) -> None:
    order = np.arange(CLASSES, dtype=np.int32)

    def reordered():
        function = make()
        return lambda images: jnp.take(function(images), order, axis=1)

    (teacher,) = load(module(reordered), dtype="bfloat16")
    assert {(array.shape, array.dtype.name) for array in teacher.variables} == {
        (KERNEL.shape, "bfloat16"),
        (BIAS.shape, "bfloat16"),
        (order.shape, "int32"),
    }
    flat, kernel, bias = (x.astype(jnp.bfloat16).astype(np.float32) for x in (IMAGES.reshape(8, -1), KERNEL, BIAS))
    np.testing.assert_allclose(logits(teacher), flat @ kernel + bias, rtol=1e-4, atol=1e-4)


def test_a_function_sees_bfloat16_images_when_asked(module) -> None:
    seen = []

    def make():
        return lambda images: seen.append((images.dtype.name, images.shape)) or linear()(images)

    for dtype in ("bfloat16", "float32"):
        (teacher,) = load(module(make), dtype=dtype)
        jax.eval_shape(teacher.apply, teacher.variables, IMAGES)
        assert seen == [(dtype, (2, SIZE, SIZE, 3)), (dtype, IMAGES.shape)]
        seen.clear()


def test_a_teacher_has_the_normalisation_that_is_given(safetensors, module) -> None:
    ours, function = load(f"{safetensors},{module(linear)}", mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 1.0])
    assert (function.mean, function.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 1.0))
    assert (ours.mean, ours.std) == (MEAN, STD)


def test_a_digest_tells_teachers_of_other_weights_or_inputs_apart() -> None:
    one = constant(np.arange(3.0))
    others = [constant(np.arange(3.0) + 1), constant(np.arange(3.0), image_size=2 * SIZE), constant(np.zeros(4))]
    others.append(constant(np.arange(3.0), mean=(0.5, 0.5, 0.5)))
    assert one.digest() == constant(np.arange(3.0), name="elsewhere").digest()
    assert len({teacher.digest() for teacher in [one, *others]}) == 5
    assert len(one.digest()) == 64


def test_a_function_sees_the_students_size_unless_told(module) -> None:
    spec = module(lambda: lambda images: images.mean((1, 2)) @ KERNEL[:3])
    assert load(spec, default_image_size=24)[0].image_size == 24
    assert load(spec, default_image_size=24, image_size=40)[0].image_size == 40


def constant(values, name="constant", image_size=SIZE, mean=MEAN, std=STD):
    """A teacher whose logits are its variables, whatever it sees."""
    values = np.asarray(values, np.float32)
    return Teacher(name, lambda v, images: jnp.tile(v, (len(images), 1)), values, image_size, mean, std, len(values))


def softmax(values):
    powers = np.exp(np.asarray(values, np.float64))
    return powers / powers.sum()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_the_mean_of_distributions_at_the_temperature(temperature) -> None:
    values = [[1.0, 2.0, -3.0], [0.0, 5.0, 50.0]]
    teachers = [constant(v) for v in values]
    found = jax.jit(lambda v, images: teacher_probabilities(teachers, v, images, temperature))(
        [teacher.variables for teacher in teachers], IMAGES
    )
    mean = np.mean([softmax(np.divide(v, temperature)) for v in values], axis=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.tile(mean, (8, 1)), rtol=1e-5)


def test_probabilities_of_bfloat16_logits_are_computed_in_float32() -> None:
    (values,) = RANDOM.standard_normal((1, 1000)).astype(jnp.bfloat16)
    teacher = constant(values)
    found = teacher_probabilities([teacher], [jnp.asarray(values)], IMAGES, 3.0)
    np.testing.assert_allclose(found[0], softmax(values.astype(np.float64) / 3), rtol=1e-5)


def seeing(image_size, mean=MEAN, std=STD):
    """A teacher whose distribution tells the images that it sees."""
    teacher = constant(np.zeros(1), image_size=image_size, mean=mean, std=std)
    return teacher._replace(apply=lambda _, images: images.reshape(len(images), -1))


def seen_by(teacher, pixels):
    """Images as a teacher sees them, but for a number that is added to all."""
    return np.log(teacher_probabilities([teacher], [teacher.variables], normalize(jnp.asarray(pixels)), 1.0))


def without_mean(images):
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    return flat - flat.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [5, 19])
def test_a_teacher_sees_images_in_its_own_size_and_normalisation(size) -> None:
    # Pillow's bicubic filter is the same, and takes account of aliasing too.
    pixels = RANDOM.integers(256, size=(1, 12, 12, 3), dtype=np.uint8)
    channels = [Image.fromarray(pixels[0, ..., c].astype(np.float32)) for c in range(3)]
    resized = np.stack([np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in channels], axis=-1)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 1.0)
    found = without_mean(seen_by(seeing(size, mean, std), pixels))
    np.testing.assert_allclose(found, without_mean([(resized / 255 - mean) / std]), atol=1e-4)


def test_images_that_are_as_a_teacher_wants_them_are_not_touched() -> None:
    teacher = seeing(8)
    jaxpr = jax.make_jaxpr(lambda images: teacher_probabilities([teacher], [jnp.zeros(1)], images, 1.0))(
        np.zeros((2, 8, 8, 3), np.float32)
    )
    whole_images = [e.primitive.name for e in jaxpr.eqns if e.outvars[0].aval.shape == (2, 8, 8, 3)]
    assert set(whole_images) <= {"stop_gradient"}


def test_no_gradient_flows_through_a_teacher(safetensors, module) -> None:
    teachers = load(f"{safetensors},{module(linear)}")
    variables = [teacher.variables for teacher in teachers]
    floats = [variables[0]["params"], variables[1]]

    def loss(floats, images):
        given = [{**variables[0], "params": floats[0]}, floats[1]]
        return jnp.square(teacher_probabilities(teachers, given, images, 2.0)).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(floats, IMAGES)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_teacher_needs_no_derivative(module) -> None:
    @jax.custom_jvp
    def without(x):
        return x

    @without.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError

    teachers = load(module(lambda: lambda images: linear()(without(images))))
    variables = [teachers[0].variables]
    jax.eval_shape(jax.grad(lambda x: teacher_probabilities(teachers, variables, x, 1.0)[0, 0]), IMAGES)


def test_a_mesh_of_eight_gives_what_one_device_gives(safetensors, module) -> None:
    teachers = load(f"{safetensors}, {module(linear)}")
    found = []
    for axes, devices in (({"data": 1}, 1), ({"data": -1, "fsdp": 2}, 8)):
        mesh = make_mesh(axes, 8, jax.devices()[:devices])
        placed = place_teachers(teachers, mesh)
        whole = replicated(mesh)

        def step(variables, images, whole=whole):
            variables = jax.lax.with_sharding_constraint(variables, whole)
            return teacher_probabilities(teachers, variables, images, 2.0)

        jitted = jax.jit(step, in_shardings=(None, split_batch(mesh)))
        found.append(np.asarray(jitted(placed, put_batch({"image": IMAGES}, mesh)["image"])))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-7)
    kernel = next(array for array in placed[1] if array.shape == KERNEL.shape)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(KERNEL.shape[0] // 2, CLASSES)}
    assert len({shard.device for shard in kernel.addressable_shards}) == 8
    assert sum(leaf.size for leaf in jax.tree.leaves(placed[0])) == sum(
        leaf.size for leaf in jax.tree.leaves(teachers[0].variables)
    )


def test_other_classes_than_the_datas_are_refused(safetensors, module) -> None:
    with pytest.raises(UserError, match=r"tiny\.safetensors cannot be used: it has 10 classes, the data 12"):
        load(safetensors, num_classes=12)
    with pytest.raises(UserError, match=r"teachers:make cannot be used: .* returns float32 \(2, 10\)\. .*\(2, 12\)"):
        load(module(linear), num_classes=12)


def raising():
    raise RuntimeError("no such weights")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (raising, "RuntimeError: no such weights"),
        (lambda: 3, "it returns 3. Expected a function"),
        (lambda: lambda images: images @ KERNEL, r"images float32 \(2, 16, 16, 3\) its function raises TypeError"),
        (lambda: lambda images: (linear()(images), BIAS), r"returns float32 \(2, 10\) and float32 \(1, 10\)"),
        (lambda: lambda images: linear()(images).argmax(1), r"returns int32 \(2,\)"),
        (lambda: lambda images: linear()(images).astype(int), r"returns int32 \(2, 10\)"),
        (lambda: lambda images: (), "returns nothing"),
    ],
)
def test_a_function_that_is_no_teacher_is_refused(make, message, module) -> None:
    with pytest.raises(UserError, match=f"teachers:make cannot be used.*{message}"):
        load(module(make))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "one has no name"),
        ("a.pth,,b.pth", "one has no name"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("sret_jax.training.teacher:make", "has no attribute 'make'"),
        ("nowhere/tiny.pth", "there is no file or folder nowhere/tiny.pth"),
        ("nothing", "there is no file or folder nothing"),
        ("tiny=nowhere/x", "there is no file or folder nowhere/x"),
        ("tinny=nowhere/x", "there is no model 'tinny'"),
        # Without the package for them, which it names: so these are paths.
        ("s3://nowhere/x:y", "cannot open s3://nowhere/x:y: .*s3fs"),
        ("s3://nowhere/run=3/x", "cannot open s3://nowhere/run=3/x: .*s3fs"),
        ("tiny=s3://nowhere/x", "cannot open s3://nowhere/x: .*s3fs"),
    ],
)
def test_a_teacher_that_is_not_there_is_named(spec, message) -> None:
    with pytest.raises(UserError, match=message):
        load(spec)


def test_an_unknown_dtype_is_refused(module) -> None:
    with pytest.raises(UserError, match=r"'float16'\. Expected float32 or bfloat16"):
        load(module(linear), dtype="float16")


def test_a_file_of_no_published_network_is_refused(variables, monkeypatch, tmp_path) -> None:
    path = write_pth(tmp_path / "tiny.pth", variables)
    monkeypatch.setattr(zoo, "PUBLISHED", {"wider": zoo.PUBLISHED["wider"]})
    with pytest.raises(UserError, match=r"fit no published model .*MODEL=PATH"):
        load(path)


def test_large_arrays_that_would_be_in_the_program_are_refused(module) -> None:
    large = jnp.ones((600, 600))
    looped = jax.jit(lambda x: x + large[0, :CLASSES])

    def in_a_loop():
        return lambda images: jax.lax.fori_loop(0, 2, lambda _, x: looped(x), linear()(images))

    with pytest.raises(UserError, match=r"teachers:make cannot be used: .*array float32 \(600, 600\)"):
        load(module(in_a_loop))

    def made_anew():
        return lambda images: linear()(images) + jnp.asarray(np.ones((600, 600), np.float32))[0, :CLASSES]

    (teacher,) = load(module(made_anew))
    with pytest.raises(UserError, match=r"teachers:make cannot be used: .*array float32 \(600, 600\)"):
        jax.eval_shape(teacher.apply, teacher.variables, IMAGES)
