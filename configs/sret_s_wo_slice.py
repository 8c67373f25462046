"""SReT-S without slices on ImageNet-1k from scratch: published top-1 accuracy 82.0 %.

python train.py --config=configs/sret_s_wo_slice.py --config.data.path=/data/tensorflow_datasets
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_s_wo_slice"
    config.model.drop_path_rate = 0.2
    return config
