"""An MLP with its norm and residual connection as two TPU kernels whose hidden channels never leave the chip.

Written out as products, the hidden channels, several times as many as a token's, go to main memory and back, and so do
their gradients. Here a program holds a few images and all weights, takes some tokens from the norm to the residual
connection, and drops what is between. The backward pass computes that again from the tokens, which are all that is
kept for it, and sums the gradients of the weights on the chip.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.errors import UserError
from sret_jax.models.layers import largest_divisor, normal_cdf
from sret_jax.models.tpu_kernels import (
    ROWS,
    VMEM_BYTES,
    for_each_tile,
    held_bytes,
    image_block,
    images_in_program,
    moved_bytes,
    on_each_device,
    parts_of_image,
    product,
)

# A TPU v4 has 16 MiB for a kernel, others several times as much: of a layer's weights and their gradients there, and of
# the hidden channels, float32, of tokens that are computed together, and how many these are.
_MOST_WEIGHT_BYTES = 9 << 20
_MOST_HIDDEN_BYTES = 1 << 20
_MOST_ROWS = 256

# A TPU multiplies float32 as three parts of bfloat16.
_BYTES_OF_PARTS = 3 * 2


class Weights(NamedTuple):
    """Parameters of a norm and of the two linear layers behind it, float32."""

    norm_scale: jax.Array  # (c,)
    norm_bias: jax.Array  # (c,)
    kernel1: jax.Array  # (c, h)
    bias1: jax.Array  # (h,)
    kernel2: jax.Array  # (h, c)
    bias2: jax.Array  # (c,)


def weights_fit(width: int, hidden: int, dtype: DTypeLike) -> bool:
    """Whether the weights of an MLP and their gradients leave enough of any TPU's vector memory to the tokens."""
    held = 0
    for shape in ((width, hidden), (hidden, width)):
        held += held_bytes(shape, dtype) + held_bytes(shape, jnp.float32)
        if jnp.dtype(dtype) == jnp.float32:
            held += _BYTES_OF_PARTS * held_bytes(shape, jnp.int8)
    return held <= _MOST_WEIGHT_BYTES


