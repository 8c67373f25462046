"""Sliced self-attention as two TPU kernels, forward and backward, whose scores never leave the chip.

Written out as products, attention writes the scores of every head to main memory, and the backward pass reads them and
writes their gradients. Here a program holds a few images, computes the scores of some queries with all their keys at a
time, and drops them; the backward pass computes them again (Rabe and Staats, 2021; Dao et al., 2022). All keys of a
slice fit on the chip, so that a softmax is done at once and nothing but the input has to be kept for the gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.layers import largest_divisor
from sret_jax.models.tpu_kernels import (
    LANES,
    ROWS,
    VMEM_BYTES,
    block_bytes,
    for_each_tile,
    held_bytes,
    image_block,
    images_in_program,
    moved_bytes,
    on_each_device,
    product,
    vector_memory,
)

# Of the float32 scores of some queries with all keys; a few arrays of this size are held at a time.
_SCORES_BYTES = 2 << 20
_MOST_QUERIES = 256
# Code is written out for each run of an image. Where there are more, each becomes an image of its own, which may cost
# a copy; so do long ones that do not start with a register, because a loop over their queries needs to know.
_MOST_RUNS = 16


# What the backward kernel holds, which needs the most, as the compiler counts it. Scores: so many arrays. Gradients: so
# many arrays as large as the keys of a chunk, more where a chunk lies across two registers. Keys and values in float32:
# so many times their size, because a TPU multiplies three parts of bfloat16.
_SCORES_HELD = 5
_GRADIENTS_HELD = 4
_GRADIENTS_HELD_ACROSS = 12
_FLOAT32_HELD = 2.5
_LEAST_HELD = 5 << 20  # with what registers have no room for, where code is written out for many runs
_MOST_OF_MEMORY = 15 / 16


def fits(tokens: int, width: int, heads: int, groups: int, dtype: DTypeLike) -> bool:
    """Whether the kernels have room in the vector memory of the TPU that they are compiled for.

    An estimate on the safe side. The compiler takes every shape that fits: checked with libtpu 0.0.42, 68 shapes for a
    v4, 69 for a v5p and 40 for a v5e. From 512 pixels on it also takes some that do not; `attention="pallas"` uses the
    kernels for those.

    Args:
      tokens: of an image.
      width: channels.
      heads: a divisor of the width.
      groups: a divisor of the tokens.
      dtype: of queries, keys and values.
    """
    plan, runs = _plan(tokens, width, heads, groups, False)
    rows = plan.run if _is_cut(plan, runs) else tokens
    blocks = block_bytes([(rows, 3 * width), (rows, width), (rows, 3 * width)], dtype)
    parts = _FLOAT32_HELD if jnp.dtype(dtype) == jnp.float32 else 1
    keys_and_values = parts * 2 * (plan.chunk // (width // heads)) * held_bytes((plan.run, plan.chunk), dtype)
    held = _GRADIENTS_HELD if LANES % plan.chunk == 0 else _GRADIENTS_HELD_ACROSS
    gradients = held * held_bytes((plan.run, plan.chunk), jnp.float32)
    scores = _SCORES_HELD * held_bytes((plan.run, plan.queries), jnp.float32)
    beside_blocks = max(keys_and_values + gradients + scores, _LEAST_HELD)
    return blocks + beside_blocks <= _MOST_OF_MEMORY * vector_memory()


def fused_attention(qkv: jax.Array, heads: int, groups: int, *, interpret: bool = False) -> jax.Array:
    """Multi-head self-attention within `groups` equal runs of the tokens (paper, section 3.4), for TPUs.

    Differentiable in reverse mode. A batch may be split over devices: each attends to its own images.

    Args:
      qkv: queries, keys and values, (b, n, 3c) float32 or bfloat16, the last axis ordered (3, heads, c / heads).
      heads: a divisor of c.
      groups: a divisor of n.
      interpret: computes what the kernels compute without a TPU, slowly.

    Returns:
      (b, n, c) in qkv's dtype, the last axis ordered (heads, c / heads). Scores and softmax are float32; float32
      inputs are multiplied in float32, bfloat16 ones in bfloat16 with float32 sums.
    """
    batch, tokens, features = qkv.shape
    plan, runs = _plan(tokens, features // 3, heads, groups, interpret)
    if _is_cut(plan, runs):
        return _attention(qkv.reshape(batch * runs, plan.run, features), plan).reshape(batch, tokens, features // 3)
    return _attention(qkv, plan)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the kernels go over an image.

    Attributes:
      heads: of the attention.
      slice_tokens: tokens that attend to each other.
      run: tokens whose scores are computed together: a slice's, or those of several that fill the matrix unit no more
        than one would, with the scores between slices masked.
      width: channels.
      interpret: see `fused_attention`.
    """

    heads: int
    slice_tokens: int
    run: int
    width: int
    interpret: bool

    @property
    def chunk(self) -> int:
        """Channels of as many heads as fill a register's lanes.

        Cutting single heads out of the lanes would move data; to multiply the channels of the others with zeros does
        not, and the matrix unit takes no longer.
        """
        head_width = self.width // self.heads
        return head_width * largest_divisor(self.heads, LANES // head_width)

    @property
    def queries(self) -> int:
        """Queries whose scores are computed together."""
        if self.run <= _MOST_QUERIES:
            return self.run
        fitting = _SCORES_BYTES // (4 * self.run) // ROWS * ROWS
        return min(max(fitting, ROWS), _MOST_QUERIES)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return (self.width // self.heads) ** -0.5


def _plan(tokens: int, width: int, heads: int, groups: int, interpret: bool) -> tuple[_Plan, int]:
    """How to go over an image, and how many runs it has."""
    slice_tokens = tokens // groups
    run = slice_tokens * largest_divisor(groups, LANES // slice_tokens)
    return _Plan(heads, slice_tokens, run, width, interpret), tokens // run


def _is_cut(plan: _Plan, runs: int) -> bool:
    """Whether each run of an image is taken for an image."""
    return runs > _MOST_RUNS or (plan.run // plan.queries > 1 and plan.run % ROWS != 0)


def _head_masks(plan: _Plan) -> list[jax.Array]:
    """For each head of a chunk, (1, chunk) float32: 1 in its channels."""
    head_width = plan.width // plan.heads
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1)
    return [
        ((lane >= start) & (lane < start + head_width)).astype(jnp.float32)
        for start in range(0, plan.chunk, head_width)
    ]


def _masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * mask).astype(x.dtype)


def _other_slices(plan: _Plan) -> jax.Array | None:
    """(run, run) bool: pairs of tokens that do not attend to each other; None if all do."""
    if plan.run == plan.slice_tokens:
        return None
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (plan.run, plan.run), axis) for axis in (0, 1))
    same = jnp.zeros((plan.run, plan.run), jnp.bool_)
    for start in range(0, plan.run, plan.slice_tokens):
        end = start + plan.slice_tokens
        same |= (first >= start) & (first < end) & (second >= start) & (second < end)
    return ~same


