"""Makes soft labels in advance: `python -m sret_jax.distill`."""
