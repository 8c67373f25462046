"""The network once more, in float64 NumPy, with loops for what the module does in one product. For comparison.

It reads the official state dict and follows the paper: blocks and projection layers one after another, each under the
name of its application, attention group by group and head by head.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

import sret_jax

Weights = Mapping[str, np.ndarray]


def logits(
    weights: Weights, model: sret_jax.SReT, images: np.ndarray, permutations: Sequence[np.ndarray | None]
) -> np.ndarray:
    """Evaluation: (batch, num_classes). `permutations` as the module takes them."""
    x = images.astype(np.float64)
    for i in (1, 2, 3):
        x = convolution(x, weights[f"patch_embed.conv{i}.weight"], weights[f"patch_embed.conv{i}.bias"])
        bn = _below(weights, f"patch_embed.bn{i}.")
        x = (x - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
        x = np.maximum(x, 0)
    x = x + weights["pos_embed"][0].transpose(1, 2, 0)

    for s in range(len(model.widths)):
        if s:
            x = convolution(x, weights[f"pools.{s - 1}.conv.weight"], weights[f"pools.{s - 1}.conv.bias"])
        grid, x = x.shape, x.reshape(x.shape[0], -1, x.shape[-1])
        layer = 0
        for b in range(model.blocks[s]):
            for r in range(model.recursions[s]):
                order = permutations[s][b, r - 1] if r and permutations[s] is not None else np.arange(x.shape[1])
                block = _below(weights, f"transformers.{s}.blocks.{layer}.")
                x = _block(block, x, model.heads[s], model.slices[s][min(r, 1)], order)
                x = _projection_layer(_below(weights, f"transformers.{s}.blocks.{layer + 1}."), x)
                layer += 2
        x = x.reshape(grid)

    features = layer_norm(x.mean((1, 2)), weights["norm.weight"], weights["norm.bias"])
    return features @ weights["head.weight"].T + weights["head.bias"]


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3×3, stride 2, one pixel of zeros around; weight (out, in / groups, 3, 3), x (batch, height, width, in)."""
    batch, height, width, channels = x.shape
    out, fan, _, _ = weight.shape
    groups = channels // fan
    padded = np.zeros((batch, height + 2, width + 2, channels))
    padded[:, 1:-1, 1:-1] = x
    y = np.zeros((batch, (height + 1) // 2, (width + 1) // 2, out))
    for row in range(y.shape[1]):
        for column in range(y.shape[2]):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            for o in range(out):
                group = o // (out // groups)
                seen = window[..., group * fan : (group + 1) * fan]
                y[:, row, column, o] = np.einsum("bhwi,ihw->b", seen, weight[o]) + bias[o]
    return y


def attention(
    x: np.ndarray, qkv: np.ndarray, qkv_bias: np.ndarray, heads: int, groups: int, order: np.ndarray
) -> np.ndarray:
    """Attention within groups, before the output projection: (batch, tokens, width), in the order of x."""
    batch, tokens, width = x.shape
    head_width, size = width // heads, tokens // groups
    y = np.zeros_like(x)
    for group in range(groups):
        members = order[group * size : (group + 1) * size]
        for head in range(heads):
            channels = np.arange(head * head_width, (head + 1) * head_width)
            query, key, value = (
                x[:, members] @ qkv[part * width + channels].T + qkv_bias[part * width + channels] for part in range(3)
            )
            for example in range(batch):
                scores = query[example] @ key[example].T / math.sqrt(head_width)
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                shares /= shares.sum(-1, keepdims=True)
                y[example][np.ix_(members, channels)] = shares @ value[example]
    return y


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Over the last axis, eps 1e-6."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def mlp(layer: Weights, x: np.ndarray) -> np.ndarray:
    """Linear, exact GELU, linear."""
    x = x @ layer["mlp.fc1.weight"].T + layer["mlp.fc1.bias"]
    x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x @ layer["mlp.fc2.weight"].T + layer["mlp.fc2.bias"]


def _block(layer: Weights, x: np.ndarray, heads: int, groups: int, order: np.ndarray) -> np.ndarray:
    y = layer_norm(x, layer["norm1.weight"], layer["norm1.bias"])
    y = attention(y, layer["attn.qkv.weight"], layer["attn.qkv.bias"], heads, groups, order)
    y = y @ layer["attn.proj.weight"].T + layer["attn.proj.bias"]
    x = layer["coefficient1.bias"] * x + layer["coefficient2.bias"] * y
    y = mlp(layer, layer_norm(x, layer["norm2.weight"], layer["norm2.bias"]))
    return layer["coefficient3.bias"] * x + layer["coefficient4.bias"] * y


def _projection_layer(layer: Weights, x: np.ndarray) -> np.ndarray:
    y = mlp(layer, layer_norm(x, layer["norm1.weight"], layer["norm1.bias"]))
    return layer["coefficient1.bias"] * x + layer["coefficient2.bias"] * y


def _below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
