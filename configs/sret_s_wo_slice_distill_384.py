"""SReT-S without slices, distilled, fine-tuned at 384 pixels: published top-1 accuracy 83.8 %.

    python train.py --config=configs/sret_s_wo_slice_distill_384.py --config.data.path=/data/tensorflow_datasets

As configs/sret_t_wo_slice_distill_384.py, which explains it.
"""

from ml_collections import ConfigDict

from configs import sret_t_wo_slice_distill_384


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t_wo_slice_distill_384.get_config()
    config.model.name = "sret_s_wo_slice_distill_384"
    config.model.drop_path_rate = 0.2
    config.init_from = "runs/sret_s_wo_slice"
    return config
