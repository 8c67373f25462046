"""The network: pure functions of (variables, images). Needs only jax, flax and numpy."""
