r"""The student of configs/digits_distill.py, from soft labels made in advance (FKD): no teacher while it learns.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python -m sret_jax.distill --teacher=runs/digits --data=digits --eval-split=test \
        --num-crops=32 --crop-area 0.7 1 --crop-aspect 0.8 1.25 --flip=0 --label-type=ori --temperature=4 \
        --out=runs/digits_labels
    python train.py --config=configs/digits_fkd.py --workdir=runs/digits_fkd
"""

from ml_collections import ConfigDict

from configs import digits_distill


def get_config() -> ConfigDict:
    """See the file."""
    config = digits_distill.get_config()
    config.data.crop_area = (1.0, 1.0)  # crops are those of the soft labels
    config.data.crop_aspect = (1.0, 1.0)
    config.augment.erasing = 0.0
    config.augment.label_smoothing = 0.0

    config.distill.teacher = ""
    config.distill.soft_labels = "runs/digits_labels"
    config.distill.label_type = "ori"  # ten classes are few
    # 8 × 8 pixels become 64 × 64 here: evaluation, which is bicubic, would look unlike bilinear crops.
    config.distill.interpolation = "bicubic"
    config.distill.num_crops = 1  # more would leave few different images in a batch: there are 1437
    return config
