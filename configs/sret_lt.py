"""SReT-LT on ImageNet-1k from scratch: published top-1 accuracy 76.7 %.

python train.py --config=configs/sret_lt.py --config.data.path=/data/tensorflow_datasets
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_lt"
    return config
