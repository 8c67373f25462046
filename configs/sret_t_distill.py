"""SReT-T, distilled on ImageNet-1k: published top-1 accuracy 77.6 %.

    python train.py --config=configs/sret_t_distill.py --config.data.path=/data/tensorflow_datasets

The published accuracy is reached by distilling from a teacher. These are the settings beside that: without a teacher,
this trains the same network from labels.
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_t_distill"
    return config
