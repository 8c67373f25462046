"""Weight-shared recursion: distinct blocks in one scan, applications of each with the same weights in another."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.attention import SlicedAttention
from sret_jax.models.layers import (
    MLP,
    NonLinearProjection,
    draw_branch_scales,
    layer_norm,
    residual,
    unit_coefficients,
)


class TransformerBlock(nn.Module):
    """Attention and MLP, each with a learnable residual connection (paper, section 3.3)."""

    heads: int
    mlp_ratio: float
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, groups: int, permutation: jax.Array | None, scales: jax.Array | None, train: bool
    ) -> jax.Array:
        """Apply the block once to tokens (b, n, c).

        `scales`, float32 (2, b), are those of stochastic depth, for the attention and for the MLP; None for none. See
        `SlicedAttention` for `groups` and `permutation`.
        """

        def scaled(y: jax.Array, branch: int) -> jax.Array:
            return y if scales is None else (y * scales[branch, :, None, None]).astype(y.dtype)

        c1, c2, c3, c4 = unit_coefficients(self, 4)
        attention = SlicedAttention(self.heads, self.attn_drop_rate, self.drop_rate, self.dtype, name="attn")
        y = attention(layer_norm(self.dtype, "norm1")(x), groups, permutation, train)
        x = residual(c1, x, c2, scaled(y, 0))
        mlp = MLP(int(x.shape[-1] * self.mlp_ratio), self.drop_rate, self.dtype, name="mlp")
        y = mlp(layer_norm(self.dtype, "norm2")(x), train)
        return residual(c3, x, c4, scaled(y, 1))


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
    remat: bool = False
    unroll: bool = True

    def setup(self) -> None:
        """The shared block stands outside the scan over its applications, so that the scan can broadcast it."""
        block = nn.remat(TransformerBlock, static_argnums=(2, 5)) if self.remat else TransformerBlock
        self.block = block(self.heads, self.mlp_ratio, self.drop_rate, self.attn_drop_rate, self.dtype)
        self.nlls = self.param("nlls", self._init_nlls)

    def __call__(
        self, x: jax.Array, permutations: jax.Array | None, scales: jax.Array | None, train: bool
    ) -> jax.Array:
        """Tokens (b, n, c) -> (b, n, c).

        `permutations` are those of the later applications, (recursions − 1, n), and `scales` those of stochastic depth,
        (recursions, 2, b); either may be None.
        """
        nll, branch_scales = jax.tree.map(lambda array: array[0], (self.nlls, scales))
        later = jax.tree.map(lambda array: array[1:], (self.nlls, scales))

        x = self.block(x, self.slices[0], None, branch_scales, train)
        x = self._apply_nll(nll, x, train)

        def apply_again(
            module: RecursiveBlock, x: jax.Array, inputs: tuple[tuple[Any, jax.Array | None], jax.Array | None]
        ) -> tuple[jax.Array, None]:
            (nll, branch_scales), permutation = inputs
            x = module.block(x, module.slices[1], permutation, branch_scales, train)
            return module._apply_nll(nll, x, train), None

        if self.recursions > 1:
            scan = nn.scan(
                apply_again,
                variable_broadcast="params",
                split_rngs={"params": False, "dropout": True},
                length=self.recursions - 1,
                unroll=self.recursions - 1 if self.unroll else 1,
            )
            x, _ = scan(self, x, (later, permutations))
        return x

    def _nll(self) -> NonLinearProjection:
        return NonLinearProjection(self.nll_ratio, self.drop_rate, self.dtype, parent=None)

    def _init_nlls(self, key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1, self.width), self.dtype)
        keys = jax.random.split(key, self.recursions)
        return jax.vmap(lambda key: self._nll().init(key, tokens, train=False)["params"])(keys)

    def _apply_nll(self, params: Any, x: jax.Array, train: bool) -> jax.Array:
        rngs = {"dropout": self.make_rng("dropout")} if train and self.drop_rate > 0 else {}

        def apply(params: Any, x: jax.Array) -> jax.Array:
            return cast(jax.Array, self._nll().apply({"params": params}, x, train, rngs=rngs))

        return (jax.checkpoint(apply) if self.remat else apply)(params, x)


class Stage(nn.Module):
    """`blocks` distinct recursive blocks, one after another, their parameters stacked on a leading axis."""

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
    remat: bool = False
    unroll: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, permutations: jax.Array | None, train: bool) -> jax.Array:
        """Tokens (b, n, c) -> (b, n, c); `permutations`: int32 (blocks, recursions − 1, n), None for raster order."""

        def apply_block(
            block: RecursiveBlock, x: jax.Array, inputs: tuple[jax.Array | None, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            return block(x, *inputs, train), None

        scan = nn.scan(
            apply_block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.blocks,
            unroll=self.blocks if self.unroll else 1,
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
            remat=self.remat,
            unroll=self.unroll,
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
