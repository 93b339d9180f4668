"""PixNerd as its equations read: slow and plain; only weight names and the configuration come from the package.

The reference for equality (in float64, in the tests) and for speed (`pixnerd bench`). Nothing is fused, cached or
shared between patches; every tensor in an equation is computed explicitly.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from .model_config import ModelConfig

Weights = dict[str, Tensor]  # a PixNerd's state_dict, or its named_parameters, or a part of them


def by_part(weights: Weights) -> dict[str, Weights]:
    """Part, "head" or "blocks.N" → its weights by their names in it."""
    found: dict[str, Weights] = defaultdict(dict)
    for key, weight in weights.items():
        words = key.split(".")
        depth = 2 if words[0] == "blocks" else 1
        found[".".join(words[:depth])][".".join(words[depth:])] = weight
    return found


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


# --- the field head, pixel by pixel ---------------------------------------------------------------------------------


def encode_coordinate(encoding: str, row: int, column: int, height: int, width: int) -> list[float]:
    """The features of one pixel of a height × width patch."""
    if encoding == "none":
        return []

    def position(i: int, n: int, end: float) -> float:  # linspace(0, end, n)[i]
        return end * i / (n - 1) if n > 1 else 0.0

    if encoding == "dct":
        x, y = position(column, width, 1.0), position(row, height, 1.0)
        features = []
        for i in range(8):
            for j in range(8):
                fx, fy = 8 * i / 7, 8 * j / 7
                features.append(math.cos(math.pi * fx * x) * math.cos(math.pi * fy * y) / (1 + fx * fy))
        return features
    assert encoding == "sincos", f"the plain network does not know the encoding {encoding!r}"
    x, y = position(column, width, 16.0), position(row, height, 16.0)
    features = []
    for k in range(32):
        omega = 10000 ** (-4 * k / 128)
        features += [math.cos(x * omega), math.cos(y * omega)]
    return features


@functools.cache
def encode_patch(encoding: str, side: int) -> list[list[float]]:
    return [encode_coordinate(encoding, k // side, k % side, side, side) for k in range(side**2)]


@torch.compiler.assume_constant_result  # or torch.compile would follow every cosine
def patch_coordinates(encoding: str, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The features of every pixel of a square patch, [side², F]."""
    return torch.tensor(encode_patch(encoding, side), dtype=dtype, device=device)


def unit_columns(matrix: Tensor) -> Tensor:
    """Every column (an output unit's fan-in) divided by its length."""
    columns = [matrix[:, j] / torch.sqrt((matrix[:, j] ** 2).sum()) for j in range(matrix.shape[1])]
    return torch.stack(columns, dim=1)


