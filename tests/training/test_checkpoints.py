import contextlib
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.files import seal
from sret_jax.training.checkpoints import Checkpoints, began_with
from sret_jax.training.mesh import make_mesh, replicated
from sret_jax.training.step import TrainState

IDENTITY = {"config.model.name": "sret_t", "config.seed": 0}


def make_state(step):
    random = np.random.default_rng(step)
    state = TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(0),
        params={"kernel": jnp.asarray(random.normal(size=(300, 50)), jnp.float32), "bias": jnp.zeros(3)},
        batch_stats={"mean": jnp.ones(2)},
        opt_state=(jnp.int32(step),),
    )
    return jax.device_put(state, replicated(make_mesh({"data": -1}, 8)))


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))


def open_checkpoints(workdir, identity=IDENTITY):
    return Checkpoints(str(workdir), keep=2, identity=identity)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("written")
    with open_checkpoints(workdir) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), {"accuracy": step / 100})
            checkpoints.wait()
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    return pathlib.Path(shutil.copytree(written, tmp_path / "run"))


def restore(workdir):
    said = []
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(LIKE, said.append), said


def assert_is(restored, step):
    state, metrics = restored
    assert metrics == {"accuracy": step / 100}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


def test_a_new_workdir_has_no_checkpoint(tmp_path):
    assert restore(tmp_path / "new" / "run") == (None, [])


def test_the_latest_comes_back_bit_for_bit_with_its_shardings(workdir):
    restored, said = restore(workdir)
    assert_is(restored, 30)
    assert said == []
    assert restored[0].params["kernel"].sharding == make_state(0).params["kernel"].sharding


def test_only_the_latest_are_kept(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "30"]


def test_the_best_is_kept_beside_the_latest(tmp_path):
    accuracies = {10: 0.2, 20: 0.5, 30: 0.4, 40: 0.5, 50: 0.1, 60: 0.1}
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None
        for step, accuracy in accuracies.items():
            ema = {"ema_accuracy": 0.6} if step == 30 else {}
            checkpoints.save(step, make_state(step), {"accuracy": accuracy, **ema})
        assert checkpoints.best_step() == 30
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["30", "50", "60"]


def test_a_checkpoint_between_evaluations_is_not_the_best_and_knows_the_last_one(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(10), {"accuracy": 0.1})
        for step in (11, 12, 13):
            checkpoints.save(step, make_state(step), {"accuracy": 0.1}, is_new=False)
        assert checkpoints.best_step() == 10
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12", "13"]
    (state, evaluation), _ = restore(tmp_path)
    assert int(state.step) == 13
    assert evaluation == {"accuracy": 0.1}


def test_of_equally_good_checkpoints_the_first_is_the_best_after_a_restart_too(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), {"accuracy": 0.5}, is_new=True)
        best = checkpoints.best_step()
    assert best == 10
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == min(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())


def test_an_evaluation_of_another_step_makes_no_checkpoint_the_best(tmp_path):
    # The evaluation after step 10 was good, but that step has no checkpoint.
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(11, make_state(11), {"accuracy": 0.9}, is_new=False)
        assert checkpoints.best_step() is None
        checkpoints.save(20, make_state(20), {"accuracy": 0.1})
        assert checkpoints.best_step() == 20
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 20


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    spend = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30, 40):
            state = make_state(step)
            checkpoints.save(step, state, {"accuracy": step / 100})
            spend(state)
    assert_is(restore(tmp_path)[0], 40)


def test_a_save_that_fails_in_the_background_is_an_error_and_leaves_what_was_there(workdir, monkeypatch):
    def full(folder, *, only_folders):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sret_jax.training.checkpoints.seal", full)
    with pytest.raises(UserError, match="No space left on device"), open_checkpoints(workdir) as checkpoints:
        checkpoints.save(40, make_state(40), {"accuracy": 0.4})
        checkpoints.wait()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == ["20", "30"]
    monkeypatch.undo()
    assert_is(restore(workdir)[0], 30)


