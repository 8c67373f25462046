"""The MLP of a block and the non-linear projection layer, each with its norm and residual connection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models import fused_mlp
from sret_jax.models.layers import (
    CHANNELS_OF_GPUS,
    Dense,
    can_be_cut,
    layer_norm,
    normal_cdf,
    recomputed_on_cpus,
    residual,
    unit_coefficients,
)


class MLP(nn.Module):
    """LayerNorm, linear, exact GELU, linear, with dropout behind both, in a learnable residual connection.

    Attributes:
      width: of the tokens.
      hidden: channels between the linear layers.
      norm: what tokens pass first.
      drop_rate: dropout; where it is active, in initialising, and for a batch that cannot be cut, `implementation` is
        not asked.
      dtype: compute dtype.
      implementation: one of `IMPLEMENTATIONS`. "xla" keeps the first product for the backward pass.
      platform: whose compiler the products are written for, see `Dense`.
    """

    width: int
    hidden: int
    norm: nn.LayerNorm
    drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    platform: str = "cpu"

    def setup(self) -> None:
        """Create the layers."""
        multiple = CHANNELS_OF_GPUS if self.platform == "gpu" else 1
        self.fc1 = Dense(self.width, self.hidden, self.dtype, self.platform, multiple)
        self.fc2 = Dense(self.hidden, self.width, self.dtype, self.platform)
        self.drop1, self.drop2 = nn.Dropout(self.drop_rate), nn.Dropout(self.drop_rate)

    def __call__(
        self, x: jax.Array, keep: jax.Array, gain: jax.Array, scales: jax.Array | None, train: bool
    ) -> jax.Array:
        """keep · x + scales · gain · mlp(x), tokens (b, n, c) -> (b, n, c).

        `keep` and `gain` are float32 scalars, `scales` those of stochastic depth, float32 (b,), None for none.
        """
        drops = train and self.drop_rate > 0
        if self.implementation == "pallas" and not drops and not self.is_initializing() and can_be_cut(x.shape[0]):
            return self._fused(x, keep, gain, scales)

        def expand(mlp: MLP, x: jax.Array) -> jax.Array:
            return mlp.fc1.multiply(mlp.norm(x))

        def activate(mlp: MLP, y: jax.Array) -> jax.Array:
            return gelu(mlp.fc1.add_bias(y))

        def contract(mlp: MLP, y: jax.Array) -> jax.Array:
            # XLA's CPU backend would write erf out for its two readers in the backward pass. Twice computed is faster.
            y = recomputed_on_cpus(activate, self.platform)(mlp, y)
            return mlp.fc2(mlp.drop1(y, deterministic=not train), gain)

        y = nn.remat(contract)(self, recomputed_on_cpus(expand, self.platform)(self, x))
        return residual(keep, x, scales, self.drop2(y, deterministic=not train))

    def _fused(self, x: jax.Array, keep: jax.Array, gain: jax.Array, scales: jax.Array | None) -> jax.Array:
        norm, fc1, fc2 = self.norm.variables["params"], self.fc1, self.fc2
        weights = fused_mlp.Weights(norm["scale"], norm["bias"], fc1.kernel, fc1.bias, fc2.kernel, fc2.bias)
        scales = jnp.ones(x.shape[0], jnp.float32) if scales is None else scales
        return fused_mlp.fused_mlp(x, keep, gain, scales, weights, self.norm.epsilon)


class NonLinearProjection(nn.Module):
    """The non-linear projection layer (NLL) behind every application of a block: x = c1·x + c2·mlp(norm(x)).

    Never shared: it is what makes each application of a shared block differ (paper, section 3.3).
    """

    mlp_ratio: float
    drop_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    mlp: str = "xla"
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Tokens (b, n, c) -> (b, n, c)."""
        keep, add = unit_coefficients(self, 2)
        width, norm = x.shape[-1], layer_norm(self.dtype, "norm")
        hidden = int(width * self.mlp_ratio)
        mlp = MLP(width, hidden, norm, self.drop_rate, self.dtype, self.mlp, self.platform, name="mlp")
        return mlp(x, keep, add, None, train)


IMPLEMENTATIONS = ("xla", "pallas")
"""How an MLP is computed. "xla": plain XLA, the reference; "pallas": a fused kernel for TPUs."""


def fastest(platform: str, width: int, hidden: int, dtype: DTypeLike) -> str:
    """Which of `IMPLEMENTATIONS` is fastest on devices of a platform, "cpu", "gpu" or "tpu"."""
    return "pallas" if platform == "tpu" and fused_mlp.weights_fit(width, hidden, dtype) else "xla"


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x Φ(x), computed in float32, of any shape, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * normal_cdf(wide)).astype(x.dtype)
