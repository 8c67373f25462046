import pathlib
import re
import subprocess
import sys

import numpy as np

import sret_jax
from tests.models.draws import random_variables

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_importing_the_library_imports_no_data_or_checkpoint_library():
    run(
        "-c",
        "import sret_jax, sys; assert not {'grain', 'tensorflow_datasets', 'orbax', 'tensorflow', 'torch', 'PIL', "
        "'safetensors', 'gdown'} & set(sys.modules)",
    )


def test_the_training_step_needs_only_jax_flax_optax_and_numpy():
    blocked = ["grain", "tensorflow_datasets", "orbax", "ml_collections", "sklearn", "PIL", "matplotlib"]
    run("-c", f"import sys; sys.modules.update(dict.fromkeys({blocked})); import sret_jax.training.step")


def test_the_benchmark_needs_only_jax_flax_optax_and_numpy():
    blocked = ["grain", "tensorflow_datasets", "orbax", "ml_collections", "sklearn", "PIL", "matplotlib"]
    flags = ["--pool-gradient", "--image-size=32", "--batch-size=1", "--rounds=1", "--seconds=0"]
    start = (  # a program's own folder is on the path
        "import runpy, sys; sys.path.insert(0, 'benchmarks'); "
        f"sys.modules.update(dict.fromkeys({blocked})); sys.argv[1:] = {flags}; "
        "runpy.run_path('benchmarks/train_step.py', run_name='__main__')"
    )
    assert "lax.conv 4×4×64 to 128" in run("-c", start)


def test_every_line_of_the_readmes_library_example_runs(tmp_path, monkeypatch):
    library = README[README.index("## Library") :]
    (example,) = re.findall(r"```python\n(.*?)```", library, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["features"].shape == (2, 256)
    assert names["logits"].shape == (2, 10)
    assert np.isfinite(names["logits"]).all()
    assert set(names["variables"]) == {"params", "batch_stats"}


def test_the_readmes_three_lines_load_weights(tmp_path, monkeypatch):
    official = README[README.index("## Official checkpoints") :]
    example = re.findall(r"```python\n(.*?)```", official, re.DOTALL)[0]
    assert len(example.splitlines()) == 4  # with an empty one
    model = sret_jax.create_model("sret_s")
    monkeypatch.chdir(tmp_path)
    sret_jax.save_variables("weights/sret_s", random_variables(model))
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["variables"]["params"]["head"]["kernel"].shape == (504, 1000)


def test_the_printed_table_and_the_readmes_are_the_same():
    def words(line):
        return re.findall(r"[\w.,]+", line)

    printed = [words(line) for line in run("-m", "sret_jax").splitlines() if line.startswith("sret_")]
    in_readme = [words(line) for line in README.splitlines() if line.startswith("| `sret_")]
    assert [row[0] for row in printed] == sret_jax.list_models()
    assert printed == in_readme


def test_the_public_names_are_those_of_the_contract():
    assert set(sret_jax.__all__) >= {
        "create_model",
        "list_models",
        "from_torch_state_dict",
        "to_torch_state_dict",
        "load_torch_file",
        "load_variables",
        "save_variables",
    }
    assert all(hasattr(sret_jax, name) for name in sret_jax.__all__)
