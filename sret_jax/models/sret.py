"""The Sliced Recursive Transformer (Shen, Liu, Xing, ECCV 2022, arXiv 2111.05297)."""

import functools
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sret_jax.errors import UserError, brief
from sret_jax.models import attention, mlp
from sret_jax.models.layers import Dense, Pool, Stem, layer_norm
from sret_jax.models.recursion import Stage
from sret_jax.models.sharding import on_auto_axes

# Above this many applications of blocks, scans stay rolled unless told otherwise: the published networks have 20.
MOST_UNROLLED_APPLICATIONS = 64

# Above these, networks cannot be, and to look for a size that would do takes long.
_LARGEST_IMAGE = 2**14
_LARGEST_COUNT = 2**20

RATES = ("drop_path_rate", "drop_rate", "attn_drop_rate")
PLATFORMS = ("cpu", "gpu", "tpu")
PER_STAGE = ("widths", "heads", "blocks", "recursions", "slices")

Permutations = Sequence[jax.Array | None]


class SReT(nn.Module):
    """Stem, position embedding, stages of recursive blocks with pooling between them, LayerNorm, linear head.

    Call it as `model.apply(variables, images)`; `create_model` makes the published ones by name. The defaults are
    SReT-T. Parameters are float32 whatever `dtype` is; so are softmax, normalisation statistics and the logits.

    Attributes:
      image_size: height and width of the images in pixels, a multiple of 8. The position embedding has
        (image_size / 8)² places, and every stage's tokens must be divisible by its slices.
      widths: channels of each stage; each a multiple of the one before, and of the stage's heads.
      heads: attention heads of each stage.
      blocks: distinct (unshared) transformer blocks of each stage.
      recursions: how often each block is applied with the same weights, for each stage.
      slices: for each stage, the number of slices (groups) that attend within themselves in a block's first
        application and in each later one; 1 is no slicing.
      mlp_ratio: hidden width of the blocks' MLPs, int(width · ratio).
      nll_ratio: hidden width of the non-linear projection layers, int(width · ratio).
      num_classes: 0 leaves the head out: calls return features.
      drop_path_rate: stochastic depth at the very end of the network, growing linearly with depth.
      drop_rate: dropout behind the position embedding, the projections and in the MLPs.
      attn_drop_rate: dropout on attention weights.
      dtype: compute dtype, float32 or bfloat16. float32 is computed as float32 on every device, without the
        bfloat16 or TF32 products that TPUs and GPUs use by default.
      remat: keep no more than the input of each application of a block, with its NLL, for the backward pass, which
        computes the rest again.
      scan_unroll: unroll the scans over blocks and applications, which takes longer to compile. None unrolls networks
        of up to 64 applications, on CPUs in training alone, where it is faster, and takes a quarter of the memory of
        accelerators.
      attention: "xla", products; "pieces", the same for a few slices and heads at a time; "pallas", a fused kernel for
        TPUs (a v4 has room for it in bfloat16 at 224 pixels, but not for float32 or many more: give "xla" there);
        "cudnn", NVIDIA's, for bfloat16 on GPUs. None is what is fastest on `platform`. Where dropout on attention
        weights is active, they are plain products.
      mlp: how the blocks' MLPs and the non-linear projection layers are computed: "xla", products; "pallas", a fused
        kernel for TPUs, with norm and residual connection. None is what is fastest on `platform`. Where dropout in
        them is active, they are plain products.
      platform: "cpu", "gpu" or "tpu", whose compiler the network is written for; but for kernels, it runs on all. None
        is JAX's default.

    Raises:
      UserError: fields that do not fit together; the message names what would.
    """

    image_size: int = 224
    widths: Sequence[int] = (64, 128, 256)
    heads: Sequence[int] = (2, 4, 8)
    blocks: Sequence[int] = (2, 5, 3)
    recursions: Sequence[int] = (2, 2, 2)
    slices: Sequence[tuple[int, int]] = ((8, 2), (4, 1), (1, 1))
    mlp_ratio: float = 3.6
    nll_ratio: float = 1.0
    num_classes: int = 1000
    drop_path_rate: float = 0.1
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan_unroll: bool | None = None
    attention: str | None = None
    mlp: str | None = None
    platform: str | None = None

    def __post_init__(self) -> None:
        for name in PER_STAGE:
            # Tuples, as lists from a config or JSON cannot be hashed, and a module is a static argument of jit.
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        _check_fields(self)
        super().__post_init__()

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Height and width of each stage's grid of tokens."""
        return grid_sizes(self.image_size, len(self.widths))

    @property
    def applications(self) -> tuple[int, ...]:
        """How many blocks the tokens pass in each stage, shared ones counted each time."""
        return tuple(b * r for b, r in zip(self.blocks, self.recursions, strict=True))

    def setup(self) -> None:
        """Create the parts in the order of the data flow."""
        depth = self.applications
        unroll = self.scan_unroll
        platform = self.platform or jax.default_backend()
        if unroll is None:
            shallow = sum(depth) <= MOST_UNROLLED_APPLICATIONS
            unroll = None if shallow and platform == "cpu" else shallow
        width, size = self.widths[0], self.grid_sizes[0]
        largest_ratio = max(self.mlp_ratio, self.nll_ratio)

        self.stem = Stem(width, self.dtype, platform)
        # timm's truncation is at ±2, a hundred standard deviations out.
        init = nn.initializers.truncated_normal(0.02, lower=-100, upper=100)
        self.pos_embed = self.param("pos_embed", init, (size, size, width), jnp.float32)
        self.pos_drop = nn.Dropout(self.drop_rate)
        self.stages = [
            Stage(
                blocks=self.blocks[s],
                heads=self.heads[s],
                recursions=self.recursions[s],
                slices=self.slices[s],
                mlp_ratio=self.mlp_ratio,
                nll_ratio=self.nll_ratio,
                drop_path_rates=tuple(
                    self.drop_path_rate * (sum(depth[:s]) + b) / sum(depth) for b in range(self.blocks[s])
                ),
                drop_rate=self.drop_rate,
                attn_drop_rate=self.attn_drop_rate,
                dtype=self.dtype,
                attention=self.attention
                or attention.fastest(
                    platform, self.grid_sizes[s] ** 2, self.widths[s], self.heads[s], self.slices[s], self.dtype
                ),
                mlp=self.mlp or mlp.fastest(platform, self.widths[s], int(self.widths[s] * largest_ratio), self.dtype),
                platform=platform,
                remat=self.remat,
                unroll=unroll,
            )
            for s in range(len(self.widths))
        ]
        self.pools = [Pool(features, self.dtype, platform) for features in self.widths[1:]]
        self.norm = layer_norm(jnp.float32)
        if self.num_classes:
            self.head = Dense(self.widths[-1], self.num_classes, jnp.float32, platform)

    def __call__(
        self, images: jax.Array, *, train: bool = False, permutations: Permutations | None = None
    ) -> jax.Array:
        """Classify images.

        Args:
          images: float32 (batch, image_size, image_size, 3), normalised.
          train: whether BatchNorm uses the batch's statistics (make "batch_stats" mutable) and dropout and stochastic
            depth are active (rng "dropout", needed when a rate is above 0).
          permutations: for each stage, the order in which later applications slice the tokens, int32
            (blocks, recursions − 1, tokens), or None for a stage whose later applications are not sliced. Not given,
            they are drawn from the rng "permutation"; without that rng, evaluation uses one fixed permutation, so
            that the same image always gives the same logits. The original draws in evaluation too.

        Returns:
          Logits, float32 (batch, num_classes); features if num_classes is 0.

        Raises:
          UserError: images or permutations of another shape or dtype, or a missing rng.
        """

        def classify(model: SReT, images: jax.Array, permutations: Permutations | None) -> jax.Array:
            x = model.features(images, train=train, permutations=permutations)
            return model.head(x) if model.num_classes else x

        return on_auto_axes(classify, self, (images, permutations))

    def features(
        self, images: jax.Array, *, train: bool = False, permutations: Permutations | None = None
    ) -> jax.Array:
        """What the head sees: float32 (batch, widths[-1]), after the last norm. Arguments as in a call."""

        def compute(model: SReT, images: jax.Array, permutations: Permutations | None) -> jax.Array:
            return model._features(images, train, permutations)

        self._check_images(images)
        return on_auto_axes(compute, self, (images, permutations))

    def _features(self, images: jax.Array, train: bool, permutations: Permutations | None) -> jax.Array:
        self._check_dropout_rng(train)
        stage_permutations = self._stage_permutations(permutations, train)
        x = self.stem(images, train) + self.pos_embed.astype(self.dtype)[None]
        x = self.pos_drop(x, deterministic=not train)
        for s, stage in enumerate(self.stages):
            if s:
                x = self.pools[s - 1](x)
            batch, height, width, channels = x.shape
            tokens = stage(x.reshape(batch, height * width, channels), stage_permutations[s], train)
            x = tokens.reshape(batch, height, width, channels)
        return self.norm(x.astype(jnp.float32).mean((1, 2)))

    def _check_images(self, images: jax.Array) -> None:
        expected = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise UserError(
                f"images have shape {tuple(images.shape)}, expected (batch, {', '.join(map(str, expected))}): resize "
                f"them, or create the model with another image_size"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}, expected float32: scale them to 0..1 and normalise them with the mean and "
                f"standard deviation that the model was trained with"
            )

    def _check_dropout_rng(self, train: bool) -> None:
        rates = {name: getattr(self, name) for name in RATES if getattr(self, name) > 0}
        if train and rates and not self.has_rng("dropout") and not self.is_initializing():
            raise UserError(
                f"training with {', '.join(f'{name}={rate}' for name, rate in rates.items())} draws at random: pass "
                f'rngs={{"dropout": key}}, or create the model with these rates at 0'
            )

    def _stage_permutations(self, given: Permutations | None, train: bool) -> list[jax.Array | None]:
        """Permutations of each stage's later applications, (blocks, recursions − 1, tokens); None: raster order."""
        shapes = [
            (blocks, recursions - 1, size * size) if recursions > 1 and later > 1 else None
            for blocks, recursions, size, (_, later) in zip(
                self.blocks, self.recursions, self.grid_sizes, self.slices, strict=True
            )
        ]
        if given is not None:
            arrays = [None if p is None else jnp.asarray(p) for p in given]
            found = [None if p is None else p.shape for p in arrays]
            if found != shapes or any(p is not None and not jnp.issubdtype(p.dtype, jnp.integer) for p in arrays):
                dtypes = [None if p is None else p.dtype.name for p in arrays]
                raise UserError(f"permutations have shapes {found} and dtypes {dtypes}, expected {shapes} and int32")
            return arrays
        if not any(shapes):
            return [None] * len(shapes)
        if self.has_rng("permutation"):
            keys = jax.random.split(self.make_rng("permutation"), len(shapes))
            return [None if shape is None else _draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        if train and not self.is_initializing():
            raise UserError(
                'training a model with slices draws permutations: pass rngs={"permutation": key}, or permutations='
            )
        # One permutation for every application keeps the program's size independent of the depth.
        return [
            None if shape is None else jnp.broadcast_to(np.random.RandomState(0).permutation(shape[-1]), shape)
            for shape in shapes
        ]


def init_variables(model: SReT, key: jax.Array) -> Any:
    """`model.init(key, images)`, for which the model is traced no more than for the shapes: that takes seconds."""
    return _init(model)(key, jnp.zeros((1, model.image_size, model.image_size, 3)))


def variable_shapes(model: SReT) -> Any:
    """The variables that `model.init` makes, as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.tree.map(lambda leaf: leaf, _variable_shapes(model))  # a new tree, which its caller may change


@functools.lru_cache(maxsize=16)
def _init(model: SReT) -> Callable[..., Any]:
    return jax.jit(model.init)


@functools.lru_cache(maxsize=16)
def _variable_shapes(model: SReT) -> Any:
    return jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0))


def grid_sizes(image_size: int, stages: int) -> tuple[int, ...]:
    """Height and width of each stage's grid of tokens: an eighth of the image, then halves, rounded up."""
    sizes = [image_size // 8]
    while len(sizes) < stages:
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


def _draw(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    *applications, tokens = shape
    keys = jax.random.split(key, tuple(applications))
    return jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, tokens)))(keys)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _check_fields(model: SReT) -> None:
    for name in PER_STAGE:
        if not isinstance(getattr(model, name), tuple):
            raise UserError(f"{name} is {getattr(model, name)!r}, expected one value for each stage, in a tuple")
    per_stage = {name: len(getattr(model, name)) for name in PER_STAGE}
    if len(set(per_stage.values())) != 1 or not model.widths:
        raise UserError(f"one value for each stage is needed, of as many stages everywhere, but there are {per_stage}")
    for name in ("widths", "heads", "blocks", "recursions"):
        if not all(_is_count(value) for value in getattr(model, name)):
            raise UserError(
                f"{name} is {brief(getattr(model, name))}, expected whole numbers of at least 1, at most "
                f"{_LARGEST_COUNT}"
            )
    if not all(isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_count, pair)) for pair in model.slices):
        raise UserError(
            f"slices is {brief(model.slices)}, expected two whole numbers of at least 1 for each stage: the groups in "
            f"a block's first application, and in each later one"
        )
    if not isinstance(model.image_size, int | np.integer) or model.image_size > _LARGEST_IMAGE:
        raise UserError(
            f"image_size is {brief(model.image_size, repr)}, expected a whole number of at most {_LARGEST_IMAGE}: "
            "height and width in pixels"
        )
    if model.num_classes != 0 and not _is_count(model.num_classes):
        raise UserError(f"num_classes is {brief(model.num_classes, repr)}, expected a whole number, 0 for features")
    for width, heads in zip(model.widths, model.heads, strict=True):
        if width % heads:
            raise UserError(
                f"widths {model.widths} must be multiples of heads {model.heads}: {heads} does not divide {width}"
            )
    for before, after in itertools.pairwise(model.widths):
        if after % before:
            raise UserError(
                f"widths is {model.widths}, but each must be a multiple of the one before, because pooling is a "
                f"depthwise convolution: {after} is not one of {before}"
            )
    for name in ("mlp_ratio", "nll_ratio", *RATES):
        if not isinstance(getattr(model, name), numbers.Real):
            raise UserError(f"{name} is {getattr(model, name)!r}, expected a number")
    for name in ("mlp_ratio", "nll_ratio"):
        ratio = getattr(model, name)
        if not ratio * min(model.widths) >= 1:
            raise UserError(f"{name} is {ratio}, which leaves no hidden channel: give a larger one")
        if ratio * max(model.widths) > _LARGEST_COUNT:
            raise UserError(f"{name} is {brief(ratio)}, which makes too many hidden channels: give a smaller one")
    if model.widths[0] < 2:
        raise UserError(f"widths is {model.widths}, but the stem begins with half of the first: give at least 2")
    for name in RATES:
        if not 0 <= getattr(model, name) < 1:
            raise UserError(f"{name} is {getattr(model, name)}, expected a probability, at least 0 and below 1")
    if str(getattr(model.dtype, "__name__", model.dtype)) not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {brief(model.dtype, repr)}, expected float32 or bfloat16")
    for name, value, known in (
        ("attention", model.attention, [None, *attention.IMPLEMENTATIONS]),
        ("mlp", model.mlp, [None, *mlp.IMPLEMENTATIONS]),
        ("platform", model.platform, [None, *PLATFORMS]),
    ):
        if value not in known:
            expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise UserError(f"{name} is {brief(value, repr)}, expected {expected}")
    _check_division(model)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(1 <= value <= _LARGEST_COUNT)


