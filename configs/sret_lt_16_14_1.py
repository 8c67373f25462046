"""SReT-LT with 16, 14 and 1 slices on ImageNet-1k from scratch: published top-1 accuracy 76.6 %.

python train.py --config=configs/sret_lt_16_14_1.py --config.data.path=/data/tensorflow_datasets
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_lt_16_14_1"
    return config
