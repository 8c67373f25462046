"""Tests of sret_jax.data.pipeline."""

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sret_jax.data.pipeline import Batch, eval_batches, steps_per_epoch, train_batches
from sret_jax.data.sources import Source, open_source
from sret_jax.errors import UserError

# The numbered source has 23 examples: 5 batches of 4 in an epoch, 3 examples dropped.
STEPS, BATCH = 5, 4


def take(source: Source, count: int, **arguments: Any) -> list[Batch]:
    """The first `count` training batches."""
    arguments = {"batch_size": BATCH, "image_size": 8, "seed": 0, "num_threads": 2} | arguments
    return list(itertools.islice(train_batches(source, **arguments), count))


def encode(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def test_an_epoch_holds_each_example_at_most_once_in_an_order_of_its_own(numbered_source: Source) -> None:
    labels = np.stack([batch["label"] for batch in take(numbered_source, 4 * STEPS)]).reshape(4, STEPS * BATCH)
    for epoch in labels:
        assert len(set(epoch)) == STEPS * BATCH
    for one, other in itertools.combinations([*labels, np.arange(STEPS * BATCH)], 2):
        assert np.sum(one == other) < STEPS * BATCH / 2
    assert len({frozenset(epoch) for epoch in labels}) > 1, "the same examples are dropped in every epoch"


def test_the_seed_decides_on_the_batches(numbered_source: Source) -> None:
    first, again, other = (take(numbered_source, STEPS, seed=seed) for seed in [3, 3, 4])
    np.testing.assert_equal(first, again)
    assert [batch["label"].tolist() for batch in first] != [batch["label"].tolist() for batch in other]


def test_an_image_is_cropped_anew_in_each_epoch(numbered_source: Source) -> None:
    crops: dict[int, list[bytes]] = {}
    for batch in take(numbered_source, 3 * STEPS):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            crops.setdefault(int(label), []).append(image.tobytes())
    assert all(len(set(images)) == len(images) for images in crops.values())


@pytest.mark.parametrize("first_batch", [0, 1, 4, 5, 12])
def test_continuing_at_a_batch_equals_an_uninterrupted_run(numbered_source: Source, first_batch: int) -> None:
    uninterrupted = take(numbered_source, 15)
    continued = take(numbered_source, 15 - first_batch, first_batch=first_batch)
    np.testing.assert_equal(continued, uninterrupted[first_batch:])


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[3], [0], [2], [1]], [[2, 0, 3], [1]]])
def test_a_row_of_a_batch_is_the_same_whoever_loads_it(numbered_source: Source, shares: list[list[int]]) -> None:
    whole = take(numbered_source, 7, first_batch=3, repeats=3)
    for rows in shares:
        share = take(numbered_source, 7, first_batch=3, repeats=3, rows=rows)
        np.testing.assert_equal(share, [{name: batch[name][rows] for name in batch} for batch in whole])


def test_when_the_number_of_hosts_changes_no_example_is_repeated_or_missed(numbered_source: Source) -> None:
    seen: list[int] = []
    # Two epochs: three batches on two hosts, four on one, three on four.
    for first_batch, count, hosts in [(0, 3, 2), (3, 4, 1), (7, 3, 4)]:
        shares = np.split(np.arange(BATCH), hosts)
        loaded = [take(numbered_source, count, first_batch=first_batch, rows=rows.tolist()) for rows in shares]
        for batches in zip(*loaded, strict=True):
            seen.extend(np.concatenate([batch["label"] for batch in batches]).tolist())
    for epoch in np.split(np.array(seen), 2):
        assert len(epoch) == len(set(epoch.tolist())) == STEPS * BATCH


def test_train_batches_have_the_shapes_and_types_promised(digits_folder: Any) -> None:
    source = open_source("digits", "train", str(digits_folder))
    (batch,) = take(source, 1, image_size=20, batch_size=32)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((32, 20, 20, 3), np.dtype(np.uint8)),
        "label": ((32,), np.dtype(np.int32)),
    }
    np.testing.assert_array_equal(batch["image"][..., 0], batch["image"][..., 2])


def test_a_crop_of_everything_is_nearly_pillows_bicubic_resize() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(50, 50, 3), dtype=np.uint8)
    source = Source([{"image": encode(pixels), "label": 6}], 10, "one")
    (batch,) = take(source, 1, batch_size=1, image_size=32, crop_area=(1, 1), crop_aspect=(1, 1))
    resized = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.abs(batch["image"][0].astype(int) - np.asarray(resized))
    assert difference.max() <= 10 and difference.mean() < 0.5  # of noise, the worst case
    assert batch["label"] == [6]