def _check_division(model: SReT) -> None:
    if _divides(model.image_size, model.slices):
        return
    sizes = [size for size in range(8, 4 * max(model.image_size, 256), 8) if _divides(size, model.slices)]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - model.image_size))[:4])
    cure = f"image sizes near it that work with slices {model.slices}: {', '.join(map(str, nearest)) or 'none'}"
    if model.image_size < 8 or model.image_size % 8:
        raise UserError(f"image_size is {model.image_size}, expected a multiple of 8; {cure}")
    for stage, (size, slices) in enumerate(
        zip(grid_sizes(model.image_size, len(model.slices)), model.slices, strict=True)
    ):
        if any(size * size % groups for groups in slices):
            divisors = [d for d in range(1, size * size + 1) if size * size % d == 0]
            raise UserError(
                f"at image_size {model.image_size}, stage {stage + 1} has {size} × {size} tokens, which slices "
                f"{slices} do not divide; slices that do: {', '.join(map(str, divisors))}; {cure}"
            )


def _divides(image_size: int, slices: Sequence[tuple[int, int]]) -> bool:
    sizes = grid_sizes(image_size, len(slices))
    return (
        image_size >= 8
        and image_size % 8 == 0
        and all(size * size % groups == 0 for size, pair in zip(sizes, slices, strict=True) for groups in pair)
    )
