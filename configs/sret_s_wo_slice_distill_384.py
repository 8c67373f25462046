"""SReT-S without slices, distilled, fine-tuned at 384 pixels: published top-1 accuracy 83.8 %.

    python train.py --config=configs/sret_s_wo_slice_distill_384.py --config.data.path=/data/tensorflow_datasets

It starts from the network trained at 224 pixels, whose position embedding is resized: --config.init_from names a run,
a converted checkpoint or a .pth file. DeiT's settings for fine-tuning; the augmentation is that of training.
The published accuracy is that of a distilled network, fine-tuned with its teacher.
"""

from ml_collections import ConfigDict

from configs import sret_t


def get_config() -> ConfigDict:
    """See the file."""
    config = sret_t.get_config()
    config.model.name = "sret_s_wo_slice_distill_384"
    config.model.drop_path_rate = 0.2
    config.init_from = "runs/sret_s_wo_slice"
    config.epochs = 30
    config.batch_size = 512

    config.optimizer.learning_rate = 5e-6  # for 512 images a step
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-8
    return config
