r"""SReT-T, distilled on ImageNet-1k: published top-1 accuracy 77.6 %.

    python train.py --config=configs/sret_t_distill.py --config.data.path=/data/tensorflow_datasets \
        --config.distill.teacher=sret_s_wo_slice=SReT_S_wo_slice.pth

The loss is the teacher's soft labels alone, as the authors' `kd_loss.py` has it; docs/distillation.md says what a
teacher may be. The authors do not say which was theirs, and recommend FKD instead: see configs/sret_lt_fkd.py.
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_t_distill"
    config.distill.teacher = "weights/teacher"  # to be given
    config.distill.dtype = "bfloat16"
    return config
