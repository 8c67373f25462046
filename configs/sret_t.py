r"""SReT-T on ImageNet-1k from scratch: published top-1 accuracy 76.0 %, 4.8 M parameters, 1.1 G FLOPs.

    python train.py --config=configs/sret_t.py --config.data.path=/data/tensorflow_datasets
    python train.py --config=configs/sret_t.py --config.data.source=folder --config.data.path=/data/imagenet
    python train.py --config=configs/sret_t.py --config.data.source=synthetic --config.data.synthetic_examples=64 \
        --config.batch_size=16 --config.epochs=1 --workdir=runs/dry   # a dry run, without data

DeiT's recipe with the learning rate and warm-up that SReT's authors recommend. The other configs for ImageNet start
from this one.
"""

from ml_collections import ConfigDict

from sret_jax.training.config import base_config


def get_config() -> ConfigDict:
    """See the file."""
    config = base_config()
    config.epochs = 300
    config.batch_size = 1024
    config.ema_decay = 0.99996

    config.model.name = "sret_t"
    config.model.dtype = "bfloat16"
    config.model.drop_path_rate = 0.1

    config.data.source = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.crop_area = (0.08, 1.0)
    config.data.crop_aspect = (3 / 4, 4 / 3)
    config.data.rand_augment = "rand-m9-mstd0.5-inc1"
    config.data.repeats = 3
    config.data.eval_crop_ratio = 0.875

    config.augment.flip = 0.5
    config.augment.erasing = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.label_smoothing = 0.1

    config.optimizer.learning_rate = 1e-3  # for 512 images a step: 2e-3 for 1024
    config.optimizer.warmup_epochs = 30.0
    config.optimizer.initial_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.weight_decay = 0.05

    return config