def _weights(scores: jax.Array, masked: jax.Array | None, scale: float) -> jax.Array:
    """Softmax of the scaled scores, (keys, queries) float32, over the keys; 0 where masked.

    This way round, maxima and sums are over registers, not within them, and two of the three products of the backward
    pass take its arrays as they are.
    """
    if masked is not None:
        scores = jnp.where(masked, -jnp.inf, scores)
    weights = jnp.exp2((scores - scores.max(0, keepdims=True)) * (scale * math.log2(math.e)))
    return weights / weights.sum(0, keepdims=True)


def _for_each_chunk(plan: _Plan, images: int, tokens: int, do: Callable[[Any, int, int], None]) -> None:
    """`do(image, first token, first channel)` for every chunk of every run of every image."""

    def one_image(image: Any, _: None) -> None:
        for start in range(0, tokens, plan.run):
            for channel in range(0, plan.width, plan.chunk):
                do(image, start, channel)

    jax.lax.fori_loop(0, images, one_image, None)


def _forward_kernel(plan: _Plan, qkv_ref: Any, out_ref: Any) -> None:
    """(images, n, 3c) -> (images, n, c)."""
    from jax.experimental import pallas as pl

    masks, masked = _head_masks(plan), _other_slices(plan)

    def chunk(image: Any, start: int, channel: int) -> None:
        def at(part: int, first: Any, count: int) -> Any:
            return image, pl.ds(first, count), pl.ds(part * plan.width + channel, plan.chunk)

        keys, values = ([_masked(qkv_ref[at(part, start, plan.run)], mask) for mask in masks] for part in (1, 2))

        def tile(first: Any, count: int) -> None:
            query = qkv_ref[at(0, first, count)]
            total = jnp.zeros((count, plan.chunk), jnp.float32)
            for key, value in zip(keys, values, strict=True):
                weights = _weights(product(key, query, (1, 1)), masked, plan.scale)
                total += product(weights.astype(value.dtype), value, (0, 0))
            out_ref[at(0, first, count)] = total.astype(out_ref.dtype)

        for_each_tile(start, plan.run, plan.queries, tile)

    images, tokens, _ = qkv_ref.shape
    _for_each_chunk(plan, images, tokens, chunk)


