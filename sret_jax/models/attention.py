"""Sliced group self-attention (paper, section 3.4): attention inside runs of the token sequence."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.fused_attention import fits, fused_attention
from sret_jax.models.layers import (
    CHANNELS_OF_GPUS,
    Dense,
    can_be_cut,
    largest_divisor,
    matmul_precision,
    padded_channels,
    permute_tokens,
    recomputed_on_cpus,
    zero_padded,
)

# Scores of one layer that stay in a CPU's caches without being cut up, and of one piece of those that do not, in
# bytes of float32: docs/performance.md.
_MOST_WHOLE = 16 << 20
_MOST_IN_PIECE = 3 << 20

_CUDNNS_WIDEST_HEAD = 128  # on every GPU that it is for


class SlicedAttention(nn.Module):
    """Multi-head self-attention within `groups` equal runs of the tokens.

    Attributes:
      width: of the tokens.
      heads: number of heads, a divisor of the width.
      norm: what tokens pass first, if there is one.
      attn_drop_rate: dropout on attention weights; where it is active, `implementation` is not asked.
      drop_rate: dropout behind the output projection.
      dtype: compute dtype.
      implementation: a key of `IMPLEMENTATIONS`; of a batch that cannot be cut, "xla" computes it.
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
            implementation = self.implementation if can_be_cut(qkv.shape[0]) else "xla"
            return IMPLEMENTATIONS[implementation](qkv, self.heads, groups)

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
    if dropout is not None:
        weights = dropout(nn.softmax(_scores(query, key)).astype(query.dtype))
        return _product("xmn,xnd->xmd", weights, value).astype(query.dtype)
    powers, sums = _powers(_scores(query, key), axis=2)
    return (_product("xmn,xnd->xmd", powers.astype(query.dtype), value) / sums).astype(query.dtype)


