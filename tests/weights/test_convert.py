"""The command: what it converts, what it says, and what it refuses."""

import hashlib
import pathlib
import runpy
import subprocess
import sys
import warnings
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import sret_jax
from sret_jax.classify import classify
from sret_jax.data.augment import MEAN, STD
from sret_jax.errors import options_named
from sret_jax.training import evaluation
from sret_jax.weights import store
from sret_jax.weights.convert import convert
from sret_jax.weights.torch_names import fitting_models, shapes_of
from sret_jax.weights.torch_weights import load_torch_weights
from sret_jax.weights.torch_writer import torch_file_content
from tests.golden import golden
from tests.golden.cases import model_of, recorded_permutations
from tests.models import draws

ROOT = pathlib.Path(__file__).parents[2]
CASE = golden.load("tiny")
TINY = model_of(CASE.config)
# `tiny` is SReT-T but for these.
FIELDS = {"image_size": 64, "widths": (8, 16, 32), "mlp_ratio": 2.0, "num_classes": 10}


@pytest.fixture(scope="module")
def logits_of():
    permutations = recorded_permutations(CASE)
    model = TINY.copy(scan_unroll=False)
    run = jax.jit(lambda variables: model.apply(variables, CASE.images, permutations=permutations))
    return lambda variables: np.asarray(run(variables))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    """The script, run in this process."""

    def run(*arguments: str | pathlib.Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["convert_torch_weights.py", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the script replaces it
        status: object = 0
        try:
            with warnings.catch_warnings(action="default"):
                runpy.run_path(str(ROOT / "convert_torch_weights.py"), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        if isinstance(status, str):  # as Python does at the end of a process
            print(status, file=sys.stderr)
            status = 1
        return Done(status, *capsys.readouterr())

    return run


def tiny_flags() -> list[str]:
    return ["--model=sret_t", *(f"--field={name}={value}" for name, value in FIELDS.items())]


def official(model: sret_jax.SReT, path: pathlib.Path, **changes: np.ndarray) -> pathlib.Path:
    """A file of the official layout with random weights."""
    state_dict = sret_jax.to_torch_state_dict(draws.random_variables(model), model)
    path.write_bytes(torch_file_content({**state_dict, **changes}))
    return path


@pytest.mark.parametrize("destination", ["sret_tiny.safetensors", "sret_tiny"])
@pytest.mark.parametrize(
    "source", ["tiny_deit.pth", "tiny_fkd.pth.tar", "tiny_plain.pth", "tiny_legacy.pth", "tiny_half.pth"]
)
def test_every_layout_converts_and_gives_the_originals_logits(
    source: str, destination: str, logits_of, tmp_path
) -> None:
    model = convert(golden.FOLDER / source, tmp_path / destination, name="sret_t", fields=FIELDS)
    assert model == TINY
    logits = logits_of(sret_jax.load_variables(tmp_path / destination, model))
    expected = CASE.expected["logits"]
    if source == "tiny_half.pth":
        # The eleven bits of its weights move the original's logits by up to 7e-3, and as a whole by 1.7e-3 of their
        # length: what the original computes of them is recorded too.
        assert np.linalg.norm(logits - expected) < 2e-3 * np.linalg.norm(expected)
        expected = np.load(golden.FOLDER / "tiny_half.npz")["logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)  # float32 rounding does 2e-6
    # Without a conversion it is the same.
    jax.tree.map(
        np.testing.assert_array_equal,
        sret_jax.load_variables(golden.FOLDER / source, TINY),
        sret_jax.load_variables(tmp_path / destination),
    )


def test_there_and_back_gives_every_official_tensor_bit_for_bit(tmp_path) -> None:
    convert(golden.FOLDER / "tiny_deit.pth", tmp_path / "tiny", name="sret_t", fields=FIELDS)
    assert convert(tmp_path / "tiny", tmp_path / "tiny.pth", reverse=True) == TINY  # the folder says what it is of
    weights = load_torch_weights(tmp_path / "tiny.pth")
    assert weights.layout == "model"
    assert list(weights.state_dict) == list(CASE.state_dict)
    for name, array in CASE.state_dict.items():
        assert (weights.state_dict[name].dtype, weights.state_dict[name].tobytes()) == (array.dtype, array.tobytes())


def test_the_command_says_what_it_reads_and_writes(tmp_path) -> None:
    source, destination = golden.FOLDER / "tiny_deit.pth", tmp_path / "weights" / "tiny"
    command = [sys.executable, "convert_torch_weights.py", source, destination, *tiny_flags()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f'read     {source}: 510 tensors of float32 under "model", args.model SReT_T, epoch 299',
        "model    sret_t, changed: 59,906 parameters, 64 × 64 pixels, 10 classes",
        f"wrote    {destination}: 0.2 MB, read again and found equal",
    ]
    assert store.read(destination).model == TINY


def test_the_command_checks_an_image_and_reverses(run, tmp_path) -> None:
    Image.fromarray(np.random.RandomState(0).randint(256, size=(70, 90, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    first = run(golden.FOLDER / "tiny_plain.pth", tmp_path / "t", *tiny_flags(), "--check", tmp_path / "x.png")
    second = run(tmp_path / "t", tmp_path / "t.pth", "--reverse", "--check", tmp_path / "x.png")
    checks = [done.stdout.splitlines()[-1] for done in (first, second)]
    assert checks[0] == checks[1]
    classes = classify(tmp_path / "x.png", TINY, sret_jax.load_variables(tmp_path / "t"))
    said = ", ".join(f"class {c} {p:.1%}" for c, p in classes)
    assert checks[0] == f"check    {tmp_path / 'x.png'}: {said}"


def test_an_image_is_cropped_and_normalised_as_in_evaluation(tmp_path) -> None:
    pixels = np.random.RandomState(0).randint(256, size=(73, 93, 3), dtype=np.uint8)  # 73 = int(64 / 0.875)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    variables = sret_jax.load_variables(golden.FOLDER / "tiny_plain.pth", TINY)
    image = (pixels[4:68, 14:78] / 255 - MEAN) / STD
    probabilities = np.asarray(jax.nn.softmax(TINY.apply(variables, image[None].astype(np.float32))[0]))
    found = classify(tmp_path / "x.png", TINY, variables, top=3)
    assert [c for c, _ in found] == list(np.argsort(-probabilities)[:3])
    np.testing.assert_allclose([p for _, p in found], np.sort(probabilities)[:-4:-1], rtol=1e-4)


def test_what_is_no_image_is_refused(tmp_path) -> None:
    variables = draws.random_variables(TINY)
    for path in (tmp_path / "absent.png", golden.FOLDER / "README.md"):
        with pytest.raises(sret_jax.UserError, match=f"{path.name} cannot be read as an image"):
            classify(path, TINY, variables)
    with pytest.raises(sret_jax.UserError, match="no head"):
        classify(golden.FOLDER / "README.md", TINY.copy(num_classes=0), variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("sret_t", ["sret_t_wo_slice", "sret_t", "sret_t_wo_slice_distill", "sret_t_distill"]),
        ("sret_lt_16_14_1", [name for name in sret_jax.list_models() if name.startswith("sret_lt")]),
        ("sret_s", ["sret_s_wo_slice", "sret_s"]),
        ("sret_t_wo_slice_distill_384", ["sret_t_wo_slice_distill_384"]),
        ("sret_s_wo_slice_distill_384", ["sret_s_wo_slice_distill_384"]),
        ("sret_s_wo_slice_distill_512", ["sret_s_wo_slice_distill_512"]),
    ],
)
def test_a_model_is_recognised_only_as_far_as_its_tensors_decide(name: str, fitting: list[str], tmp_path) -> None:
    model = sret_jax.create_model(name, num_classes=7)
    path = official(model, tmp_path / "x.pth")
    assert fitting_models(shapes_of(load_torch_weights(path).state_dict)) == fitting
    if len(fitting) > 1:
        with pytest.raises(sret_jax.UserError) as error:
            convert(path, tmp_path / "x")
        assert f"fit {', '.join(fitting)}, which differ in slices or training alone" in str(error.value)
    else:
        assert convert(path, tmp_path / "x", num_classes=7) == model
        assert store.read(tmp_path / "x").name == name
    assert sret_jax.load_variables(path)["params"]["head"]["bias"].shape == (7,)  # the variables are the same for all


def test_what_the_file_says_of_its_model_is_told_and_not_believed(tmp_path) -> None:
    with pytest.raises(sret_jax.UserError, match=r"fit no published model .*: give --model; the file says arch SReT_T"):
        convert(golden.FOLDER / "tiny_fkd.pth.tar", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_model_is_refused_with_every_tensor_and_the_right_ones_named(tmp_path) -> None:
    path = official(sret_jax.create_model("sret_t_wo_slice_distill_384"), tmp_path / "x.pth")
    with pytest.raises(sret_jax.UserError) as error:
        convert(path, tmp_path / "x", name="sret_lt", fields={"blocks": (2, 5, 2)})
    text = str(error.value)
    assert f"{path}: the state dict does not fit the model" in text
    assert "misshapen: transformers.0.blocks.0.mlp.fc1.weight is (230, 64), expected (256, 64)" in text
    assert "unexpected: transformers.2.blocks.11.norm1.weight" in text
    assert text.endswith("They are those of sret_t_wo_slice_distill_384")
    assert not (tmp_path / "x").exists()


def test_other_classes_need_to_be_asked_for(tmp_path) -> None:
    fields = {**FIELDS, "num_classes": 1000}
    with pytest.raises(sret_jax.UserError, match=r"of 10 classes, the model has 1000: .*--num-classes"):
        convert(golden.FOLDER / "tiny_plain.pth", tmp_path / "x", name="sret_t", fields=fields)
    kept = convert(golden.FOLDER / "tiny_plain.pth", tmp_path / "kept", name="sret_t", fields=fields, num_classes=10)
    with pytest.warns(UserWarning, match="head of 7 classes is fresh"):
        fresh = convert(golden.FOLDER / "tiny_plain.pth", tmp_path / "x", name="sret_t", fields=fields, num_classes=7)
    assert (kept.num_classes, fresh.num_classes) == (10, 7)
    kernel = np.asarray(store.read(tmp_path / "kept").variables["params"]["head"]["kernel"])
    np.testing.assert_array_equal(kernel, CASE.state_dict["head.weight"].T)
    assert store.read(tmp_path / "x").variables["params"]["head"]["kernel"].shape == (32, 7)


def test_another_image_size_is_resized_to_and_told(tmp_path) -> None:
    fields = {**FIELDS, "image_size": 128}
    with pytest.warns(UserWarning, match="resized from 64 to 128 pixels"):
        convert(golden.FOLDER / "tiny_plain.pth", tmp_path / "x", name="sret_t", fields=fields)
    stored = store.read(tmp_path / "x")
    assert stored.variables["params"]["pos_embed"].shape == (16, 16, 8)
    assert stored.model == TINY.copy(image_size=128)


def test_our_formats_convert_into_each_other(tmp_path) -> None:
    convert(golden.FOLDER / "tiny_plain.pth", tmp_path / "a", name="sret_t", fields=FIELDS)
    assert convert(tmp_path / "a", tmp_path / "b.safetensors") == TINY
    jax.tree.map(
        np.testing.assert_array_equal,
        sret_jax.load_variables(tmp_path / "a"),
        sret_jax.load_variables(tmp_path / "b.safetensors"),
    )


def test_variables_without_a_model_need_its_name(tmp_path) -> None:
    sret_jax.save_variables(tmp_path / "a", draws.random_variables(TINY))
    with pytest.raises(sret_jax.UserError, match="nothing says which model these variables are of: give --model"):
        convert(tmp_path / "a", tmp_path / "b")
    assert convert(tmp_path / "a", tmp_path / "b", name="sret_t", fields=FIELDS) == TINY


def test_nan_weights_are_told_by_name(run, tmp_path) -> None:
    state_dict = {**CASE.state_dict, "norm.bias": np.full(32, np.nan, np.float32)}
    (tmp_path / "x.pth").write_bytes(torch_file_content(state_dict))
    done = run(tmp_path / "x.pth", tmp_path / "x", *tiny_flags())
    assert done.returncode == 0
    assert done.stderr == "warning: 1 tensors hold NaN or infinity: norm.bias\n"


def test_what_exists_is_replaced_when_asked(run, tmp_path) -> None:
    run(golden.FOLDER / "tiny_plain.pth", tmp_path / "a", *tiny_flags())
    for destination, flags in (("a.pth", ["--reverse"]), ("b", []), ("b.safetensors", [])):
        assert [run(tmp_path / "a", tmp_path / destination, *flags).returncode for _ in range(2)] == [0, 1]
        assert run(tmp_path / "a", tmp_path / destination, *flags, "--overwrite").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.pth", "b", "b.safetensors"]


def test_a_fetched_checkpoint_is_converted_and_its_checksum_told(run, tmp_path, monkeypatch) -> None:
    fetched = official(sret_jax.create_model("sret_t_wo_slice_distill_384"), tmp_path / "fetched.pth")
    asked = []
    monkeypatch.setattr("sret_jax.weights.download.download", lambda name: asked.append(name) or fetched)
    done = run("--download", "--model=SReT_T_wo_slice_finetune_384", tmp_path / "x")
    checksum = hashlib.sha256(fetched.read_bytes()).hexdigest()
    assert done.stdout.startswith(f"fetched  {fetched}: SHA-256 {checksum}\nread     {fetched}")
    assert (done.returncode, asked) == (0, ["SReT_T_wo_slice_finetune_384"])
    assert store.read(tmp_path / "x").name == "sret_t_wo_slice_distill_384"


def test_refusals_are_one_line_and_status_1(run, tmp_path) -> None:
    def refusal(*arguments: str | pathlib.Path) -> str:
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        return done.stderr

    good = golden.FOLDER / "tiny_plain.pth"
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:-1000])
    assert "cut.pth cannot be loaded: it is a zip archive that is damaged or cut short" in refusal(
        tmp_path / "cut.pth", tmp_path / "x", *tiny_flags()
    )
    assert "--reverse writes files that end in .pth" in refusal(good, tmp_path / "x.pth", *tiny_flags())
    (tmp_path / "there").mkdir()
    assert "exists: give another name" in refusal(good, tmp_path / "there", *tiny_flags())
    assert "there is no model 'sret_x'" in refusal(good, tmp_path / "x", "--model=sret_x")
    assert "models have no field 'depth'" in refusal(good, tmp_path / "x", "--model=sret_t", "--field=depth=3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pth", "there"]


@pytest.mark.parametrize("arguments", [["x.pth"], ["--download", "x"], ["--field=3", "x", "y"], ["a", "b", "c"]])
def test_arguments_that_make_no_sense_are_refused_with_the_usage(arguments: list[str], run) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_errors_name_the_options_of_whoever_called(run, tmp_path) -> None:
    sret_jax.save_variables(tmp_path / "a", sret_jax.from_torch_state_dict(CASE.state_dict, TINY), TINY, name="sret_t")
    done = run(tmp_path / "a", tmp_path / "b", "--ema")
    assert done.returncode == 1
    assert "without --ema" in done.stderr
    (tmp_path / "c").mkdir()
    assert "--overwrite" in run(tmp_path / "a", tmp_path / "c").stderr
    with pytest.raises(sret_jax.UserError, match="fresh_head=True") as error:
        sret_jax.load_variables(tmp_path / "a", TINY.copy(num_classes=3))
    assert "--" not in str(error.value)
    with pytest.raises(sret_jax.UserError) as error, options_named(evaluation._OPTIONS):
        sret_jax.load_variables(tmp_path / "a", TINY.copy(num_classes=3))
    assert "config.mode=train, with these weights as config.init_from" in str(error.value)
    assert not any(word in str(error.value) for word in ("--", "fresh_head", "num_classes"))
