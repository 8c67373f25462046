"""Sliced group self-attention (paper, section 3.4): attention inside runs of the token sequence."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.layers import Dense, matmul_precision, permute_tokens, recomputed_on_cpus

# Scores of one layer that stay in a CPU's caches without being cut up, and of one piece of those that do not, in
# bytes of float32: benchmarks/attention.py.
_MOST_WHOLE = 16 << 20
_MOST_IN_PIECE = 3 << 20


class SlicedAttention(nn.Module):
    """Multi-head self-attention within `groups` equal runs of the tokens.

    Attributes:
      width: of the tokens.
      heads: number of heads, a divisor of the width.
      norm: what tokens pass first, if there is one.
      attn_drop_rate: dropout on attention weights; where it is active, `implementation` is not asked.
      drop_rate: dropout behind the output projection.
      dtype: compute dtype.
      implementation: a key of `IMPLEMENTATIONS`.
      platform: whose compiler the products are written for, see `Dense`.
    """

    width: int
    heads: int
    norm: nn.LayerNorm | None = None
    attn_drop_rate: float = 0.0
    drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    platform: str = "cpu"

    def setup(self) -> None:
        """Create the layers."""
        self.qkv = Dense(self.width, 3 * self.width, self.dtype, self.platform)
        self.proj = Dense(self.width, self.width, self.dtype, self.platform)
        self.attn_drop = nn.Dropout(self.attn_drop_rate)
        self.proj_drop = nn.Dropout(self.drop_rate)

    def __call__(
        self, x: jax.Array, groups: int, permutation: jax.Array | None, train: bool, gain: jax.Array | None = None
    ) -> jax.Array:
        """Attend within slices.

        Args:
          x: tokens in raster order, (b, n, c).
          groups: number of slices, a divisor of n; 1 is ordinary attention.
          permutation: order in which the tokens are sliced, int32 (n,), undone before the output projection; None
            keeps raster order.
          train: whether dropout is active (rng "dropout").
          gain: a scalar that the output is multiplied with; None for 1.

        Returns:
          (b, n, c) in `dtype`.
        """

        def project(layer: SlicedAttention, x: jax.Array) -> jax.Array:
            if layer.norm is not None:
                x = layer.norm(x)
            if permutation is not None:
                x = permute_tokens(x, permutation)
            return layer.qkv.multiply(x)

        def attended(layer: SlicedAttention, y: jax.Array) -> jax.Array:
            qkv = layer.qkv.add_bias(y)
            if train and self.attn_drop_rate > 0:
                return _attend_whole(qkv, self.heads, groups, functools.partial(layer.attn_drop, deterministic=False))
            return IMPLEMENTATIONS[self.implementation](qkv, self.heads, groups)

        y = recomputed_on_cpus(project, self.platform)(self, x)
        x = recomputed_on_cpus(attended, self.platform)(self, y)
        if permutation is not None:
            x = permute_tokens(x, jnp.argsort(permutation))
        return self.proj_drop(self.proj(x, gain), deterministic=not train)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, dropout: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """softmax(query · keyᵀ / √d) · value for each of x sequences: (x, m, d) each -> (x, m, d) in their dtype.

    Scores and softmax are float32. Without dropout, it is the result that is divided by the softmax's sums, d numbers
    of a row instead of m.
    """
    precision = matmul_precision(query.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scale = query.shape[-1] ** -0.5
    if query.dtype == jnp.float32:
        scores = product("xmd,xnd->xmn", query * scale, key)
    else:  # the scale would round the query
        scores = product("xmd,xnd->xmn", query, key) * scale
    if dropout is not None:
        weights = dropout(nn.softmax(scores).astype(query.dtype))
        return product("xmn,xnd->xmd", weights, value).astype(query.dtype)
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    sums = powers.sum(-1, keepdims=True)
    return (product("xmn,xnd->xmd", powers.astype(query.dtype), value) / sums).astype(query.dtype)


def _attend_whole(
    qkv: jax.Array, heads: int, groups: int, dropout: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """All slices and heads at once; qkv (b, n, 3c), its last axis (3, heads, d), -> (b, n, c)."""
    query, key, value = _split(qkv, heads, groups)
    return _join(attend(query, key, value, dropout), qkv.shape[0], heads, groups)


def _attend_in_pieces(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """A few slices and heads at a time, as many as keep their scores in a CPU's caches."""
    batch, tokens, _ = qkv.shape
    pieces = _count_pieces(batch * groups * heads, tokens // groups)
    if pieces == 1:
        return _attend_whole(qkv, heads, groups)
    query, key, value = _split(qkv, heads, groups)
    # Every piece takes every so many sequence, so that a batch stays split over the devices that share it.
    parts = (a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1) for a in (query, key, value))
    x = jax.lax.map(lambda part: jax.checkpoint(attend)(*part), tuple(parts))
    return _join(x.swapaxes(0, 1).reshape(query.shape), batch, heads, groups)


def _count_pieces(sequences: int, tokens: int) -> int:
    size = 4 * sequences * tokens**2
    if size <= _MOST_WHOLE:
        return 1
    return next(
        n for n in range(1, sequences + 1) if sequences % n == 0 and (size / n <= _MOST_IN_PIECE or n == sequences)
    )


def _attend_fused(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """By a kernel for TPUs that keeps the scores on the chip."""
    from sret_jax.models.fused_attention import fused_attention  # Pallas is slow to import

    return fused_attention(qkv, heads, groups)


def _attend_by_cudnn(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """By NVIDIA's cuDNN, which wants head widths that are multiples of 8, and bfloat16."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1] // groups, qkv.shape[2] // 3 // heads
    # b (g m) (3 h d) -> (b g) m h d for each of the three
    query, key, value = jnp.moveaxis(qkv.reshape(batch * groups, tokens, 3, heads, width), 2, 0)
    padding = ((0, 0), (0, 0), (0, 0), (0, -width % 8))
    query, key, value = (jnp.pad(a, padding) for a in (query, key, value))
    x = jax.nn.dot_product_attention(query, key, value, scale=width**-0.5, implementation="cudnn")
    return x[..., :width].reshape(batch, groups * tokens, heads * width)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "xla": _attend_whole,
    "pieces": _attend_in_pieces,
    "pallas": _attend_fused,
    "cudnn": _attend_by_cudnn,
}
"""Functions of qkv (b, n, 3c), heads and groups that return (b, n, c). "xla": plain XLA, the reference; "pieces": the
same, a few slices at a time, for CPUs; "pallas": a fused kernel for TPUs; "cudnn": NVIDIA's, for bfloat16 on GPUs."""


def fastest(platform: str) -> str:
    """The key of `IMPLEMENTATIONS` that is fastest on devices of a platform, "cpu", "gpu" or "tpu"."""
    return {"cpu": "pieces", "tpu": "pallas"}.get(platform, "xla")


def _split(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """b (g m) (3 h d) -> 3 (b g h) m d. With heads in the middle, XLA's products are half as fast."""
    batch, tokens, width = qkv.shape
    x = qkv.reshape(batch, groups, tokens // groups, 3, heads, width // 3 // heads).transpose(3, 0, 1, 4, 2, 5)
    return x.reshape(3, -1, *x.shape[-2:])


def _join(x: jax.Array, batch: int, heads: int, groups: int) -> jax.Array:
    """(b g h) m d -> b (g m) (h d)."""
    _, tokens, width = x.shape
    x = x.reshape(batch, groups, heads, tokens, width).swapaxes(2, 3)
    return x.reshape(batch, groups * tokens, heads * width)
