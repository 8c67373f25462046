"""Weight-shared recursion: distinct blocks in one scan, applications of each with the same weights in another."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.errors import UserError
from sret_jax.models.attention import SlicedAttention
from sret_jax.models.layers import draw_branch_scales, layer_norm, residual, unit_coefficients
from sret_jax.models.mlp import MLP, NonLinearProjection


class TransformerBlock(nn.Module):
    """Attention and MLP, each with a learnable residual connection (paper, section 3.3)."""

    heads: int
    mlp_ratio: float
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    mlp: str = "xla"
    platform: str = "cpu"

    @nn.compact
    def __call__(
        self, x: jax.Array, groups: int, permutation: jax.Array | None, scales: jax.Array | None, train: bool
    ) -> jax.Array:
        """Apply the block once to tokens (b, n, c).

        `scales`, float32 (2, b), are those of stochastic depth, for the attention and for the MLP; None for none. See
        `SlicedAttention` for `groups` and `permutation`.
        """

        width = x.shape[-1]
        c1, c2, c3, c4 = unit_coefficients(self, 4)
        attention = SlicedAttention(
            width,
            self.heads,
            layer_norm(self.dtype, "norm1"),
            self.attn_drop_rate,
            self.drop_rate,
            self.dtype,
            self.attention,
            self.platform,
            name="attn",
        )
        mlp = MLP(
            width,
            int(width * self.mlp_ratio),
            layer_norm(self.dtype, "norm2"),
            self.drop_rate,
            self.dtype,
            self.mlp,
            self.platform,
            name="mlp",
        )
        attention_scales, mlp_scales = (None, None) if scales is None else scales
        y = attention(x, groups, permutation, train, gain=c2)
        x = _apart(residual(c1, x, attention_scales, y), self.platform)
        return _apart(mlp(x, c3, c4, mlp_scales, train), self.platform)


def _apart(x: jax.Array, platform: str) -> jax.Array:
    """x, computed once.

    XLA's CPU backend fuses the whole chain of residual connections into everything that reads one of them, and so
    computes it many times over.
    """
    return jax.lax.optimization_barrier(x) if platform == "cpu" else x


class RecursiveBlock(nn.Module):
    """One shared block, applied `recursions` times, each time followed by an NLL of its own.

    Parameters: `block`, one `TransformerBlock`'s; `nlls`, a `NonLinearProjection`'s with a leading axis of
    `recursions`.
    """

    width: int
    heads: int
    recursions: int
    slices: tuple[int, int]
    mlp_ratio: float
    nll_ratio: float
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    mlp: str = "xla"
    platform: str = "cpu"
    remat: bool = False
    unroll: bool = True

    def setup(self) -> None:
        """The shared block stands outside the scan over its applications, so that the scan can broadcast it."""
        self.block = TransformerBlock(
            self.heads,
            self.mlp_ratio,
            self.drop_rate,
            self.attn_drop_rate,
            self.dtype,
            self.attention,
            self.mlp,
            self.platform,
        )
        # `param` would trace the initialisation again wherever they are used: a quarter of the time that tracing takes.
        there = self.has_variable("params", "nlls")
        self.nlls = self.get_variable("params", "nlls") if there else self.param("nlls", self._init_nlls)
        found = len(self.nlls["coefficients"])
        if found != self.recursions:
            raise UserError(
                f"the variables have NLLs for {found} applications of a block, expected {self.recursions}: they are "
                "of a network with other recursions"
            )

    def __call__(
        self, x: jax.Array, permutations: jax.Array | None, scales: jax.Array | None, train: bool
    ) -> jax.Array:
        """Tokens (b, n, c) -> (b, n, c).

        `permutations` are those of the later applications, (recursions − 1, n), and `scales` those of stochastic depth,
        (recursions, 2, b); either may be None.
        """
        first = jax.tree.map(lambda array: array[0], (self.nlls, scales))
        later = jax.tree.map(lambda array: array[1:], (self.nlls, scales))

        x = self._application(self.slices[0], train)(self, x, first, None)
        apply_again = self._application(self.slices[1], train)

        def step(
            module: RecursiveBlock, x: jax.Array, inputs: tuple[tuple[Any, jax.Array | None], jax.Array | None]
        ) -> tuple[jax.Array, None]:
            return apply_again(module, x, *inputs), None

        if self.recursions > 1:
            scan = nn.scan(
                step,
                variable_broadcast="params",
                split_rngs={"params": False, "dropout": True},
                length=self.recursions - 1,
                unroll=self.recursions - 1 if self.unroll else 1,
                check_constancy_invariants=False,  # else it is traced once more
            )
            x, _ = scan(self, x, (later, permutations))
        return x

    def _application(self, groups: int, train: bool) -> Callable[..., jax.Array]:
        """One application of the block with its NLL, as a function of this module and arrays."""

        def apply(
            module: RecursiveBlock, x: jax.Array, own: tuple[Any, jax.Array | None], permutation: jax.Array | None
        ) -> jax.Array:
            nll, branch_scales = own
            block = module._block_as_its_own(nll["coefficients"])
            x = block(module.block, x, groups, permutation, branch_scales, train)
            return _apart(module._apply_nll(nll, x, train), module.platform)

        return nn.remat(apply) if self.remat and not self.is_initializing() else apply

    def _block_as_its_own(self, unshared: jax.Array) -> Callable[..., jax.Array]:
        """The block as a function of its module and arguments; on CPUs with vectors that XLA takes for unshared.

        XLA's CPU backend writes a vector out for every token where several read it, as applications of an unrolled
        scan do; for a single reader it does not. So zero is added, which follows from the parameter `unshared`.
        """

        def call(block: TransformerBlock, *arguments: Any) -> jax.Array:
            return block(*arguments)

        def own(params: Any) -> Any:
            zero = (unshared[0] > jnp.inf).astype(jnp.float32)  # never; a comparison has no gradient and makes no NaN
            return jax.tree.map(lambda array: array + zero if array.ndim == 1 else array, params)

        if self.platform != "cpu" or self.is_initializing():
            return call
        return nn.map_variables(call, "params", own)

    def _nll(self) -> NonLinearProjection:
        return NonLinearProjection(self.nll_ratio, self.drop_rate, self.dtype, self.mlp, self.platform, parent=None)

    def _init_nlls(self, key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1, self.width), self.dtype)
        keys = jax.random.split(key, self.recursions)
        return jax.vmap(lambda key: self._nll().init(key, tokens, train=False)["params"])(keys)

    def _apply_nll(self, params: Any, x: jax.Array, train: bool) -> jax.Array:
        rngs = {"dropout": self.make_rng("dropout")} if train and self.drop_rate > 0 else {}

        return cast(jax.Array, self._nll().apply({"params": params}, x, train, rngs=rngs))


class Stage(nn.Module):
    """`blocks` distinct recursive blocks, one after another, their parameters stacked on a leading axis.

    `unroll` is whether the scans over them and over their applications are unrolled; None means in training alone.
    """

    blocks: int
    heads: int
    recursions: int
    slices: tuple[int, int]
    mlp_ratio: float
    nll_ratio: float
    drop_path_rates: tuple[float, ...]
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    mlp: str = "xla"
    platform: str = "cpu"
    remat: bool = False
    unroll: bool | None = True

    @nn.compact
    def __call__(self, x: jax.Array, permutations: jax.Array | None, train: bool) -> jax.Array:
        """Tokens (b, n, c) -> (b, n, c); `permutations`: int32 (blocks, recursions − 1, n), None for raster order."""
        unroll = train if self.unroll is None else self.unroll

        def apply_block(
            block: RecursiveBlock, x: jax.Array, inputs: tuple[jax.Array | None, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            return block(x, *inputs, train), None

        scan = nn.scan(
            apply_block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.blocks,
            unroll=self.blocks if unroll else 1,
            check_constancy_invariants=False,  # else they are traced once more
        )
        blocks = RecursiveBlock(
            x.shape[-1],
            self.heads,
            self.recursions,
            self.slices,
            self.mlp_ratio,
            self.nll_ratio,
            self.drop_rate,
            self.attn_drop_rate,
            dtype=self.dtype,
            attention=self.attention,
            mlp=self.mlp,
            platform=self.platform,
            remat=self.remat,
            unroll=unroll,
            name="blocks",
        )
        x, _ = scan(blocks, x, (permutations, self._scales(x.shape[0]) if train else None))
        return x

    def _scales(self, batch: int) -> jax.Array | None:
        """Stochastic depth's, (blocks, recursions, 2, batch), drawn at once: a draw is much code for a compiler."""
        if not any(self.drop_path_rates):
            return None
        rates = jnp.asarray(self.drop_path_rates, jnp.float32)[:, None, None, None]
        return draw_branch_scales(self.make_rng("dropout"), rates, (self.blocks, self.recursions, 2, batch))
