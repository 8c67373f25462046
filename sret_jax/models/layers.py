"""The small parts of the network: convolutions, dense layers, normalisation, residual connections, stochastic depth."""

import itertools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]

# Of bfloat16 in 16 bytes: rows of other numbers of channels are copied for NVIDIA's matrix units, in and out.
CHANNELS_OF_GPUS = 8

# PyTorch's default for weights: uniform in ±1/sqrt(fan_in). Variance 1/(3 fan_in) is that interval's.
kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> Initializer:
    """PyTorch's default for biases: uniform in ±1/sqrt(fan_in)."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Float32 means float32 on every device: by default, TPUs multiply in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def can_be_cut(batch: int) -> bool:
    """Whether a batch has a known number of images above 0, as what computes some of them at a time needs it.

    A program that `jax.export` makes for any batch has a symbol in its place.
    """
    return isinstance(batch, int) and batch > 0


def largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`, at least 1."""
    return max(k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k <= limit))


def zero_padded(x: jax.Array, *shape: int) -> jax.Array:
    """x with zeros behind, up to a shape of as many axes."""
    missing = [(0, size - there) for size, there in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, missing) if shape != x.shape else x


def beside(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector of channels, (channels,), with as many axes as x, (..., channels), to add it or multiply with it.

    JAX would add the axes itself, but for those who forbid it by `jax_numpy_rank_promotion`.
    """
    return jax.lax.expand_dims(vector, range(x.ndim - vector.ndim))


def padded_channels(channels: int, multiple: int) -> int:
    """So many channels, rounded up to a multiple."""
    return -(-channels // multiple) * multiple


class Dense(nn.Module):
    """A linear layer with PyTorch's initialisation, as `nn.Dense` names it: (..., width) -> (..., features).

    A gain, a float32 scalar that the output is multiplied with, goes into kernel and bias: multiplying the output would
    take another pass over it in both directions, and its gradient would need the output again.

    Attributes:
      width: input channels. There may be more, which have to be zero, as a layer before makes them.
      features: output channels.
      dtype: compute dtype.
      platform: whose compiler the products are written for, "cpu", "gpu" or "tpu".
      multiple: of how many the output has channels; those beyond `features` are zero.
    """

    width: int
    features: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"
    multiple: int = 1

    def setup(self) -> None:
        """Create the parameters, float32."""
        self.kernel = self.param("kernel", kernel_init, (self.width, self.features), jnp.float32)
        self.bias = self.param("bias", bias_init(self.width), (self.features,), jnp.float32)

    def __call__(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """The layer's output, in `dtype`."""
        return self.add_bias(self.multiply(x, gain), gain)

    def multiply(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """The output without the bias, for whoever keeps it and adds the bias in passing."""
        kernel = self.kernel if gain is None else gain * self.kernel
        kernel = zero_padded(kernel.astype(self.dtype), x.shape[-1], self._padded_features)
        shape = x.shape[:-1]
        if self.platform == "cpu":
            # Its XLA transposes arrays of more than two axes for the kernel's gradient. Without a barrier, large
            # products become part of what YNNPACK makes of the norm in front of them, and take twice as long.
            x = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        y = jnp.dot(x.astype(self.dtype), kernel, precision=matmul_precision(self.dtype))
        return y.reshape(*shape, kernel.shape[-1])

    def add_bias(self, y: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """What `multiply` leaves out."""
        bias = self.bias if gain is None else gain * self.bias
        return y + beside(zero_padded(bias.astype(self.dtype), self._padded_features), y)

    @property
    def _padded_features(self) -> int:
        return padded_channels(self.features, self.multiple)


def recomputed_on_cpus(apply: Callable[..., jax.Array], platform: str) -> Callable[..., jax.Array]:
    """`apply`, of a module and arrays, of which CPUs keep these alone for the backward pass.

    It computes the rest again, but no product of which only the factors are needed. What is kept lies in pages fresh
    from the system, which cost more than a norm. On TPUs, that of a norm is cheaper kept.
    """
    return nn.remat(apply) if platform == "cpu" else apply


def layer_norm(dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm as the original's: eps 1e-6, statistics in float32, and no E[x²] − E[x]², which cancels."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def normal_cdf(x: jax.Array) -> jax.Array:
    """Φ, by which the exact GELU multiplies, of float32 of any shape.

    As the original computes it, by erf; `jax.nn.gelu` takes erfc, which is exact to the last digit for large negative
    x too, and takes several times as many operations.
    """
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def unit_coefficients(module: nn.Module, count: int) -> jax.Array:
    """The learnable residual coefficients of a layer, (count,) float32, starting at 1 (paper, section 3.3)."""
    return module.param("coefficients", nn.initializers.ones, (count,), jnp.float32)


@jax.checkpoint  # else a broadcast of `keep` may be written out and kept
def residual(keep: jax.Array, x: jax.Array, scales: jax.Array | None, y: jax.Array) -> jax.Array:
    """keep · x + scales · y in x's dtype: the learnable residual connection, whose other coefficient is in y already.

    x and y are (b, n, c), `scales`, float32 (b,), those of stochastic depth, None for none.
    """
    if scales is not None:
        y = (y * scales[:, None, None]).astype(y.dtype)
    return keep.astype(x.dtype) * x + y


@jax.custom_vjp
def permute_tokens(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """Tokens (b, n, c) in the order of a permutation, int32 (n,)."""
    return jnp.take(x, permutation, axis=1, mode="clip", unique_indices=True)


def _permute_forward(x: jax.Array, permutation: jax.Array) -> tuple[jax.Array, jax.Array]:
    return permute_tokens(x, permutation), permutation


def _permute_backward(permutation: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    # JAX would scatter, which no backend does as fast as it gathers.
    return permute_tokens(gradient, jnp.argsort(permutation)), None


permute_tokens.defvjp(_permute_forward, _permute_backward)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's bookkeeping.

    `nn.BatchNorm` keeps a running mean of the biased variance; PyTorch, and so every published checkpoint, one of the
    unbiased variance. The number of batches seen is kept too, because official checkpoints hold it. Statistics are
    computed in float32 over the global batch.

    Attributes:
      dtype: of the output.
      momentum: 0.1 in PyTorch's sense.
      epsilon: what is added to variances.
      features: channels with parameters and statistics; those of the input beyond them become zero. None for all.
    """

    dtype: DTypeLike = jnp.float32
    momentum: float = 0.9
    epsilon: float = 1e-5
    features: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise x, (..., channels), with the batch's statistics when training, else with the running ones."""
        channels = self.features or x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        batches = self.variable("batch_stats", "batches", jnp.zeros, (), jnp.int32)

        def widened(array: jax.Array) -> jax.Array:
            return beside(zero_padded(array, x.shape[-1]), x)

        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes, dtype=jnp.float32)
            var = jnp.square(x.astype(jnp.float32) - beside(mean, x)).mean(axes)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var[:channels] * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean[:channels]
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
                batches.value += 1
            mean, var = beside(mean, x), beside(var, x)
        else:
            mean, var = widened(running_mean.value), widened(running_var.value)

        factor = widened(scale) * jax.lax.rsqrt(var + self.epsilon)
        return ((x.astype(jnp.float32) - mean) * factor + widened(bias)).astype(self.dtype)


class Stem(nn.Module):
    """Three stride-2 3×3 convolutions, each with BatchNorm and ReLU: images (b, h, w, 3) -> (b, h/8, w/8, width).

    Training on CPUs, convolutions are matrix products of patches: XLA's CPU backend takes their gradients slowly. On
    GPUs, channels are padded to a multiple of 8, from the images' to the last: cuDNN would do so for each convolution.
    """

    width: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """See the class."""
        x, channels = images.astype(self.dtype), images.shape[-1]
        convolve = _convolve_patches if train and self.platform == "cpu" else _convolve
        multiple = CHANNELS_OF_GPUS if self.platform == "gpu" else 1
        x = zero_padded(x, *x.shape[:-1], padded_channels(channels, multiple))
        for i, features in enumerate((self.width // 2, self.width, self.width), start=1):
            convolution = HalvingConvolution(channels, features, convolve, self.dtype, multiple, name=f"conv{i}")
            x = nn.relu(BatchNorm(dtype=self.dtype, features=features, name=f"bn{i}")(convolution(x), train))
            channels = features
        return x[..., :channels]


class HalvingConvolution(nn.Module):
    """A 3×3 convolution at stride 2, padded by 1 on all sides, with PyTorch's initialisation.

    Attributes:
      channels: of the input. There may be more, which have to be zero.
      features: channels of the output.
      convolve: a function of input and kernel.
      dtype: compute dtype.
      multiple: of how many the output has channels; those beyond `features` are zero.
    """

    channels: int
    features: int
    convolve: Callable[[jax.Array, jax.Array], jax.Array]
    dtype: DTypeLike = jnp.float32
    multiple: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, ⌈h/2⌉, ⌈w/2⌉, features) in `dtype`."""
        kernel = self.param("kernel", kernel_init, (3, 3, self.channels, self.features), jnp.float32)
        bias = self.param("bias", bias_init(9 * self.channels), (self.features,), jnp.float32)
        padded = padded_channels(self.features, self.multiple)
        kernel = zero_padded(kernel.astype(self.dtype), 3, 3, x.shape[-1], padded)
        y = self.convolve(x, kernel)
        return y + beside(zero_padded(bias.astype(self.dtype), padded), y)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),  # not "SAME", which pads only right and bottom at stride 2
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
        precision=matmul_precision(x.dtype),
    )


def _convolve_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    x = jax.lax.optimization_barrier(x)  # else each of nine slices computes it, the images' augmentation as well
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    # Rows and columns 2i - 1, 2i, 2i + 1 of a patch are an odd one of the pair before, an even and an odd one.
    pairs = x.reshape(batch, out_height, 2, out_width, 2, channels)

    def before(x: jax.Array, axis: int) -> jax.Array:
        padding = [(1, 0) if i == axis else (0, 0) for i in range(4)]
        return jax.lax.slice_in_dim(jnp.pad(x, padding), 0, x.shape[axis], axis=axis)

    def taken(dy: int, dx: int) -> jax.Array:
        x = pairs[:, :, (dy + 1) % 2, :, (dx + 1) % 2]
        x = before(x, 1) if dy == 0 else x
        return before(x, 2) if dx == 0 else x

    patches = jnp.concatenate([taken(dy, dx) for dy in range(3) for dx in range(3)], axis=-1)
    patches = jax.lax.optimization_barrier(patches.reshape(-1, 9 * channels))
    y = jnp.dot(patches, kernel.reshape(9 * channels, -1), precision=matmul_precision(x.dtype))
    return y.reshape(batch, out_height, out_width, kernel.shape[-1])


class Pool(nn.Module):
    """Depthwise 3×3 stride-2 convolution: (b, h, w, c) -> (b, ⌈h/2⌉, ⌈w/2⌉, features), features a multiple of c.

    Elsewhere than on TPUs written as nine shifted slices times nine weights: XLA's CPU backend computes the weight
    gradient of a strided depthwise convolution 30 to 100 times slower. On TPUs slices move four times as many bytes.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        kernel = self.param("kernel", bias_init(9), (3, 3, 1, self.features), jnp.float32)
        bias = self.param("bias", bias_init(9), (self.features,), jnp.float32)
        convolve = _convolve if self.platform == "tpu" else _convolve_slices
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + beside(bias.astype(self.dtype), y)


def _convolve_slices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    # Output channel c·multiplier + m reads input channel c.
    weights = kernel.reshape(9, channels, -1)

    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, top : top + 2 * out_height - 1 : 2, left : left + 2 * out_width - 1 : 2]
        for top, left in itertools.product(range(3), repeat=2)
    ]
    # One sum for each m: with m as an axis of the factors, all nine are written out as often as there are m.
    sums = [
        sum(x * beside(w, x) for x, w in zip(shifted, weights[..., m], strict=True)) for m in range(weights.shape[-1])
    ]
    return jnp.stack(sums, axis=-1).reshape(batch, out_height, out_width, kernel.shape[-1])


def draw_branch_scales(key: jax.Array, rate: jax.Array | float, shape: tuple[int, ...]) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): what to multiply residual branches with, float32 of `shape`.

    Each is 0 with probability `rate`, and 1/(1 − rate) otherwise; rates broadcast to `shape`.
    """
    return jax.random.bernoulli(key, 1 - rate, shape) / jnp.float32(1 - rate)