def test_training_crops_lie_in_the_ranges_asked_for() -> None:
    # Red rises by 1 a column, green by 1 a row: the slopes of a resized crop tell the crop's sides.
    columns, rows = np.meshgrid(np.arange(250), np.arange(200))
    ramps = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)
    source = Source([{"image": ramps, "label": 0}], 1, "ramps")
    batches = take(source, 200, batch_size=1, image_size=32, crop_area=(0.2, 0.5), crop_aspect=(0.5, 1.5))
    images = np.concatenate([batch["image"] for batch in batches]).astype(float)
    widths = (images[:, 16, 28, 0] - images[:, 16, 4, 0]) * 32 / 24
    heights = (images[:, 28, 16, 1] - images[:, 4, 16, 1]) * 32 / 24
    areas, aspects = widths * heights / (250 * 200), widths / heights
    assert 0.19 < areas.min() < 0.23 and 0.47 < areas.max() < 0.52
    assert 0.48 < aspects.min() < 0.55 and 1.4 < aspects.max() < 1.55
    np.testing.assert_array_equal(images[:, 4, :, 0], images[:, 28, :, 0])


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 24, 30])
def test_evaluation_sees_every_example_once(numbered_source: Source, hosts: int, batch_size: int) -> None:
    local = batch_size // hosts
    shares = [
        list(eval_batches(numbered_source, batch_size=batch_size, image_size=8, rows=rows, num_threads=2))
        for rows in (range(host * local, (host + 1) * local) for host in range(hosts))
    ]
    assert {len(batches) for batches in shares} == {-(-23 // batch_size)}
    seen: list[int] = []
    for batch in itertools.chain(*shares):
        assert batch["image"].shape == (local, 8, 8, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (local,) and batch["label"].dtype == np.int32
        assert batch["mask"].shape == (local,) and batch["mask"].dtype == np.bool_
        assert not batch["image"][~batch["mask"]].any()
        seen.extend(batch["label"][batch["mask"]])
    assert sorted(seen) == list(range(23))


def test_evaluation_on_one_host_keeps_the_order_of_the_source(numbered_source: Source) -> None:
    batches = eval_batches(numbered_source, batch_size=8, image_size=8, num_threads=4)
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, [*range(23), 0])


def test_evaluation_resizes_the_shorter_side_and_keeps_the_centre() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(100, 60, 3), dtype=np.uint8)
    wide, tall = np.ascontiguousarray(pixels.transpose(1, 0, 2)), pixels
    source = Source([{"image": encode(wide), "label": 0}, {"image": tall, "label": 1}], 2, "two")
    (batch,) = eval_batches(source, batch_size=2, image_size=28, num_threads=2)
    # 28 / 0.875 = 32 and 100 / 60 * 32 = 53.3; what is left over beside the crop is 4 and 25, of which 2 and 12 before.
    resized = Image.fromarray(wide).resize((53, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batch["image"][0], np.asarray(resized)[2:30, 12:40])
    resized = Image.fromarray(tall).resize((32, 53), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batch["image"][1], np.asarray(resized)[12:40, 2:30])


def test_evaluation_at_384_resizes_to_438_as_deit_does() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(100, 100, 3), dtype=np.uint8)
    (batch,) = eval_batches(Source([{"image": pixels, "label": 0}], 1, "one"), batch_size=1, image_size=384)
    resized = Image.fromarray(pixels).resize((438, 438), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batch["image"][0], np.asarray(resized)[27:411, 27:411])


def broken_source(name: str) -> Source:
    """Eight images, of which 0, 1, 6 and 7 are good."""
    good = encode(np.full((8, 8, 3), 9, np.uint8))
    images = [good, good, good[:-30], b"not an image", b"", good, good, good]
    labels = [0, 1, 2, 3, 4, 8, 6, 7]
    return Source([{"image": i, "label": k} for i, k in zip(images, labels, strict=True)], 8, name)


REASONS = [
    "image 2 of {0} is left out: it does not decode: image file is truncated",
    "image 3 of {0} is left out: it does not decode: it is no JPEG, PNG, WebP, BMP, TIFF, PPM or PGM, or one of an "
    "unusual kind",
    "image 4 of {0} is left out: it is empty",
    "image 5 of {0} is left out: its label 8 is none of the classes 0 to 7",
]


def messages_of(source: Source, caplog: pytest.LogCaptureFixture) -> list[str]:
    return sorted(record.getMessage() for record in caplog.records if source.name in record.getMessage())


def test_a_broken_image_is_reported_once_and_replaced_by_the_next_good_one_in_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = broken_source("training")
    for batch in take(source, 6, batch_size=8, max_broken=4):
        assert sorted(batch) == ["image", "label"]
        assert sorted(batch["label"]) == [0, 1, 6, 6, 6, 6, 6, 7]
        assert (batch["image"] == 9).all()
    assert messages_of(source, caplog) == [reason.format(source.name) for reason in REASONS]


def test_a_broken_image_is_reported_once_and_masked_in_every_evaluation_with_and_without_workers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = broken_source("evaluation")
    for num_workers in (0, 0, 2):
        batches = list(eval_batches(source, batch_size=5, image_size=8, num_workers=num_workers, max_broken=4))
        assert [sorted(batch) for batch in batches] == [["image", "label", "mask"]] * 2
        labels, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("label", "mask"))
        np.testing.assert_array_equal(labels, [0, 1, 0, 0, 0, 0, 6, 7, 0, 0])
        np.testing.assert_array_equal(mask, [1, 1, 0, 0, 0, 0, 1, 1, 0, 0])
        assert not np.concatenate([batch["image"] for batch in batches])[~mask].any()
        assert messages_of(source, caplog) == [reason.format(source.name) for reason in REASONS]


