"""SReT-S without slices, distilled, fine-tuned at 512 pixels: published top-1 accuracy 84.3 %.

    python train.py --config=configs/sret_s_wo_slice_distill_512.py --config.data.path=/data/tensorflow_datasets

As configs/sret_s_wo_slice_distill_384.py, which explains it.
"""

from ml_collections import ConfigDict

from configs import sret_s_wo_slice_distill_384


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_s_wo_slice_distill_384.get_config()
    config.model.name = "sret_s_wo_slice_distill_512"
    return config
