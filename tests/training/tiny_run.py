"""A config for tests: the digits as they are, a network that compiles in seconds, eleven steps an epoch."""

from ml_collections import ConfigDict

from sret_jax.training.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.epochs = 3
    config.batch_size = 128

    config.model.image_size = 32
    config.model.widths = (8, 16)
    config.model.heads = (1, 2)
    config.model.blocks = (1, 2)
    config.model.recursions = (2, 2)
    config.model.slices = ((4, 2), (2, 1))
    config.model.mlp_ratio = 2.0
    config.model.scan_unroll = False

    config.data.crop_area = (0.7, 1.0)
    config.augment.flip = 0.5
    config.augment.label_smoothing = 0.1

    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.05
    config.log_every_steps = 4
    return config