def data_files(workdir):
    """Files of checkpoint 30 that hold what was saved, largest first: tensors, then metadata."""
    files = [path for path in (workdir / "checkpoints" / "30").glob("*/**/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, change, os.remove])
@pytest.mark.parametrize("largest", [True, False])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(workdir, damage, largest):
    damage(data_files(workdir)[0 if largest else -1])
    restored, said = restore(workdir)
    assert_is(restored, 20)
    assert len(said) == 1
    assert "checkpoint 30 is damaged" in said[0]
    assert (workdir / "damaged_checkpoints" / "30").is_dir()


def test_a_checkpoint_without_checksums_counts_as_damaged(workdir):
    (workdir / "checkpoints" / "30" / "checksums.json").unlink()
    restored, said = restore(workdir)
    assert_is(restored, 20)
    assert "checkpoint 30 is damaged (it has no checksums)" in said[0]


@pytest.mark.parametrize("damage", [cut, empty, change, os.remove])
def test_damage_to_what_orbax_notes_for_itself_does_not_matter(workdir, damage):
    for file in (workdir / "checkpoints" / "30").iterdir():
        if file.is_file() and file.name != "checksums.json":
            damage(file)
    assert_is(restore(workdir)[0], 30)


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(workdir):
    cut(data_files(workdir)[0])
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.restore_latest(LIKE, lambda _: None)
        checkpoints.save(30, make_state(30), {"accuracy": 0.3})
    assert_is(restore(workdir)[0], 30)


def test_if_all_are_damaged_nothing_begins_anew_unasked_and_nothing_is_moved(workdir):
    for step in ("20", "30"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    with pytest.raises(UserError) as error:
        restore(workdir)
    assert "checkpoint 30 is damaged" in str(error.value)
    assert "checkpoint 20 is damaged" in str(error.value)
    assert "no other is left" in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "30"]


def test_what_a_killed_save_left_behind_is_not_a_checkpoint(workdir):
    half = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "30", half)
    shutil.rmtree(half / "evaluation")
    restored, said = restore(workdir)
    assert_is(restored, 30)
    assert said == []
    assert not half.exists()


def test_another_runs_workdir_is_refused_with_every_difference(workdir):
    with pytest.raises(UserError) as error:
        open_checkpoints(workdir, {"config.model.name": "sret_s", "config.seed": 0, "config.epochs": 3})
    assert "config.model.name is sret_t there, sret_s now" in str(error.value)
    assert "config.epochs is absent there, 3 now" in str(error.value)
    assert "seed" not in str(error.value)


def test_the_workdir_keeps_its_identity_as_json(workdir):
    assert json.loads((workdir / "config.json").read_text()) == IDENTITY


def test_a_run_that_is_to_be_longer_is_told_how_to_begin_from_these_weights(workdir):
    with pytest.raises(UserError, match=f"for a longer run too: --config.init_from={workdir}"):
        open_checkpoints(workdir, {**IDENTITY, "config.epochs": 600})


def test_what_a_damaged_config_json_says_is_shown_in_short(workdir):
    there = {**IDENTITY, "config.seed": "9" * 10_000, "config.model.name": "\x1b[31m\n", "config.epochs": [[[1]]]}
    (workdir / "config.json").write_text(json.dumps(there))
    with pytest.raises(UserError) as error:
        open_checkpoints(workdir)
    assert f"config.seed is {'9' * 200}… there, 0 now" in str(error.value)
    assert r"config.model.name is \x1b[31m\n there" in str(error.value)


@pytest.mark.parametrize("name", [".lock", ".space", "config.json", "config.json.new"])
def test_nothing_is_written_through_a_link_in_a_workdir(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    refused = pytest.raises(UserError, match="symbolic link") if name == ".lock" else contextlib.nullcontext()
    with refused, open_checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(10, make_state(10), {"accuracy": 0.1})
    assert victim.read_text() == "precious"


def test_a_link_in_the_place_of_a_checkpoint_that_is_not_complete_is_removed(workdir, tmp_path):
    precious = tmp_path / "precious"
    (precious / "cat").mkdir(parents=True)
    (workdir / "checkpoints" / "40.orbax-checkpoint-tmp").symlink_to(precious)
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save(40, make_state(40), {"accuracy": 0.4})
    assert_is(restore(workdir)[0], 40)
    assert (precious / "cat").is_dir()


@pytest.mark.parametrize("kind", ["file", "empty", "digits of another script", "link", "thirty digits", "not UTF-8"])
def test_what_is_no_checkpoint_beside_them_ends_no_run(workdir, kind, tmp_path):
    folder = workdir / "checkpoints"
    {
        "file": lambda: (folder / "40").write_text(""),
        "empty": lambda: (folder / "40").mkdir(),
        "digits of another script": lambda: (folder / "٤٠").mkdir(),
        "link": lambda: (folder / "40").symlink_to(tmp_path),
        "thirty digits": lambda: (folder / ("9" * 30)).mkdir(),
        "not UTF-8": lambda: (folder / os.fsdecode(b"40\xff")).mkdir(),
    }[kind]()
    assert_is(restore(workdir)[0], 30)


def test_what_lies_in_damaged_checkpoints_stays(workdir, tmp_path):
    photos = tmp_path / "photos"
    (photos / "30").mkdir(parents=True)
    (photos / "30" / "cat.jpg").write_text("precious")
    (workdir / "damaged_checkpoints").symlink_to(photos)
    cut(data_files(workdir)[0])
    restored, said = restore(workdir)
    assert_is(restored, 20)
    assert "damaged_checkpoints/30.2" in said[0]
    assert (photos / "30" / "cat.jpg").read_text() == "precious" and (photos / "30.2" / "state").is_dir()


@pytest.mark.parametrize(
    "note",
    [
        b"3",
        b"[" * 100_000,
        b'{"metrics": {"accuracy": "0.9"}, "is_new": true}',
        b'{"metrics": {"accuracy": ' + b"9" * 400 + b'}, "is_new": true}',
        b'{"metrics": {}, "is_new": true}',
        b'{"metrics": [], "is_new": false}',
        b'{"metrics": {"accuracy": 0.9}}',
        b'{"metrics": {"accuracy": 0.9}, "is_new": 1, "identity": 3}',
        b"\xff",
    ],
)
def test_an_evaluation_that_no_run_wrote_is_damage_whatever_its_checksum(workdir, note):
    folder = workdir / "checkpoints" / "30"
    (folder / "evaluation" / "metadata").write_bytes(note)
    seal(folder, only_folders=True)
    restored, said = restore(workdir)
    assert_is(restored, 20)
    assert "checkpoint 30 is damaged (evaluation/metadata is not what was written" in said[0]


def test_a_damaged_evaluation_makes_no_checkpoint_the_best(workdir):
    file = workdir / "checkpoints" / "20" / "evaluation" / "metadata"
    file.write_bytes(file.read_bytes().replace(b"0.2", b"0.9"))
    with open_checkpoints(workdir) as checkpoints:
        assert checkpoints.best_step() == 30


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot read or write .*file"):
        open_checkpoints(tmp_path / "file" / "run")


def test_a_workdir_without_checkpoints_can_begin_as_another_run(tmp_path):
    # Such as a smaller batch, after the first one did not fit into memory.
    with open_checkpoints(tmp_path):
        pass
    with open_checkpoints(tmp_path, {"config.seed": 1}):
        assert json.loads((tmp_path / "config.json").read_text()) == {"config.seed": 1}


def test_a_run_from_before_a_key_was_thought_of_goes_on_if_the_key_changes_nothing(workdir):
    for value in (0, 1):
        newer, defaults = (
            {**IDENTITY, "config.new": value},
            {"config.new": 0, "config.model.name": "", "config.seed": 5},
        )
        with pytest.raises(UserError, match=r"config\.new is 0 there, 1 now") if value else contextlib.nullcontext():
            Checkpoints(str(workdir), keep=2, identity=newer, defaults=defaults).__exit__(None, None, None)


def test_a_workdir_tells_what_its_run_began_with(workdir, tmp_path):
    assert [began_with(str(where)) for where in (workdir, tmp_path / "nowhere")] == ["", ""]
    (workdir / "config.json").write_text(json.dumps({**IDENTITY, "config.init_from": "a.pth"}))
    assert began_with(str(workdir)) == "a.pth"
    for step in ("20", "30"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert began_with(str(workdir)) == ""


@pytest.mark.parametrize("content", ["", "[1", "3", "\xff", "[" * 100_000, '[["a", 1]]', "null"])
def test_a_damaged_config_json_is_named(workdir, content):
    (workdir / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_checkpoints(workdir)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        began_with(str(workdir))


def test_what_a_run_began_with_is_read_where_damage_is_noticed(tmp_path):
    identity = {**IDENTITY, "config.init_from": "a.pth"}
    with open_checkpoints(tmp_path, identity) as checkpoints:
        checkpoints.save(10, make_state(10), {"accuracy": 0.1})
    (tmp_path / "config.json").write_text(json.dumps({**identity, "config.init_from": "b.pth"}))
    assert began_with(str(tmp_path)) == "a.pth"


def test_checkpoints_that_nothing_says_what_they_belong_to_are_refused(workdir):
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        open_checkpoints(workdir)


def test_a_second_run_in_the_same_workdir_is_refused_while_the_first_is_there(workdir):
    with open_checkpoints(workdir), pytest.raises(UserError, match="another run is using the workdir"):
        open_checkpoints(workdir)
    with open_checkpoints(workdir):
        pass


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_damaged(workdir, monkeypatch):
    def too_many_open_files(folder):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("sret_jax.files._checksums", too_many_open_files)
    with pytest.raises(UserError, match="Too many open files"):
        restore(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "30"]


def test_a_workdir_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot read or write .*run: Permission denied"):
        open_checkpoints(tmp_path / "run")
