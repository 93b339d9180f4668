"""The transformer's layers: RMSNorm, 2-D rotary positions, attention, SwiGLU, adaptive modulation, time embedding.

Dimension letters: B images, N tokens (patches), D width, H heads, E = D / H channels of a head.
"""

import functools
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear, linear

NORM_EPS = 1e-6
L2_EPS = 1e-12  # the shortest vector that is scaled to unit length


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already is: the precision for norms and angles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + 1e-6) · weight over the last axis, in x's precision; sums in at least float32.

    CUDA's autocast, unlike the CPU's, would run rms_norm in float32, and keep a float32 copy of x for the backward
    pass. The kernel for bfloat16 computes in float32 too and rounds only its result, so nothing is lost by asking for
    it.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type != "cuda":
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


@functools.lru_cache(maxsize=32)
def rotary_table(
    rows: int, columns: int, ends: tuple[float, float], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle, each [N, E/2], tokens row-major.

    Frequencies ω_k = 10000^(−4k/E), k = 0 … E/4 − 1. Channel pair 2k rotates by x·ω_k and pair 2k+1 by y·ω_k, where
    y (row) and x (column) run from 0 to `ends`, both included, regardless of the number of tokens: with the same ends,
    a finer grid interpolates the positions that a coarser one was trained with. Kept per grid, precision and device.
    """
    with torch.inference_mode(False):  # the table outlives the caller, who may be in inference mode
        y = torch.linspace(0, ends[0], rows, dtype=dtype, device=device)
        x = torch.linspace(0, ends[1], columns, dtype=dtype, device=device)
        omega = 10000.0 ** (-4 / head_dim * torch.arange(head_dim // 4, dtype=dtype, device=device))  # [E/4]
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")  # [rows, columns]
        angles = torch.stack((grid_x, grid_y), -1).reshape(-1, 1, 2) * omega[:, None]  # [N, E/4, 2]
        angles = angles.flatten(1)  # [N, E/2]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: (a, b) → (a cos φ − b sin φ, a sin φ + b cos φ).

    x [B, H, N, E]; cos and sin of the angles [N, E/2], see `rotary_table`.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))  # [B, H, N, E/2, 2]
    turned = pairs * cos[..., None] + pairs.flip(-1) * torch.stack((-sin, sin), -1)
    return turned.flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √E) v, all [B, H, N, E]; in float32 on a CPU, whose bf16 backward pass is 13 times slower."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*(at_least_float32(y) for y in (q, k, v))).type_as(v)


class OutputLinear(Linear):
    """A network's last layer, zero at the start, so that an untrained network predicts zero.

    While sampling it computes in float32 under autocast, too. bfloat16 rounds a pixel to half a level of 255, an error
    in every step that an image keeps: notebooks/measured_models.md, "In bfloat16".
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not torch.amp.is_autocast_available(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Self-attention with RMS-normalised queries and keys. [B, N, D] → [B, N, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)  # rows q | k | v, each heads × head_dim
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, text: Tensor | None = None) -> Tensor:
        """With `rotary` (cosine and sine, [N, E/2] each), queries and keys are rotated by their 2-D positions."""
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)  # [B, H, N, E]
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if text is not None:
            text_k, text_v = self.text_keys_values(text)
            k, v = torch.cat((k, text_k), dim=2), torch.cat((v, text_v), dim=2)  # [B, H, N + L, E]
        x = attend(q, k, v)  # [B, H, N, E]
        return self.proj(rearrange(x, "b h n e -> b n (h e)"))


class JointAttention(Attention):
    """Image tokens attend to image and text tokens: queries from the image, keys and values from both, image first.

    Text keys share the image's norm and are not rotated. x [B, N, D], text [B, L, D] → [B, N, D].
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.text_kv = Linear(width, 2 * width, bias=False)  # rows k | v

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] → keys and values, [B, H, L, E] each."""
        k, v = rearrange(self.text_kv(text), "b n (two h e) -> two b h n e", two=2, h=self.heads)
        return self.k_norm(k), v


def hidden_padding(hidden: int, device: torch.device) -> int:
    """How many zeros a GPU adds to a hidden axis, so that its rows begin at multiples of 8 numbers."""
    return -hidden % 8 if device.type == "cuda" else 0


class SwiGLU(nn.Module):
    """W₂(silu(W₁x)·W₃x) without biases; W₁ and W₃ are one matrix, gate rows first. [B, N, D] → [B, N, D].

    A GPU's fast matrix products in bfloat16 need rows of whole 16 bytes, 8 numbers; the hidden size of L/16 is 2730.
    There zeros fill the axis up: silu(0)·0 = 0 meets zeros in W₂, so neither values nor gradients change.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_value = Linear(width, 2 * hidden, bias=False)
        self.out = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.gate_value.weight, self.out.weight  # [2·hidden, D], [D, hidden]
        if added := hidden_padding(self.out.in_features, x.device):
            rows = F.pad(rows.to(x.dtype).unflatten(0, (2, -1)), (0, 0, 0, added)).flatten(0, 1)
            columns = F.pad(columns.to(x.dtype), (0, added))
        gate, value = linear(x, rows).chunk(2, dim=-1)  # [B, N, hidden] each, or hidden + added
        return linear(F.silu(gate) * value, columns)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift. x [B, N, D]; shift and scale [B, 1, D]."""
    return torch.addcmul(shift, x, 1 + scale)


class DiTBlock(nn.Module):
    """x += g₁·Attn(mod(norm x)); x += g₂·SwiGLU(mod(norm x)), the six vectors from one Linear of the condition c."""

    def __init__(self, attention: Attention, width: int, hidden: int):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = attention
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.modulation = Linear(width, 6 * width)

    def forward(
        self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor] | None = None, text: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D] and c [B, D] → [B, N, D]; rotary positions and text [B, L, D] go to the attention."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)  # [B, 1, D] each
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rotary, text))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class TimeEmbedding(nn.Module):
    """t [B] in [0, 1] → [B, D]: 256 features cos(t·f_k) ‖ sin(t·f_k), f_k = 10^(−k/128), then Linear–SiLU–Linear.

    The maximum period is 10 because t is not scaled to 0…1000 as in DDPM-style embeddings.
    """

    FREQUENCIES = 128

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * self.FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        k = torch.arange(self.FREQUENCIES, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10) / self.FREQUENCIES * k)  # [B, 128]
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)  # [B, 256]
        return self.mlp(features.to(self.mlp[0].weight.dtype))