def field_of_patch(weights: Weights, config: ModelConfig, pixels: Tensor, s: Tensor, height: int, width: int) -> Tensor:
    """One patch: noisy pixels [K, C] and condition s [D] → [K, C], with loops over pixels and units."""
    w, hidden = config.field_width, config.field_ratio * config.field_width
    matrices = []
    for block in range(config.field_blocks if config.field_weights == "generated" else 0):
        flat = linear(weights, f"head.blocks.{block}.generator", s)
        fc1 = flat[: w * hidden].reshape(w, hidden)
        fc2 = flat[w * hidden :].reshape(hidden, w)
        if config.weight_norm in ("fc1", "fc1+fc2"):
            fc1 = unit_columns(fc1)
        if config.weight_norm == "fc1+fc2":
            fc2 = unit_columns(fc2)
        matrices.append((fc1, fc2))
    decoded = []
    for k in range(height * width):
        coordinates = encode_coordinate(config.encoding, k // width, k % width, height, width)
        seen = pixels[k] if config.field_pixels else pixels[k][:0]
        h = linear(weights, "head.embed", torch.cat((seen, pixels.new_tensor(coordinates))))
        for block in range(config.field_blocks if config.field_weights == "shared" else 0):
            h = h + shared_block(weights, f"head.blocks.{block}", h, s)
        for block, (fc1, fc2) in enumerate(matrices):
            normed = rms_norm(h, weights[f"head.blocks.{block}.norm.weight"])
            inner = torch.stack([silu((fc1[:, j] * normed).sum()) for j in range(hidden)])
            h = h + torch.stack([(fc2[:, j] * inner).sum() for j in range(w)])
        if config.output_norm:
            h = rms_norm(h, weights["head.norm.weight"])
        decoded.append(linear(weights, "head.out", h))
    return torch.stack(decoded)


def shared_block(weights: Weights, name: str, h: Tensor, s: Tensor) -> Tensor:
    """What a block with shared weights adds to features h [..., W], given conditions s [..., D]."""
    shift, scale, gate = linear(weights, f"{name}.modulation", s).chunk(3, dim=-1)
    inner = silu(linear(weights, f"{name}.fc1", rms_norm(h, weights[f"{name}.norm.weight"]) * (1 + scale) + shift))
    return gate * linear(weights, f"{name}.fc2", inner)


# --- the full network -----------------------------------------------------------------------------------------------


def time_vector(weights: Weights, t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10) * torch.arange(128, dtype=t.dtype, device=t.device) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
    return linear(weights, "time_embed.mlp.2", silu(linear(weights, "time_embed.mlp.0", features)))


def rotate(x: Tensor, rows: int, columns: int) -> Tensor:
    """Rotary positions of x [B, H, N, E], with complex numbers, of which there are none in bfloat16."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    quarter, kind = x.shape[-1] // 4, {"dtype": x.dtype, "device": x.device}
    omega = 10000.0 ** (-torch.arange(quarter, **kind) / quarter)
    ys = torch.linspace(0, 16, rows, **kind).repeat_interleave(columns)
    xs = torch.linspace(0, 16, columns, **kind).repeat(rows)
    angles = torch.stack((xs[:, None] * omega, ys[:, None] * omega), dim=-1).reshape(rows * columns, 2 * quarter)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).reshape(x.shape)


def dit_block(weights: Weights, heads: int, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, tokens, width = x.shape

    def split_heads(y: Tensor) -> Tensor:
        return y.reshape(batch, tokens, heads, width // heads).transpose(1, 2)

    six = linear(weights, "modulation", c)[:, None, :]
    shift1, scale1, gate1, shift2, scale2, gate2 = six.chunk(6, dim=-1)
    y = rms_norm(x, weights["norm1.weight"]) * (1 + scale1) + shift1
    q, k, v = linear(weights, "attn.qkv", y).chunk(3, dim=-1)
    q = rotate(rms_norm(split_heads(q), weights["attn.q_norm.weight"]), *grid)
    k = rotate(rms_norm(split_heads(k), weights["attn.k_norm.weight"]), *grid)
    attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // heads), dim=-1)
    y = (attention @ split_heads(v)).transpose(1, 2).reshape(batch, tokens, width)
    x = x + gate1 * linear(weights, "attn.proj", y)
    y = rms_norm(x, weights["norm2.weight"]) * (1 + scale2) + shift2
    gate, value = linear(weights, "mlp.gate_value", y).chunk(2, dim=-1)
    return x + gate2 * linear(weights, "mlp.out", silu(gate) * value)


def field_head(weights: Weights, config: ModelConfig, pixels: Tensor, s: Tensor) -> Tensor:
    """All patches at once: the head's weights, pixels [M, K, C], s [M, D] → [M, K, C].

    Coordinates are materialised for every patch.
    """
    side, w, hidden = config.patch_size, config.field_width, config.field_ratio * config.field_width
    table = patch_coordinates(config.encoding, side, pixels.dtype, pixels.device)
    coordinates = table.repeat(len(pixels), 1, 1)
    seen = pixels if config.field_pixels else pixels[..., :0]
    h = linear(weights, "embed", torch.cat((seen, coordinates), dim=-1))
    for block in range(config.field_blocks):
        if config.field_weights == "shared":
            h = h + shared_block(weights, f"blocks.{block}", h, s[:, None, :])
            continue
        flat = linear(weights, f"blocks.{block}.generator", s)
        fc1 = flat[:, : w * hidden].reshape(-1, w, hidden)
        fc2 = flat[:, w * hidden :].reshape(-1, hidden, w)
        if config.weight_norm in ("fc1", "fc1+fc2"):
            fc1 = fc1 / torch.sqrt((fc1**2).sum(dim=1, keepdim=True))
        if config.weight_norm == "fc1+fc2":
            fc2 = fc2 / torch.sqrt((fc2**2).sum(dim=1, keepdim=True))
        h = h + silu(rms_norm(h, weights[f"blocks.{block}.norm.weight"]) @ fc1) @ fc2
    if config.output_norm:
        h = rms_norm(h, weights["norm.weight"])
    return linear(weights, "out", h)


def network(
    weights: Weights,
    config: ModelConfig,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    block: Callable[..., Tensor] = dit_block,
    head: Callable[..., Tensor] = field_head,
) -> Tensor:
    """The velocity [B, C, H, W] of a class-conditional PixNerd with these weights.

    `block` and `head` are `dit_block` and `field_head`, or what torch.compile made of them.
    """
    batch, channels, height, width = x.shape
    side = config.patch_size
    rows, columns = height // side, width // side
    patches = x.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)  # b h w c p q
    tokens = linear(weights, "patch_embed", patches.reshape(batch, rows * columns, channels * side * side))
    time = time_vector(weights, t)
    c = silu(time + weights["label_embed.weight"][labels])
    parts = by_part(weights)
    for number in range(config.blocks):
        tokens = block(parts[f"blocks.{number}"], config.heads, tokens, c, (rows, columns))
    s = silu(time[:, None, :] + tokens).reshape(batch * rows * columns, -1)
    if config.head == "linear":
        decoded = linear(weights, "head.out", s)
    else:
        pixels = patches.reshape(batch * rows * columns, channels, side * side).transpose(1, 2)
        decoded = head(parts["head"], config, pixels, s)
    decoded = decoded.reshape(batch, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    out = decoded.reshape(batch, channels, height, width)
    if config.skip:
        scales = linear(weights, "skip.scales", time)
        out = scales[:, 0, None, None, None] * x + scales[:, 1, None, None, None] * out
    if config.prediction == "x":
        out = (out - x) / (1 - t)[:, None, None, None]
    return out