def _backward_kernel(plan: _Plan, qkv_ref: Any, grad_ref: Any, out_ref: Any, *sums: Any) -> None:
    """(images, n, 3c) and the output's gradient (images, n, c) -> the input's gradient (images, n, 3c).

    `sums`, (run, chunk) float32, add up the gradients of keys and values where queries come in several tiles.
    """
    from jax.experimental import pallas as pl

    masks, masked = _head_masks(plan), _other_slices(plan)
    dtype = out_ref.dtype

    def chunk(image: Any, start: int, channel: int) -> None:
        def at(part: int, first: Any, count: int) -> Any:
            return image, pl.ds(first, count), pl.ds(part * plan.width + channel, plan.chunk)

        def write(key_grad: jax.Array, value_grad: jax.Array) -> None:
            out_ref[at(1, start, plan.run)] = (key_grad * plan.scale).astype(dtype)
            out_ref[at(2, start, plan.run)] = value_grad.astype(dtype)

        keys, values = ([_masked(qkv_ref[at(part, start, plan.run)], mask) for mask in masks] for part in (1, 2))
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

        def tile(first: Any, count: int) -> None:
            query, grad = qkv_ref[at(0, first, count)], grad_ref[at(0, first, count)]
            query_grad = jnp.zeros((count, plan.chunk), jnp.float32)
            key_grad = jnp.zeros((plan.run, plan.chunk), jnp.float32)
            value_grad = jnp.zeros((plan.run, plan.chunk), jnp.float32)
            for key, value, mask in zip(keys, values, masks, strict=True):
                weights = _weights(product(key, query, (1, 1)), masked, plan.scale)
                weights_grad = product(value, grad, (1, 1))
                mean = (weights * weights_grad).sum(0, keepdims=True)
                scores_grad = (weights * (weights_grad - mean)).astype(dtype)
                query_grad += product(scores_grad, key, (0, 0))
                key_grad += product(scores_grad, _masked(query, mask), (1, 0))
                value_grad += product(weights.astype(dtype), _masked(grad, mask), (1, 0))
            out_ref[at(0, first, count)] = (query_grad * plan.scale).astype(dtype)
            if sums:
                sums[0][...] += key_grad
                sums[1][...] += value_grad
            else:
                write(key_grad, value_grad)

        for_each_tile(start, plan.run, plan.queries, tile)
        if sums:
            write(sums[0][...], sums[1][...])

    images, tokens, _ = qkv_ref.shape
    _for_each_chunk(plan, images, tokens, chunk)


def _call(plan: _Plan, backward: bool, *arrays: jax.Array) -> jax.Array:
    """One of the kernels."""
    return on_each_device(lambda *arrays: (_call_here(plan, backward, *arrays), ()), arrays)[0]


def _call_here(plan: _Plan, backward: bool, *arrays: jax.Array) -> jax.Array:
    """One of the kernels on one device's part of the batch."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, tokens, _ = arrays[0].shape
    out = jax.ShapeDtypeStruct((batch, tokens, (3 if backward else 1) * plan.width), arrays[0].dtype)
    everything: tuple[jax.Array | jax.ShapeDtypeStruct, ...] = (*arrays, out)
    images = images_in_program(everything)
    tiled = plan.queries < plan.run
    sums = [pltpu.VMEM((plan.run, plan.chunk), jnp.float32)] * 2 if backward and tiled else []
    scores = batch * plan.heads * tokens * plan.run
    return pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, plan),
        out_shape=out,
        grid=(batch // images,),
        in_specs=[image_block(array, images) for array in arrays],
        out_specs=image_block(out, images),
        scratch_shapes=sums,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if backward else 2) * scores * plan.chunk,
            transcendentals=scores,
            bytes_accessed=moved_bytes(everything),
        ),
        interpret=plan.interpret,
        name=f"sliced_attention_{'backward' if backward else 'forward'}",
    )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(qkv: jax.Array, plan: _Plan) -> jax.Array:
    return _call(plan, False, qkv)


def _attention_forward(qkv: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    return _attention(qkv, plan), qkv


def _attention_backward(plan: _Plan, qkv: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (_call(plan, True, qkv, grad),)


_attention.defvjp(_attention_forward, _attention_backward)
