r"""SReT-LT on ImageNet-1k from soft labels made in advance (FKD): published top-1 accuracy 78.7 %.

    python train.py --config=configs/sret_lt_fkd.py --config.data.source=folder --config.data.path=/data/imagenet \
        --config.distill.soft_labels=/data/FKD_soft_label_500_crops_marginal_smoothing_k_5/imagenet

The command of the authors' training code, `-a SReT_LT --lr 0.002 --wd 0.05 --num_crops 4 -b 1024 --cos --temp 1.0
--mixup_cutmix`. The soft labels are theirs, or those that `python -m sret_jax.distill` makes; docs/distillation.md.
"""

from ml_collections import ConfigDict

from sret_jax.training.config import base_config


def get_config() -> ConfigDict:
    """See the file."""
    config = base_config()
    config.epochs = 300
    config.batch_size = 1024

    config.model.name = "sret_lt"
    config.model.dtype = "bfloat16"
    config.model.drop_path_rate = 0.1

    config.data.source = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.eval_crop_ratio = 0.875

    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.partner = "permuted"

    config.distill.soft_labels = "soft_labels"  # to be given
    config.distill.label_type = "marginal_smoothing_k5"
    config.distill.num_crops = 4

    config.optimizer.learning_rate = 1e-3  # for 512 images a step: 2e-3 for 1024
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.initial_learning_rate = 1e-5
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.weight_decay = 0.05

    return config
