"""Sliced group self-attention (paper, section 3.4): attention inside runs of the token sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.layers import dense, matmul_precision


class SlicedAttention(nn.Module):
    """Multi-head self-attention within `groups` equal runs of the tokens."""

    heads: int
    attn_drop_rate: float = 0.0
    drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, groups: int, permutation: jax.Array | None, train: bool) -> jax.Array:
        """Attend within slices.

        Args:
          x: tokens in raster order, (b, n, c).
          groups: number of slices, a divisor of n; 1 is ordinary attention.
          permutation: order in which the tokens are sliced, int32 (n,), undone before the output projection; None
            keeps raster order.
          train: whether dropout is active (rng "dropout").

        Returns:
          (b, n, c) in `dtype`.
        """
        batch, tokens, width = x.shape
        head_width = width // self.heads
        if permutation is not None:
            x = jnp.take(x, permutation, axis=1, mode="clip", unique_indices=True)

        qkv = dense(3 * width, width, self.dtype, "qkv")(x)
        # b (g m) (3 h d) -> 3 b g h m d. Heads stand in front of the tokens: in the middle, XLA's products are half
        # as fast.
        qkv = qkv.reshape(batch, groups, tokens // groups, 3, self.heads, head_width).transpose(3, 0, 1, 4, 2, 5)
        query, key, value = qkv
        precision = matmul_precision(self.dtype)
        scores = jnp.einsum("bghmd,bghnd->bghmn", query, key, precision=precision, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores * head_width**-0.5).astype(self.dtype)
        weights = nn.Dropout(self.attn_drop_rate, deterministic=not train)(weights)
        x = jnp.einsum("bghmn,bghnd->bghmd", weights, value, precision=precision)
        x = x.transpose(0, 1, 3, 2, 4).reshape(batch, tokens, width)

        if permutation is not None:
            x = jnp.take(x, jnp.argsort(permutation), axis=1, mode="clip", unique_indices=True)
        x = dense(width, width, self.dtype, "proj")(x)
        return nn.Dropout(self.drop_rate, deterministic=not train)(x)