def _scores(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """rows · columnsᵀ / √d of queries and keys, float32."""
    scale = rows.shape[-1] ** -0.5
    if rows.dtype == jnp.float32:
        return _product("xmd,xnd->xmn", rows * scale, columns)
    return _product("xmd,xnd->xmn", rows, columns) * scale  # the scale would round the factor


def _powers(scores: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The softmax of scores along an axis, that of the keys, not yet divided by its sums, and these."""
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis, keepdims=True)))
    return powers, powers.sum(axis, keepdims=True)


def _product(contraction: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(contraction, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend_anew(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend`, of which the backward pass computes the scores again, and nothing else.

    JAX's own gradient of the division by the sums would take the product with the values once more.
    """
    return attend(query, key, value)


def _attend_anew_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    return attend(query, key, value), (query, key, value)


def _attend_anew_backward(factors: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = factors
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    # With keys as rows, just one of the products takes the transpose of such a matrix, which is slow on CPUs.
    powers, sums = _powers(_scores(key, query), axis=1)
    grad = (grad / sums.swapaxes(1, 2)).astype(dtype)
    value_grad = _product("xnm,xmd->xnd", powers.astype(dtype), grad)
    powers_grad = _product("xnd,xmd->xnm", value, grad)
    mean = (powers * powers_grad).sum(1, keepdims=True) / sums
    scores_grad = (powers * (powers_grad - mean) * scale).astype(dtype)
    query_grad = _product("xnm,xnd->xmd", scores_grad, key)
    key_grad = _product("xnm,xmd->xnd", scores_grad, query)
    return query_grad.astype(dtype), key_grad.astype(dtype), value_grad.astype(dtype)


_attend_anew.defvjp(_attend_anew_forward, _attend_anew_backward)


def _attend_whole(
    qkv: jax.Array, heads: int, groups: int, dropout: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """All slices and heads at once; qkv (b, n, 3c), its last axis (3, heads, d), -> (b, n, c)."""
    query, key, value = _split(qkv, heads, groups)
    return _join(attend(query, key, value, dropout), qkv.shape[0], heads, groups)


def _attend_in_pieces(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """Some slices and heads of some images at a time, as many as keep their scores in a CPU's caches."""
    batch, tokens, features = qkv.shape
    slice_tokens, width = tokens // groups, features // 3 // heads
    piece = _piece(batch, heads * groups, slice_tokens)
    if piece is None:
        return _join(_attend_anew(*_split(qkv, heads, groups)), batch, heads, groups)
    images, sequences = piece
    # A piece takes every so many image, so that a batch stays split over the devices that share it:
    # (i p) (g m) (3 h d) -> 3 (p g h) i m d
    x = qkv.reshape(images, batch // images, groups, slice_tokens, 3, heads, width).transpose(4, 1, 2, 5, 0, 3, 6)
    parts = x.reshape(3, -1, sequences * images, slice_tokens, width)
    x = jax.lax.map(lambda part: _attend_anew(*part), tuple(parts))
    # (p g h) i m d -> (i p) (g m) (h d)
    x = x.reshape(batch // images, groups, heads, images, slice_tokens, width).transpose(3, 0, 1, 4, 2, 5)
    return x.reshape(batch, tokens, heads * width)


def _piece(batch: int, sequences: int, tokens: int) -> tuple[int, int] | None:
    """Of how many images a piece takes how many of an image's `sequences` of `tokens`; None for all in one piece."""
    size = 4 * tokens**2
    if size * sequences * batch <= _MOST_WHOLE:
        return None

    images = largest_divisor(batch, _MOST_IN_PIECE // size)
    return images, largest_divisor(sequences, _MOST_IN_PIECE // (size * images))


def _attend_by_cudnn(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """By NVIDIA's cuDNN, which wants heads of a multiple of 8 channels, bfloat16, and for gradients even tokens."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1] // groups, qkv.shape[2] // 3 // heads
    # b (g m) (3 h d) -> (b g) m h d for each of the three. The gradient of a split is one concatenation.
    parts = (part.reshape(batch * groups, tokens, heads, width) for part in jnp.split(qkv, 3, axis=-1))
    shape = batch * groups, tokens + tokens % 2, heads, padded_channels(width, CHANNELS_OF_GPUS)
    query, key, value = (zero_padded(part, *shape) for part in parts)
    # All the same, so that a device that has a part of the batch may read the first of them.
    lengths = jnp.full((batch * groups,), tokens, jnp.int32) if tokens % 2 else None
    x = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=width**-0.5,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return x[:, :tokens, :, :width].reshape(batch, groups * tokens, heads * width)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "xla": _attend_whole,
    "pieces": _attend_in_pieces,
    "pallas": fused_attention,
    "cudnn": _attend_by_cudnn,
}
"""Functions of qkv (b, n, 3c), heads and groups that return (b, n, c). "xla": plain XLA, the reference; "pieces": the
same, a few slices, heads and images at a time, for CPUs; "pallas": a fused kernel for TPUs; "cudnn": NVIDIA's, for
bfloat16 on GPUs."""


def fastest(platform: str, tokens: int, width: int, heads: int, slices: Sequence[int], dtype: DTypeLike) -> str:
    """The key of `IMPLEMENTATIONS` that is fastest on devices of a platform.

    Args:
      platform: "cpu", "gpu" or "tpu".
      tokens: of an image.
      width: of the tokens.
      heads: a divisor of the width.
      slices: the numbers of groups that tokens are cut into.
      dtype: compute dtype.
    """
    if platform == "cpu":
        return "pieces"
    if platform == "tpu" and all(fits(tokens, width, heads, groups, dtype) for groups in slices):
        return "pallas"
    if (
        platform == "gpu"
        and jnp.dtype(dtype) == jnp.bfloat16
        and width // heads <= _CUDNNS_WIDEST_HEAD
        and _has_cudnn()
    ):
        return "cudnn"
    return "xla"


def _has_cudnn() -> bool:
    """Whether this process computes on NVIDIA's GPUs, of a generation that cuDNN's kernel is for: Ampere or later."""
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; "gfx942" on AMD's
    return capability.replace(".", "", 1).isdigit() and float(capability) >= 8


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
