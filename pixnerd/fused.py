"""A field block as one GPU kernel: norm, both products, SiLU and residual for a patch, without a trip to memory.

As separate operators a block reads and writes its pixels' features some ten times, which takes a GPU longer than its
arithmetic. Here one program (a group of threads with registers of its own) takes a patch, reads its weights once and
its pixels once, and writes its pixels once. The backward pass computes everything inside again, so a block keeps only
what it was given. An H200 has timed it: notebooks/measured_machine.md, "On a GPU".

For one pixel, in the letters of `fields`, with gains g [W] of the norm and generated W₁ [W, R] and W₂ [R, W]:

    ρ = 1 / sqrt(mean(h²) + ε)        n = ρ·g·h                  RMSNorm
    u = (W₁ᵀ n)·r₁                    r₁[j] = 1 / ‖W₁[:, j]‖      products with the normalised columns
    z = SiLU(u)
    out = h + (W₂ᵀ z)·r₂              r₂[i] = 1 / ‖W₂[:, i]‖

**Norms after the product.** Scaling column j of a matrix scales entry j of the product: (W·diag r)ᵀ n = r·(Wᵀ n). So
no normalised copy of the weights is made, and a patch needs R + W factors instead of 2·W·R divisions.

**Backward.** Let d [W] be the loss's derivative by `out`, and by the chain rule, from the last line to the first:

    dz = W₂ (d·r₂)        du = dz·σ(u)·(1 + u·(1 − σ(u)))        dn = W₁ (du·r₁)
    dg = Σ dn·h·ρ         over all pixels of all patches
    dh = d + ρ·(g·dn − x·mean(x·g·dn))        x = ρ·h, since ρ depends on h, too

The derivatives by the *normalised* columns are sums over a patch's pixels, products of matrices again: G₁ = Σ n duᵀ and
G₂ = Σ z dᵀ. A column v = r·w of unit length does not change when w grows, so of its derivative G only the part across v
counts:

    dw = r·(G − v·(v·G)) = r·G − r³·w·(w·G)

A column shorter than 1e-12 is divided by this constant instead, and has the first term alone; so has a matrix that is
not normalised, with r = 1.

Products read numbers in the precision of the weights (bfloat16 under autocast) and add up in float32, as does all else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .errors import InputError
from .layers import L2_EPS, NORM_EPS
from .model_config import WeightNorm

SMALLEST = 16  # the side of the smallest matrix that tensor cores multiply


def _configurations(choices: list[tuple[int, int]]) -> list[triton.Config]:
    return [triton.Config({"PIXELS": pixels}, num_warps=warps, num_stages=1) for pixels, warps in choices]


# Pixels of a patch that a program computes at once, and its groups of 32 threads. The fastest is chosen when a shape is
# first met; the first of a list where results have to repeat bit for bit, since sums depend on the choice.
FORWARD = _configurations([(64, 4), (32, 4), (64, 8), (128, 8)])
BACKWARD = _configurations([(32, 8), (16, 8), (32, 16), (64, 16)])
KEY = ["pixels", "W", "R", "norm1", "norm2"]


# --- inside the kernels ----------------------------------------------------------------------------------------------


@triton.jit
def _matrix(start, rows: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of a row-major matrix from `start` on, and which of them are inside rows × columns."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return start + i * columns + j, (i < rows) & (j < columns)


@triton.jit
def _factors(weight, normalised: tl.constexpr, eps: tl.constexpr):
    """Factor r and squared length of every column, [1, out] each; r is 1 if columns are not normalised."""
    weight = weight.to(tl.float32)
    squares = tl.sum(weight * weight, 0)[None, :]
    if normalised:
        return tl.rsqrt(tl.maximum(squares, eps * eps)), squares
    return tl.full(squares.shape, 1.0, tl.float32), squares


@triton.jit
def _to_column(gradient, weight, r, squares, normalised: tl.constexpr, eps: tl.constexpr):
    """From the derivative by normalised columns to that by the columns themselves, [in, out]."""
    if normalised:
        weight = weight.to(tl.float32)
        along = tl.sum(weight * gradient, 0)[None, :]
        turning = tl.where(squares >= eps * eps, r * r * r * along, 0.0)
        return r * gradient - turning * weight
    return gradient


@triton.jit
def _hidden(h, gain, fc1, r1, W: tl.constexpr, norm_eps: tl.constexpr):
    """ρ [PIXELS, 1], x and n [PIXELS, W], u and σ(u) [PIXELS, R]: the first half of a block."""
    rho = tl.rsqrt(tl.sum(h * h, 1)[:, None] / W + norm_eps)
    x = h * rho
    n = x * gain
    u = tl.dot(n.to(fc1.dtype), fc1, input_precision="ieee") * r1
    return rho, x, n, u, tl.sigmoid(u)


@triton.autotune(FORWARD, key=KEY)
@triton.jit
def forward_kernel(
    h_at, weights_at, gain_at, out_at,
    pixels, W: tl.constexpr, R: tl.constexpr, norm1: tl.constexpr, norm2: tl.constexpr,
    norm_eps: tl.constexpr, l2_eps: tl.constexpr,
    WIDE: tl.constexpr, HIDDEN: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program a patch; WIDE and HIDDEN are W and R rounded up to powers of two, filled with zeros."""
    patch = tl.program_id(0).to(tl.int64)  # a batch has more than 2³¹ numbers
    channel = tl.arange(0, WIDE)[None, :]
    gain = tl.load(gain_at + channel, channel < W, 0.0).to(tl.float32)
    at1, inside1 = _matrix(weights_at + patch * 2 * W * R, W, R, WIDE, HIDDEN)
    at2, inside2 = _matrix(weights_at + patch * 2 * W * R + W * R, R, W, HIDDEN, WIDE)
    fc1, fc2 = tl.load(at1, inside1, 0.0), tl.load(at2, inside2, 0.0)
    r1, _ = _factors(fc1, norm1, l2_eps)
    r2, _ = _factors(fc2, norm2, l2_eps)
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)[:, None]
        offset, inside = (patch * pixels + pixel) * W + channel, (pixel < pixels) & (channel < W)
        h = tl.load(h_at + offset, inside, 0.0).to(tl.float32)
        _rho, _x, _n, u, sigmoid = _hidden(h, gain, fc1, r1, W, norm_eps)
        out = h + tl.dot((u * sigmoid).to(fc2.dtype), fc2, input_precision="ieee") * r2
        tl.store(out_at + offset, out.to(out_at.dtype.element_ty), inside)


