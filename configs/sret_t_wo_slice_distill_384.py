r"""SReT-T without slices, distilled, fine-tuned at 384 pixels: published top-1 accuracy 79.7 %.

    python train.py --config=configs/sret_t_wo_slice_distill_384.py --config.data.path=/data/tensorflow_datasets \
        --config.distill.teacher=sret_s_wo_slice=SReT_S_wo_slice.pth

It starts from the network trained at 224 pixels, whose position embedding is resized: --config.init_from names a run,
a converted checkpoint or a .pth file. DeiT's settings for fine-tuning; the augmentation is that of training.
The teacher goes on teaching, at the size of its own input; docs/distillation.md says what it may be.
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_t_wo_slice_distill_384"
    config.init_from = "runs/sret_t_wo_slice_distill"
    config.epochs = 30
    config.batch_size = 512

    config.optimizer.learning_rate = 5e-6  # for 512 images a step
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-8

    config.distill.teacher = "weights/teacher"  # to be given
    config.distill.dtype = "bfloat16"
    return config