class NamedExamples(list[dict[str, Any]]):
    """Examples that know their files."""

    def file_name(self, index: int) -> str:
        return f"folder/{index}.jpg"


def test_a_broken_image_is_reported_by_the_name_of_its_file(caplog: pytest.LogCaptureFixture) -> None:
    good = {"image": np.zeros((8, 8, 3), np.uint8), "label": 0}
    source = Source(NamedExamples([good, {"image": b"", "label": 0}]), 1, "named")
    list(eval_batches(source, batch_size=2, image_size=8))
    assert "folder/1.jpg is left out: it is empty" in caplog.messages


def test_what_the_disk_does_not_give_is_reported_with_its_reason(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "images")
    source = open_source("folder", "val", str(folder))
    (folder / "val" / "cat" / "cat_1.JPEG").unlink()
    (batch,) = eval_batches(source, batch_size=6, image_size=8)
    assert batch["mask"].sum() == 5
    assert f"{folder}/val/cat/cat_1.JPEG is left out: it cannot be read: No such file or directory" in caplog.messages


def test_more_broken_images_than_allowed_are_the_users_error() -> None:
    source = broken_source("too many")
    message = r"of too many's 8 images are broken, among them image . of too many, .*Expected at most 3.*max_broken"
    with pytest.raises(UserError, match=message):
        take(source, 6, batch_size=8, max_broken=3)
    with pytest.raises(UserError, match=message):
        list(eval_batches(source, batch_size=8, image_size=8, max_broken=3))


def test_a_source_of_broken_images_is_the_users_error() -> None:
    source = Source([{"image": b"broken", "label": 0}] * 40, 1, "all broken")
    with pytest.raises(UserError, match="40 of all broken's 40 images are broken"):
        take(source, 1)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_worker_processes_change_nothing(numbered_source: Source, num_workers: int) -> None:
    arguments = {"first_batch": 3, "repeats": 3, "rand_augment": "rand-m9-mstd0.5-inc1", "rows": [1, 3]}
    batches = take(numbered_source, 9, num_workers=num_workers, **arguments)
    np.testing.assert_equal(batches, take(numbered_source, 9, **arguments))
    assert all(type(array) is np.ndarray for batch in batches for array in batch.values())


def test_an_image_is_repeated_side_by_side_and_cropped_anew(numbered_source: Source) -> None:
    batches = take(numbered_source, 2 * STEPS, repeats=3)
    labels = np.concatenate([batch["label"] for batch in batches]).reshape(2, STEPS * BATCH)
    images = np.concatenate([batch["image"] for batch in batches])
    order = np.concatenate([batch["label"] for batch in take(numbered_source, 2 * STEPS)]).reshape(2, STEPS * BATCH)
    np.testing.assert_array_equal(labels, np.repeat(order, 3, axis=1)[:, : STEPS * BATCH])
    assert len({image.tobytes() for image in images}) == len(images)


def test_steps_per_epoch_counts_complete_batches(numbered_source: Source) -> None:
    assert [steps_per_epoch(numbered_source, size) for size in [1, 4, 11, 12, 23]] == [23, 5, 2, 1, 1]


def test_a_batch_larger_than_the_source_is_the_users_error(numbered_source: Source) -> None:
    with pytest.raises(UserError, match="batch size is 24, but numbered has only 23 examples"):
        train_batches(numbered_source, batch_size=24, image_size=8, seed=0)