@triton.autotune(BACKWARD, key=KEY)
@triton.jit
def backward_kernel(
    d_at, h_at, weights_at, gain_at, dh_at, dweights_at, dgain_at,
    pixels, W: tl.constexpr, R: tl.constexpr, norm1: tl.constexpr, norm2: tl.constexpr,
    norm_eps: tl.constexpr, l2_eps: tl.constexpr,
    WIDE: tl.constexpr, HIDDEN: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program a patch, whose sums over pixels stay in its registers; dgain [M, W] is for the caller to add up."""
    patch = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDE)[None, :]
    gain = tl.load(gain_at + channel, channel < W, 0.0).to(tl.float32)
    at1, inside1 = _matrix(weights_at + patch * 2 * W * R, W, R, WIDE, HIDDEN)
    at2, inside2 = _matrix(weights_at + patch * 2 * W * R + W * R, R, W, HIDDEN, WIDE)
    fc1, fc2 = tl.load(at1, inside1, 0.0), tl.load(at2, inside2, 0.0)
    r1, squares1 = _factors(fc1, norm1, l2_eps)
    r2, squares2 = _factors(fc2, norm2, l2_eps)
    of_fc1 = tl.zeros((WIDE, HIDDEN), tl.float32)  # G₁
    of_fc2 = tl.zeros((HIDDEN, WIDE), tl.float32)  # G₂
    of_gain = tl.zeros((1, WIDE), tl.float32)
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)[:, None]
        offset, inside = (patch * pixels + pixel) * W + channel, (pixel < pixels) & (channel < W)
        h = tl.load(h_at + offset, inside, 0.0).to(tl.float32)
        d = tl.load(d_at + offset, inside, 0.0).to(tl.float32)
        rho, x, n, u, sigmoid = _hidden(h, gain, fc1, r1, W, norm_eps)
        dz = tl.dot((d * r2).to(fc2.dtype), tl.trans(fc2), input_precision="ieee")
        du = dz * sigmoid * (1 + u * (1 - sigmoid))
        dn = tl.dot((du * r1).to(fc1.dtype), tl.trans(fc1), input_precision="ieee")
        of_fc1 += tl.dot(tl.trans(n.to(fc1.dtype)), du.to(fc1.dtype), input_precision="ieee")
        of_fc2 += tl.dot(tl.trans((u * sigmoid).to(fc2.dtype)), d.to(fc2.dtype), input_precision="ieee")
        of_gain += tl.sum(dn * x, 0)[None, :]
        dx = dn * gain
        dh = d + rho * (dx - x * (tl.sum(dx * x, 1)[:, None] / W))
        tl.store(dh_at + offset, dh.to(dh_at.dtype.element_ty), inside)
    of_fc1 = _to_column(of_fc1, fc1, r1, squares1, norm1, l2_eps)
    of_fc2 = _to_column(of_fc2, fc2, r2, squares2, norm2, l2_eps)
    at1, inside1 = _matrix(dweights_at + patch * 2 * W * R, W, R, WIDE, HIDDEN)
    at2, inside2 = _matrix(dweights_at + patch * 2 * W * R + W * R, R, W, HIDDEN, WIDE)
    tl.store(at1, of_fc1.to(dweights_at.dtype.element_ty), inside1)
    tl.store(at2, of_fc2.to(dweights_at.dtype.element_ty), inside2)
    tl.store(dgain_at + patch * W + channel, of_gain, channel < W)


# --- as operators of torch, which autograd, autocast and torch.compile know ------------------------------------------


def _constants(h: Tensor, weights: Tensor, weight_norm: str) -> dict[str, int | float | bool]:
    """What a kernel is compiled for: the same for all patches."""
    width = h.shape[2]
    hidden = weights.shape[1] // (2 * width)
    wide, high = (max(SMALLEST, triton.next_power_of_2(side)) for side in (width, hidden))
    norms = {"norm1": weight_norm != "none", "norm2": weight_norm == "fc1+fc2", "norm_eps": NORM_EPS, "l2_eps": L2_EPS}
    return {"pixels": h.shape[1], "W": width, "R": hidden, "WIDE": wide, "HIDDEN": high, **norms}


def _launch(kernel: triton.runtime.Autotuner, patches: int, tensors: tuple, constants: dict) -> None:
    """Run one program a patch, with the fastest configuration unless results have to repeat or nothing can be timed."""
    if not (tensors[0].is_cuda or triton.knobs.runtime.interpret):
        raise InputError(f"field_kernel is fused, which runs on a GPU alone, not on {tensors[0].device}: use torch")
    if torch.are_deterministic_algorithms_enabled() or not tensors[0].is_cuda:
        kernel.fn[(patches,)](*tensors, **constants, **kernel.configs[0].all_kwargs())
    else:
        kernel[(patches,)](*tensors, **constants)


@torch.library.custom_op("pixnerd::field_block", mutates_args=())
def _field_block(h: Tensor, weights: Tensor, gain: Tensor, weight_norm: str) -> Tensor:
    h, weights, gain = h.contiguous(), weights.contiguous(), gain.contiguous()
    out = torch.empty_like(h)
    _launch(forward_kernel, len(h), (h, weights, gain, out), _constants(h, weights, weight_norm))
    return out


@torch.library.custom_op("pixnerd::field_block_backward", mutates_args=())
def _field_block_backward(
    d: Tensor, h: Tensor, weights: Tensor, gain: Tensor, weight_norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    d, h, weights, gain = d.contiguous(), h.contiguous(), weights.contiguous(), gain.contiguous()
    dh, dweights = torch.empty_like(h), torch.empty_like(weights)
    dgain = torch.empty(len(h), len(gain), dtype=torch.float32, device=h.device)
    tensors = d, h, weights, gain, dh, dweights, dgain
    _launch(backward_kernel, len(h), tensors, _constants(h, weights, weight_norm))
    return dh, dweights, dgain.sum(0).to(gain.dtype)


@_field_block.register_fake
def _(h, weights, gain, weight_norm):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@_field_block_backward.register_fake
def _(d, h, weights, gain, weight_norm):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, weights, gain))


def _save(ctx, inputs, output):
    *tensors, ctx.weight_norm = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d):
    return *_field_block_backward(d, *ctx.saved_tensors, ctx.weight_norm), None


_field_block.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.pixnerd.field_block)
def _flops(h, weights, *_, **__):
    return 2 * h[1] * weights[0] * weights[1]  # every weight of a patch multiplies once for each of its pixels


@register_flop_formula(torch.ops.pixnerd.field_block_backward)
def _backward_flops(d, h, weights, *_, **__):
    return 2 * _flops(h, weights) + h[1] * weights[0] * weights[1]  # four products, and W₁ᵀ n again


def field_block(h: Tensor, weights: Tensor, gain: Tensor, weight_norm: WeightNorm) -> Tensor:
    """What `FieldBlock.field` computes, as one kernel: h + W₂ᵀ·SiLU(W₁ᵀ·RMSNorm(h)).

    Args:
        h: pixels' features [M, K, W], float32 or bfloat16.
        weights: generated weights [M, 2·W·R], W₁ [W, R] before W₂ [R, W]; products are taken in their precision.
        gain: the norm's weight [W].
        weight_norm: which matrices' columns are scaled to unit norm.

    Returns:
        [M, K, W] in the precision of h.
    """
    return _field_block(h, weights, gain, weight_norm)