def fused_mlp(
    x: jax.Array,
    keep: jax.Array,
    gain: jax.Array,
    scales: jax.Array,
    weights: Weights,
    epsilon: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """keep · x + gain · scales · (GELU(LayerNorm(x) · kernel1 + bias1) · kernel2 + bias2), for TPUs.

    Differentiable in reverse mode, in all but `scales`. A batch may be split over devices: each computes its own
    images, and gradients of the weights are summed over all.

    Args:
      x: tokens, (b, n, c) float32 or bfloat16.
      keep: float32 scalar.
      gain: float32 scalar.
      scales: stochastic depth's, float32 (b,); their gradient is 0.
      weights: see there.
      epsilon: LayerNorm's.
      interpret: computes what the kernels compute without a TPU, slowly.

    Returns:
      (b, n, c) in x's dtype. All is computed in float32, but that the factors of products are in x's dtype.

    Raises:
      UserError: weights that do not fit on the chip.
    """
    width, hidden = weights.kernel1.shape
    if not weights_fit(width, hidden, x.dtype):
        raise UserError(
            f"an MLP of {width} and {hidden} channels does not fit into a TPU's vector memory with its gradients: "
            f'give mlp="xla", which computes it as products'
        )
    batch, tokens, _ = x.shape
    # Tokens have nothing to do with each other: an image too long for a program becomes several.
    parts = parts_of_image(tokens, width, x.dtype, arrays=3)  # tokens, gradients of the output and of them
    x = x.reshape(batch * parts, tokens // parts, width)
    x = _mlp(x, keep, gain, jnp.repeat(scales, parts), weights, _Plan(epsilon, interpret))
    return x.reshape(batch, tokens, width)


class _Plan(NamedTuple):
    epsilon: float
    interpret: bool


def rows_of_tile(tokens: int, hidden: int) -> int:
    """How many of an image's tokens are computed together."""
    most = ROWS * max(min(_MOST_ROWS, _MOST_HIDDEN_BYTES // held_bytes((1, hidden), jnp.float32)) // ROWS, 1)
    if tokens > most and tokens % ROWS == 0:
        return ROWS * largest_divisor(tokens // ROWS, most // ROWS)
    return min(tokens, most)


def _for_each_tile(x_ref: Any, hidden: int, do: Any) -> None:
    """`do(image, rows)` for all tokens of a program's images; `rows`: some tokens that are computed together."""
    from jax.experimental import pallas as pl

    images, tokens, _ = x_ref.shape
    size = rows_of_tile(tokens, hidden)

    def one_image(image: Any, _: None) -> None:
        for_each_tile(0, tokens, size, lambda first, count: do(image, pl.ds(first, count)))

    jax.lax.fori_loop(0, images, one_image, None)


class _Hidden(NamedTuple):
    """What tokens become before the GELU, float32 but for `normed`."""

    factor: jax.Array  # (rows, 1), that a token's deviations from its mean are multiplied with
    normalised: jax.Array  # (rows, c)
    normed: jax.Array  # (rows, c), as a factor of products
    hidden: jax.Array  # (rows, h)
    cdf: jax.Array  # (rows, h), of `hidden`


def _hidden(plan: _Plan, x: jax.Array, norm_scale: Any, norm_bias: Any, kernel1: Any, bias1: Any) -> _Hidden:
    """Of tokens (rows, c), float32."""
    centred = x - x.mean(1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + plan.epsilon)
    normalised = centred * factor
    normed = (normalised * norm_scale[...] + norm_bias[...]).astype(kernel1.dtype)
    hidden = product(normed, kernel1[...], (1, 0)) + bias1[...]
    return _Hidden(factor, normalised, normed, hidden, normal_cdf(hidden))


def _forward_kernel(
    plan: _Plan,
    scales_ref: Any,
    keep_ref: Any,
    x_ref: Any,
    norm_scale: Any,
    norm_bias: Any,
    kernel1: Any,
    bias1: Any,
    kernel2: Any,
    bias2: Any,
    out_ref: Any,
) -> None:
    """(images, n, c) -> (images, n, c)."""
    from jax.experimental import pallas as pl

    keep, before = keep_ref[0], pl.program_id(0) * x_ref.shape[0]

    def tile(image: Any, rows: Any) -> None:
        x = x_ref[image, rows].astype(jnp.float32)
        _, _, _, hidden, cdf = _hidden(plan, x, norm_scale, norm_bias, kernel1, bias1)
        y = product((hidden * cdf).astype(kernel2.dtype), kernel2[...], (1, 0)) + bias2[...]
        out_ref[image, rows] = (keep * x + scales_ref[before + image] * y).astype(out_ref.dtype)

    _for_each_tile(x_ref, kernel1.shape[1], tile)


def _backward_kernel(
    plan: _Plan,
    scales_ref: Any,
    keep_ref: Any,
    x_ref: Any,
    grad_ref: Any,
    norm_scale: Any,
    norm_bias: Any,
    kernel1: Any,
    bias1: Any,
    kernel2: Any,
    out_ref: Any,
    keep_grad: Any,
    norm_scale_grad: Any,
    norm_bias_grad: Any,
    kernel1_grad: Any,
    bias1_grad: Any,
    kernel2_grad: Any,
    bias2_grad: Any,
) -> None:
    """(images, n, c) and the output's gradient, the same -> the input's gradient, and sums over all programs."""
    from jax.experimental import pallas as pl

    keep, before = keep_ref[0], pl.program_id(0) * x_ref.shape[0]
    dtype = kernel1.dtype

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        sums = keep_grad, norm_scale_grad, norm_bias_grad, kernel1_grad, bias1_grad, kernel2_grad, bias2_grad
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def tile(image: Any, rows: Any) -> None:
        x, grad = (ref[image, rows].astype(jnp.float32) for ref in (x_ref, grad_ref))
        factor, normalised, normed, hidden, cdf = _hidden(plan, x, norm_scale, norm_bias, kernel1, bias1)

        y_grad = scales_ref[before + image] * grad
        bias2_grad[...] += y_grad.sum(0, keepdims=True)
        kernel2_grad[...] += product((hidden * cdf).astype(dtype), y_grad.astype(dtype), (0, 0))

        slope = cdf + hidden * jnp.exp(-0.5 * jnp.square(hidden)) * (1 / math.sqrt(2 * math.pi))
        hidden_grad = slope * product(y_grad.astype(dtype), kernel2[...], (1, 1))
        bias1_grad[...] += hidden_grad.sum(0, keepdims=True)
        kernel1_grad[...] += product(normed, hidden_grad.astype(dtype), (0, 0))

        normed_grad = product(hidden_grad.astype(dtype), kernel1[...], (1, 1))
        norm_bias_grad[...] += normed_grad.sum(0, keepdims=True)
        norm_scale_grad[...] += (normed_grad * normalised).sum(0, keepdims=True)

        z_grad = normed_grad * norm_scale[...]
        along = (z_grad * normalised).mean(1, keepdims=True)
        x_grad = factor * (z_grad - z_grad.mean(1, keepdims=True) - normalised * along)
        keep_grad[...] += (grad * x).sum(0, keepdims=True)
        out_ref[image, rows] = (keep * grad + x_grad).astype(out_ref.dtype)

    _for_each_tile(x_ref, kernel1.shape[1], tile)


def _call(plan: _Plan, sequences: tuple[jax.Array, ...], scales: jax.Array, whole: tuple[jax.Array, ...]) -> Any:
    """A kernel on one device's part of the batch: of tokens, or of tokens and the output's gradient, the backward one.

    `whole` are arrays of which every program takes all. Returns an array of the batch and a tuple of sums.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    backward = len(sequences) == 2
    keep, *parameters = whole
    batch, tokens, width = sequences[0].shape
    hidden = parameters[2].shape[1]
    out = jax.ShapeDtypeStruct(sequences[0].shape, sequences[0].dtype)
    shapes = [(1, width)] * 3 + [(width, hidden), (1, hidden), (hidden, width), (1, width)] if backward else []
    sums = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    images = images_in_program((*sequences, out))
    rows = batch * tokens

    def all_of(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0, 0))

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    out, *sums = pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, plan),
        out_shape=[out, *sums],
        grid=(batch // images,),
        in_specs=[scalars, scalars, *(image_block(a, images) for a in sequences), *map(all_of, parameters)],
        out_specs=[image_block(out, images), *map(all_of, sums)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if backward else "parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if backward else 2) * rows * width * hidden,
            transcendentals=rows * ((2 if backward else 1) * hidden + 1),
            bytes_accessed=moved_bytes((scales, *whole, *sequences, out, *sums)),
        ),
        interpret=plan.interpret,
        name=f"mlp_{'backward' if backward else 'forward'}",
    )(scales, keep, *sequences, *parameters)
    return out, tuple(sums)


def _gained(gain: jax.Array, weights: Weights) -> Weights:
    """With the gain in the last kernel and bias, which takes no pass over the tokens."""
    return weights._replace(kernel2=gain * weights.kernel2, bias2=gain * weights.bias2)


def _whole(keep: jax.Array, weights: Weights, dtype: DTypeLike) -> list[jax.Array]:
    """What every program takes all of: vectors as rows, kernels as factors of products."""
    return [keep[None], *(array.astype(dtype) if array.ndim == 2 else array[None] for array in weights)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mlp(x: jax.Array, keep: jax.Array, gain: jax.Array, scales: jax.Array, weights: Weights, plan: _Plan) -> jax.Array:
    def kernel(x: jax.Array, scales: jax.Array, *whole: jax.Array) -> Any:
        return _call(plan, (x,), scales, whole)

    return on_each_device(kernel, (x, scales), _whole(keep, _gained(gain, weights), x.dtype))[0]


def _mlp_forward(
    x: jax.Array, keep: jax.Array, gain: jax.Array, scales: jax.Array, weights: Weights, plan: _Plan
) -> Any:
    return _mlp(x, keep, gain, scales, weights, plan), (x, keep, gain, scales, weights)


def _mlp_backward(plan: _Plan, kept: Any, grad: jax.Array) -> Any:
    x, keep, gain, scales, weights = kept

    def kernel(
        x: jax.Array, grad: jax.Array, scales: jax.Array, keep: jax.Array, gain: jax.Array, *weights: jax.Array
    ) -> Any:
        given = Weights(*weights)
        *whole, _ = _whole(keep, _gained(gain, given), x.dtype)  # the last bias has no part in gradients
        x_grad, (keep_grad, *sums) = _call(plan, (x, grad), scales, tuple(whole))
        of_gained = Weights(*(array.reshape(like.shape) for array, like in zip(sums, given, strict=True)))
        gain_grad = jnp.vdot(of_gained.kernel2, given.kernel2) + jnp.vdot(of_gained.bias2, given.bias2)
        # Multiplied before they are summed over devices, XLA sums those of a shared block's applications just once.
        return x_grad, (keep_grad.sum(), gain_grad, _gained(gain, of_gained))

    x_grad, (keep_grad, gain_grad, weights_grad) = on_each_device(kernel, (x, grad, scales), (keep, gain, *weights))
    return x_grad, keep_grad, gain_grad, jnp.zeros_like(scales), weights_grad


_mlp.defvjp(_mlp_forward, _mlp_backward)
