import pytest

from sret_jax import UserError
from sret_jax.data.passes import Pass, Passes, fkd_passes


def authors_loop(epochs: int, num_crops: int, warmup_epochs: int) -> list[tuple[int, int]]:
    """First epoch and crops of every pass, as nested loops of the authors' kind go through them."""
    passes = [(epoch, 1) for epoch in range(warmup_epochs)]
    epoch = warmup_epochs
    while epoch < epochs:
        crops = num_crops if epoch < epochs - num_crops else 1
        passes.append((epoch, crops))
        epoch += crops
    return passes


def test_300_epochs_of_4_crops_after_5_of_warm_up_are_5_epochs_73_passes_and_3_epochs() -> None:
    passes = fkd_passes(300, 4, 5)
    of_epoch = [passes.at(epoch) for epoch in range(300)]
    expected = [1] * 5 + [4] * (73 * 4) + [1] * 3
    assert [one.crops for one in of_epoch] == expected
    assert [one.first_epoch for one in of_epoch] == [
        *range(5),
        *(first for first in range(5, 297, 4) for _ in range(4)),
        *range(297, 300),
    ]
    assert [one.number for one in passes.planned] == list(range(81))


@pytest.mark.parametrize(
    ("epochs", "num_crops", "warmup_epochs"),
    [(300, 4, 5), (300, 4, 4), (100, 8, 5), (300, 1, 5), (12, 5, 0), (3, 1, 5), (20, 3, 20)],
)
def test_passes_are_those_of_the_authors_loop(epochs: int, num_crops: int, warmup_epochs: int) -> None:
    if num_crops > 1 and all(crops == 1 for _, crops in authors_loop(epochs, num_crops, warmup_epochs)):
        with pytest.raises(UserError, match=r"3 crops .* never taken in 20 epochs, of which 20 are warm-up"):
            fkd_passes(epochs, num_crops, warmup_epochs)
        return
    planned = [(one.first_epoch, one.crops) for one in fkd_passes(epochs, num_crops, warmup_epochs).planned]
    assert planned == authors_loop(epochs, num_crops, min(warmup_epochs, epochs))


def test_beyond_the_plan_and_without_one_every_epoch_is_a_pass_with_one_crop() -> None:
    assert [Passes().at(epoch) for epoch in (0, 7)] == [Pass(0, 0, 1), Pass(7, 7, 1)]
    planned = fkd_passes(9, 3, 1)
    assert planned.at(8) == planned.planned[-1]
    last = planned.planned[-1].number
    assert [planned.at(epoch) for epoch in (9, 11)] == [Pass(last + 1, 9, 1), Pass(last + 3, 11, 1)]


def test_a_part_of_an_epoch_of_warm_up_counts_as_a_whole_one() -> None:
    assert fkd_passes(20, 2, 1.5) == fkd_passes(20, 2, 2)
