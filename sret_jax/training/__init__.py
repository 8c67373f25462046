"""A run, from a config to a checkpoint: optimizer, step, mesh, checkpoints, report."""
